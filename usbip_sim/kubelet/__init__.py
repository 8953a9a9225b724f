"""A simulated kubelet, and what an API server and a container runtime make of its pods."""
