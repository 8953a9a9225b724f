"""The servers, devices, nodes and pods that unit tests share."""

from __future__ import annotations

from usbip_plugin.model import (
    Attachment,
    Descriptor,
    DeviceKey,
    DeviceNode,
    InterfaceClass,
    NodeIdentity,
    PodRef,
    ServerKey,
    UsbId,
)

LAB, ATTIC = ServerKey("lab", 3240), ServerKey("attic", 3240)
KEY, OTHER_KEY = DeviceKey(LAB, "1-1"), DeviceKey(LAB, "1-2")
STICK, DONGLE = UsbId(0x0951, 0x1666), UsbId(0x1050, 0x0407)
STORAGE, HID = (InterfaceClass(8, 6, 0x50),), (InterfaceClass(3, 0, 0),)
HIGH_SPEED, SUPER_SPEED = 3, 5
ME = NodeIdentity("node-a", "boot-1")
POD = PodRef("default", "reader", "uid-1")
USB_NODE = DeviceNode("/dev/bus/usb/003/002", "usb", block=False, major=189, minor=257)


def descriptor(
    busid: str = "1-1",
    usb_id: UsbId = STICK,
    *,
    devnum: int = 2,
    speed: int = HIGH_SPEED,
    interfaces: tuple[InterfaceClass, ...] = (),
) -> Descriptor:
    """Returns a device as its server lists it."""
    return Descriptor(busid, "/sys/x", 1, devnum, speed, usb_id, 0x100, 0, 0, 0, 1, 1, 1, interfaces)


def tty(number: int = 0) -> DeviceNode:
    return DeviceNode(f"/dev/ttyUSB{number}", "tty", block=False, major=188, minor=number)


def attachment(*nodes: DeviceNode, key: DeviceKey = KEY, serial: str | None = None) -> Attachment:
    return Attachment(key, 0, "3-1", STICK, serial, nodes)
