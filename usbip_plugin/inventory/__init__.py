"""The devices that a node offers, the health of each with its reason, and the probes that read serial numbers."""
