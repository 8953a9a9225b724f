"""The device-plugin side of the kubelet: registration, ListAndWatch, Allocate, pod-resources."""
