"""Devices in use on this node: allocate, attach, adopt, follow, re-attach, release, and what a container gets."""
