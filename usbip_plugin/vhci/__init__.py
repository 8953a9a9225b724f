"""The kernel's virtual USB host controller (vhci_hcd): its sysfs files, the driver, device nodes and uevents."""
