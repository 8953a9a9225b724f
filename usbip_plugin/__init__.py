"""USB/IP device plugin for Kubernetes, coordinated through Leases."""

__version__ = "0.1.0"
