"""The USB/IP wire: protocol, client, server polling. Imports nothing from vhci, locks or kubelet."""
