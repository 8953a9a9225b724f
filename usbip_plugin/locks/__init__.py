"""Cluster-wide device locks on coordination.k8s.io/v1 Leases."""
