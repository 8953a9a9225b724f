"""The kernel's vhci_hcd: sysfs text, the driver, device nodes, uevents."""
