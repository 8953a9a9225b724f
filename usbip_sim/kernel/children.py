"""The child nodes that simulated devices have: how they are called and numbered. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from usbip_plugin.model import DeviceNode, UsbId
from usbip_plugin.vhci import devices

CHILDREN = {  # name: (kind, path with the index in it, major, block device)
    "tty": ("tty", "/dev/ttyUSB{}", 188, False),
    "acm": ("tty", "/dev/ttyACM{}", 166, False),
    "hidraw": ("hidraw", "/dev/hidraw{}", 244, False),
    "input": ("input", "/dev/input/event{}", 13, False),
    "video4linux": ("video4linux", "/dev/video{}", 81, False),
    "block": ("block", "/dev/sd{}", 8, True),
    "sound": ("sound", "/dev/snd/controlC{}", 116, False),
    "printer": ("printer", "/dev/usb/lp{}", 180, False),
    "usbmisc": ("usbmisc", "/dev/usb/hiddev{}", 180, False),
}
_MAX = 256


def every(name: str) -> Iterator[DeviceNode]:
    """The nodes of this name in CHILDREN, by index: the first that is free is what a device gets."""
    kind, path, major, block = CHILDREN[name]
    for index in range(_MAX):
        shown = chr(ord("a") + index) if block else str(index)
        yield DeviceNode(path.format(shown), kind, block, major, index * 16 if block else index, interface=0)


def linked(
    nodes: Sequence[DeviceNode], usb_id: UsbId, manufacturer: str, model: str, serial: str
) -> tuple[DeviceNode, ...]:
    """The nodes of a device by path, with those that udev would make besides.

    They are given in the order they were made; a text is "" where the device has none.
    """
    name = devices.serial_name(manufacturer or f"{usb_id.vendor:04x}", model or f"{usb_id.product:04x}", serial)
    videos = [node.path for node in nodes if node.kind == "video4linux"]

    def link(node: DeviceNode) -> str:
        interface = node.interface or 0
        match node.kind:
            case "tty":
                return devices.serial_link(name, interface, None if "ACM" in node.path else 0)
            case "hidraw":
                return devices.hidraw_link(name, interface)
            case "video4linux":
                return devices.video_link(name, videos.index(node.path))
            case _:
                return ""

    return tuple(sorted(replace(node, by_id=link(node)) for node in nodes))
