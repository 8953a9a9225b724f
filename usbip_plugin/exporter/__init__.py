"""The exporter: exports this host's USB devices over USB/IP, in place of usbipd and `usbip bind`."""
