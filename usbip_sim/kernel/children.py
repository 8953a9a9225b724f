"""Names and numbers of the child nodes of simulated devices. Pure."""

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
_DYNAMIC_MAJOR = 234  # CHRDEV_MAJOR_DYN_END of the kernel
_MAX = 256


def every(name: str) -> Iterator[DeviceNode]:
    """Yields the possible nodes of this name in CHILDREN, by index. Any other name is a subsystem of character devices.

    The kernel numbers such subsystems as drivers ask for them, in a range that begins at 234.
    """
    kind, path, major, block = CHILDREN.get(name) or (name, f"/dev/{name}{{}}", _DYNAMIC_MAJOR, False)
    for index in range(_MAX):
        suffix = chr(ord("a") + index) if block else str(index)
        yield DeviceNode(path.format(suffix), kind, block, major, index * 16 if block else index, interface=0)


def linked(
    nodes: Sequence[DeviceNode], usb_id: UsbId, manufacturer: str, model: str, serial: str
) -> tuple[DeviceNode, ...]:
    """Returns a device's nodes, sorted by path, with the by-id links that udev would make for them.

    nodes: in the order in which they were made.
    manufacturer, model, serial: "" where the device has none.
    """
    name = devices.serial_name(manufacturer or f"{usb_id.vendor:04x}", model or f"{usb_id.product:04x}", serial)
    videos = [node.path for node in nodes if node.kind == "video4linux"]

    def link(node: DeviceNode) -> str:
        interface = node.interface or 0
        match node.kind:
            case "tty":
                return devices.serial_link(name, interface, None if "ACM" in node.path else 0)
            case "hidraw":
                return devices.link("input", name + (f"-if{interface:02x}" if interface else "") + "-hidraw")
            case "video4linux":
                return devices.link("v4l", f"{name}-video-index{videos.index(node.path)}")
            case _:
                return ""

    return tuple(sorted(replace(node, by_id=link(node)) for node in nodes))
