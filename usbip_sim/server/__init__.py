"""A USB/IP server with virtual devices."""
