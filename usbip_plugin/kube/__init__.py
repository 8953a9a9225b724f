"""The API server: the client, and what the plugin reads and writes there besides Leases."""
