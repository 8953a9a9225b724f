"""The USB/IP wire: protocol, client and server polling. Imports nothing from vhci, locks or kubelet."""
