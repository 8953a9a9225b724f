"""Access to the Kubernetes API server: the client, and everything the plugin reads and writes except Leases."""
