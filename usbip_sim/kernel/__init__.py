"""A simulated vhci_hcd, which runs in its node's process or as a process of its own."""
