"""Devices on offer: which there are, Healthy or not and why, and asking devices for their serial numbers."""
