"""The addresses and devices of the lab, and the configurations of plugin and exporter."""

from __future__ import annotations

from usbip_plugin.model import ServerKey

SERVER = ServerKey("10.77.0.20")
ADDRESSES = {"node-a": "10.77.0.11", "node-b": "10.77.0.12", "server": SERVER.host}
STICK, DISK = "stick", "disk"
SERIALS = {STICK: "STICK", DISK: "DISK"}
KINDS = {STICK: "tty", DISK: "block"}
"""What a pod's program opens."""
DOMAIN = "usbip.dev"
DURATION_S = 21
"""Lock duration: the least that a configuration may have."""
ALLOCATE_S = 60
"""allocateTimeout: the nodes are emulated, and the machine has other work."""
CONFIG = f"""
resources:
  stick:
    devices: [{{target: {{host: {SERVER.host}}}, selector: {{serial: STICK}}}}]
    children: [tty]
    childrenTimeout: 30s
  disk:
    devices: [{{target: {{host: {SERVER.host}}}, selector: {{serial: DISK}}}}]
    children: [block]
    childrenTimeout: 30s
lock: {{duration: {DURATION_S}s}}
allocateTimeout: {ALLOCATE_S}s
"""
EXPORT = f"""
export: [{{serial: STICK}}, {{serial: DISK}}]
fence: true
names: [{SERVER.host}]
"""
