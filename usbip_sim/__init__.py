"""Doubles of the kernel, USB/IP server, kubelet and API server, for the demo, `simulate` and the simulation.

The doubles pass the same contract tests as the real ones. The plugin itself imports none of them.
"""
