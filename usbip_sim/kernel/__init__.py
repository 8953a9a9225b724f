"""A simulated vhci_hcd: in the process of its node, or as a process of its own."""
