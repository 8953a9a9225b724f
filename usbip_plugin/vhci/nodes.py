"""From a USB device's directory in sysfs to its device nodes. Reads sysfs only: the plugin has no /dev."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.model import DeviceNode, UsbId

CHILD_KINDS = frozenset({"tty", "hidraw", "input", "video4linux", "sound", "block", "usbmisc"})

CLASS_CDC, CLASS_HID, CLASS_STORAGE, CLASS_VIDEO = 0x02, 0x03, 0x08, 0x0E
SUBCLASS_ACM = 0x02
MAX_NODES = 64  # of one device; a webcam has about 10, a partitioned disk about 16
MAX_DEPTH = 12  # levels below the device; a disk's partition is 7 deep
_MAX_SERIAL = 126  # characters a USB string descriptor can hold
_MAX_MAJOR, _MAX_MINOR = 1 << 12, 1 << 20  # MINORBITS of the kernel
_USB_ID = re.compile("[0-9a-fA-F]{4}")
_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What sysfs says about an enumerated USB device. devnum tells one attachment on a bus from the next.

    serial: None if it has none, or none that can be printed: the device chose it.
    """

    usb_id: UsbId
    devnum: int
    authorized: bool
    serial: str | None


def read_facts(device: Path) -> DeviceFacts | None:
    """None while the directory is not complete, or gone."""
    try:
        usb_id = UsbId(_usb_number(device / "idVendor"), _usb_number(device / "idProduct"))
        devnum = _number(_text(device / "devnum"))
        authorized = _text(device / "authorized") != "0"
        _text(device / "dev")
    except (OSError, ValueError):
        return None
    try:
        serial = _text(device / "serial")[:_MAX_SERIAL]
    except OSError:
        serial = ""
    return DeviceFacts(usb_id, devnum, authorized, serial if serial and serial.isprintable() else None)


def collect(device: Path) -> tuple[DeviceNode, ...]:
    """The USB node, then child nodes by path. Empty if the device is gone. Other USB devices below are left out."""
    own = _node(device, "usb")
    if own is None:
        return ()
    children: set[DeviceNode] = set()
    root_depth = len(device.parts)
    for folder, folders, files in os.walk(device):
        path = Path(folder)
        if path != device and "devnum" in files:  # another USB device, behind a hub
            folders.clear()
            continue
        if len(path.parts) - root_depth >= MAX_DEPTH or len(children) >= MAX_NODES:
            folders.clear()
        if path != device and "dev" in files and (kind := _subsystem(path)) in CHILD_KINDS:
            child = _node(path, kind)
            if child is not None:
                children.add(child)
    return (own, *sorted(children))


def promised_kinds(device: Path) -> tuple[frozenset[str], ...]:
    """For each interface that promises child nodes, the kinds of which one is to be expected."""
    promises: set[frozenset[str]] = set()
    for interface in device.glob(f"{device.name}:*"):
        try:
            class_ = int(_text(interface / "bInterfaceClass"), 16)
            subclass = int(_text(interface / "bInterfaceSubClass"), 16)
        except (OSError, ValueError):
            continue
        promises |= _promise(class_, subclass)
    return tuple(sorted(promises, key=sorted))


def _promise(class_: int, subclass: int) -> set[frozenset[str]]:
    match class_:
        case _ if class_ == CLASS_STORAGE:
            return {frozenset({"block"})}
        case _ if class_ == CLASS_HID:
            return {frozenset({"hidraw", "input"})}
        case _ if class_ == CLASS_CDC and subclass == SUBCLASS_ACM:
            return {frozenset({"tty"})}
        case _ if class_ == CLASS_VIDEO:
            return {frozenset({"video4linux"})}
        case _:
            return set()


def _subsystem(path: Path) -> str:
    try:
        return (path / "subsystem").readlink().name
    except OSError:
        return ""


def _node(path: Path, kind: str) -> DeviceNode | None:
    try:
        lines = (path / "uevent").read_text(errors="replace").splitlines()
        fields = dict(line.split("=", 1) for line in lines if "=" in line)
        name = fields["DEVNAME"]
        major, minor = _number(fields["MAJOR"]), _number(fields["MINOR"])
        if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
            return None
        if major >= _MAX_MAJOR or minor >= _MAX_MINOR:
            return None
        return DeviceNode(f"/dev/{name}", kind, kind == "block", major, minor)
    except (OSError, KeyError, ValueError):
        return None


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip()


def _usb_number(path: Path) -> int:
    text = _text(path)
    if not _USB_ID.fullmatch(text):
        raise ValueError(text[:80])
    return int(text, 16)


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(text[:80])
    return int(text)
