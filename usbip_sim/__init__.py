"""Doubles of the kernel, USB/IP server, kubelet and API server; the demo, `simulate` and the simulation use them.

They are held to the same contract tests as the real things. Nothing of the product imports them.
"""
