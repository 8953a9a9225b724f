"""Everything that talks to the kubelet: registration, ListAndWatch, Allocate and pod-resources."""
