"""A simulated kubelet, with the API server's view of its pods and the container runtime's use of CDI specs."""
