"""An attached device in sysfs: its descriptors, its device nodes and the names that udev's rules would give them.

Reads sysfs only, because the plugin's container has no /dev. Bounds or leaves out strings that the device chooses.
The names below /dev/*/by-id follow systemd: udev-builtin-usb_id.c, udev-builtin-input_id.c, rules.d/60-serial.rules
and 60-persistent-*.rules. One difference: characters that are not printable become "_" even if they are not ASCII.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from usbip_plugin.model import DeviceNode, UsbId

MAX_STRING = 126  # characters; a USB string descriptor cannot hold more
_USB_ID = re.compile("[0-9a-fA-F]{4}")
_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class DeviceAttributes:
    """The attributes of an enumerated USB device, as read from sysfs.

    devnum: differs for each enumeration on a bus.
    serial, manufacturer, model: strings that the device chooses; None if it has none or the string is not printable.
    """

    usb_id: UsbId
    devnum: int
    authorized: bool
    serial: str | None
    manufacturer: str | None = None
    model: str | None = None

    def is_same_device(self, other: DeviceAttributes) -> bool:
        """Returns whether both were read from one device, since it was enumerated last."""
        return (self.devnum, self.usb_id) == (other.devnum, other.usb_id)


def read_attributes(device: Path, *, strings: bool = True) -> DeviceAttributes | None:
    """Returns the attributes of the device in this sysfs directory, or None if the directory is incomplete or gone.

    strings: whether to read the strings, too. The kernel does that under the device's lock (usb_string_attr), so it
    blocks while a driver or a write to `authorized` has the lock: without end, if a server answers no URB.
    """
    try:
        usb_id = UsbId(_usb_number(device / "idVendor"), _usb_number(device / "idProduct"))
        devnum = _number(text(device / "devnum"))
        authorized = text(device / "authorized") != "0"
        text(device / "dev")
    except (OSError, ValueError):
        return None
    if not strings:
        return DeviceAttributes(usb_id, devnum, authorized, None)
    serial, manufacturer, model = (_string(device / name) for name in ("serial", "manufacturer", "product"))
    return DeviceAttributes(usb_id, devnum, authorized, serial, manufacturer, model)


MAX_DESCRIPTORS = 9 << 16
"""Bytes of a device's descriptors that are read: more than the kernel's 8 configurations of at most 65,535 bytes."""


def text(path: Path) -> str:
    """Returns the text of a sysfs attribute without surrounding white space. Raises OSError if it cannot be read."""
    return path.read_text(errors="replace").strip()


def _text(path: Path) -> str:
    """Returns the text of a sysfs attribute, or "" if it cannot be read."""
    with contextlib.suppress(OSError):
        return text(path)
    return ""


def _number(digits: str) -> int:
    """Returns the value of a decimal number. Raises ValueError unless it consists of one to nine digits."""
    if not _NUMBER.fullmatch(digits):
        raise ValueError(digits[:80])
    return int(digits)


def _string(path: Path) -> str | None:
    found = _text(path)[:MAX_STRING]
    return found if found and found.isprintable() else None


def _usb_number(path: Path) -> int:
    found = text(path)
    if not _USB_ID.fullmatch(found):
        raise ValueError(found[:80])
    return int(found, 16)


MAX_PART = 63  # characters of a vendor and of a model in a by-id name, as in udev
MAX_NAME = 255  # bytes of a by-id file name (NAME_MAX of Linux); also characters at which serial_name cuts
_SPACE = re.compile(r"\s+")
_BITS = 8 * struct.calcsize("l")  # bits in each word of a bitmap in sysfs: an unsigned long of the kernel
_FULL_KEYBOARD = range(1, 32)  # key codes of Escape, the digits and Q to D; udev calls a device with all a keyboard
_MOUSE_BUTTONS = range(0x110, 0x118)
_JOYSTICK_BUTTONS = range(0x120, 0x140)
_X, _Y = 0, 1


def serial_name(vendor: str, model: str, serial: str, instance: str = "") -> str:
    """Returns the name that udev builds for a device (ID_SERIAL).

    vendor, model: the device's strings, or the four hexadecimal digits of its ids.
    serial: "" for none. instance: "target:lun" of a disk, "" for other devices.
    """
    parts = [_part(vendor), _part(model)]
    if serial and all(" " <= c <= "\x7f" and c != "," for c in serial):
        parts.append(_part(serial, MAX_NAME))
    return ("_".join(parts) + (f"-{instance}" if instance else ""))[:MAX_NAME]


def _part(text: str, longest: int = MAX_PART) -> str:
    return "".join(c if _kept(c) else "_" for c in _SPACE.sub("_", text.strip())[:longest])


def _kept(c: str) -> bool:
    return (c.isalnum() or c in "#+-.:=@_") if c.isascii() else c.isprintable()


def serial_link(name: str, interface: int, port: int | None) -> str:
    """Returns the by-id path of a ttyUSB (port: its port_number in sysfs) or ttyACM node (port: None)."""
    return link("serial", f"{name}-if{interface:02x}" + ("" if port is None else f"-port{port}"))


def input_link(name: str, interface: int, node: str, what: str) -> str:
    """Returns the by-id path of an event, mouse or js node, or "" if udev gives it none.

    node: the file name of the node, such as "event3". what: the result of `input_class`.
    """
    number = f"-if{interface:02x}" if interface else ""
    if node.startswith("event"):
        return link("input", f"{name}{number}-event-{what}" if what else f"{name}-event-if{interface:02x}")
    return link("input", f"{name}{number}-{what}") if what else ""


def link(folder: str, name: str) -> str:
    """Returns the by-id path of a node in this folder, such as "disk", or "" if it would be too long."""
    whole = f"usb-{name}"
    return f"/dev/{folder}/by-id/{whole}" if len(whole.encode()) <= MAX_NAME else ""


def input_class(capabilities: Mapping[str, str]) -> str:
    """Returns the class that udev gives an input device: "kbd", "mouse", "joystick" or "" for any other.

    capabilities: the bitmaps "key", "rel" and "abs" as text from sysfs.
    """
    key, rel, abs_ = (bits(capabilities[name]) for name in ("key", "rel", "abs"))
    has_axes = {_X, _Y} <= abs_
    if ({_X, _Y} <= rel or has_axes) and key & set(_MOUSE_BUTTONS):
        return "mouse"
    if has_axes and key & set(_JOYSTICK_BUTTONS):
        return "joystick"
    return "kbd" if key >= set(_FULL_KEYBOARD) else ""


def bits(bitmap: str) -> frozenset[int]:
    """Returns the numbers of the bits that are set in a bitmap from sysfs, or none if the text is not a bitmap.

    The text has hexadecimal words of the size of a long, the most significant word first.
    """
    try:
        words = [int(word, 16) for word in reversed(bitmap.split()[:64])]
    except ValueError:
        return frozenset()
    return frozenset(i * _BITS + bit for i, word in enumerate(words) for bit in range(_BITS) if word >> bit & 1)


MAX_NODES = 64  # child nodes and network interfaces of one device; a webcam has about 10, a partitioned disk about 16
MAX_DIRECTORIES = 4096  # directories searched below a device; a disk has about 60
MAX_DEPTH = 12  # directory levels searched below a device; a disk's partition is 7 levels deep
_MAX_MAJOR, _MAX_MINOR = 1 << 12, 1 << 20  # exclusive bounds of a dev_t: MINORBITS of the kernel is 20
# directories that cannot contain a device node, skipped because the search runs often
_NO_DEVICES = frozenset({"power", "statistics", "queue", "queues", "mq", "capabilities", "id", "integrity", "trace"})
_NET_NAME = re.compile(r"[^\s/:]{1,15}")
_NOT_KIND = re.compile("[^a-z0-9_-]")
_MAX_KIND = 32  # characters of a kind, as in model.valid_kind
_DIGITS = re.compile(r"([0-9]+)")
_SCSI_DEVICE = re.compile(r"[0-9]+:[0-9]+:([0-9]+):([0-9]+)")


@dataclass(frozen=True, slots=True)
class DeviceNodes:
    """The device nodes and the sorted names of network interfaces of an attached device.

    nodes: the USB node first, then the child nodes sorted by path; empty if the device is gone.
    """

    nodes: tuple[DeviceNode, ...] = ()
    net: tuple[str, ...] = ()


def read_nodes(device: Path, attributes: DeviceAttributes) -> DeviceNodes:
    """Returns the nodes and network interfaces that the device has now, without those of USB devices behind it.

    A node is a child whatever its kernel subsystem is. Its kind is the name of that subsystem; a printer's node, which
    is one of usbmisc, has the kind "printer".

    device: its directory in sysfs. attributes: the attributes from which its by-id names are built.
    """
    own = _node(device, "usb")
    if own is None:
        return DeviceNodes()
    children: set[DeviceNode] = set()
    net: set[str] = set()
    for path, files in islice(_below(device), MAX_DIRECTORIES):
        if len(children) + len(net) >= MAX_NODES:
            break
        if "dev" in files and (subsystem := _subsystem(path)) not in ("", "usb"):
            child = _node(path, _NOT_KIND.sub("-", subsystem.lower())[:_MAX_KIND])
            if child is not None:
                children.add(_described(child, path, device, attributes))
        elif path.parent.name == "net" and _NET_NAME.fullmatch(path.name) and _subsystem(path) == "net":
            net.add(path.name)
    return DeviceNodes((own, *sorted(children, key=_natural)), tuple(sorted(net)))


def _below(device: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields each directory below the device with the names of its files, without USB devices behind a hub."""
    for folder, folders, files in os.walk(device):
        path = Path(folder)
        depth = len(path.parts) - len(device.parts)
        if depth and "devnum" in files:  # another USB device, behind a hub
            folders.clear()
            continue
        folders[:] = [name for name in folders if name not in _NO_DEVICES] if depth < MAX_DEPTH else []
        if depth:
            yield path, files


def _natural(node: DeviceNode) -> tuple[list[str | int], DeviceNode]:
    """Returns a sort key by which numbers in a path count as numbers: sda2 comes before sda10."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(node.path)], node


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
        if kind == "usbmisc" and name.startswith("usb/lp"):
            kind = "printer"
        return DeviceNode(f"/dev/{name}", kind, kind == "block", major, minor)
    except (OSError, KeyError, ValueError):
        return None


def _described(node: DeviceNode, path: Path, device: Path, attributes: DeviceAttributes) -> DeviceNode:
    """Returns the node with its interface, partition and by-id name added. path: its directory in sysfs."""
    interface = _interface(path, device)
    partition = _optional_number(path / "partition") or 0 if node.block else 0
    link = "" if interface is None else _by_id(node, path, interface, partition, attributes)
    return replace(node, interface=interface, partition=partition, by_id=link)


def _interface(path: Path, device: Path) -> int | None:
    """Returns the number of the USB interface that the directory belongs to, or None if there is none."""
    below = path.relative_to(device).parts[0]
    if not below.startswith(f"{device.name}:"):
        return None
    try:
        return int(text(device / below / "bInterfaceNumber"), 16) & 0xFF
    except (OSError, ValueError):
        return None


def _by_id(node: DeviceNode, path: Path, interface: int, partition: int, attributes: DeviceAttributes) -> str:
    vendor = attributes.manufacturer or f"{attributes.usb_id.vendor:04x}"
    model = attributes.model or f"{attributes.usb_id.product:04x}"
    name = serial_name(vendor, model, attributes.serial or "")
    file = node.path.rpartition("/")[2]
    match node.kind:
        case "tty":
            return serial_link(name, interface, _optional_number(path.parent.parent / "port_number"))
        case "hidraw":
            return link("input", name + (f"-if{interface:02x}" if interface else "") + "-hidraw")
        case "input":
            bitmaps = {kind: _text(path.parent / "capabilities" / kind) for kind in ("key", "rel", "abs")}
            return input_link(name, interface, file, input_class(bitmaps))
        case "video4linux":
            index = _optional_number(path / "index")
            return link("v4l", f"{name}-video-index{index}") if index is not None and file.startswith("video") else ""
        case "sound" if file.startswith("controlC"):
            return link("snd", f"{name}-{interface:02x}")
        case "block":
            disk = _disk_name(path, attributes, vendor, model)
            return link("disk", disk + (f"-part{partition}" if partition else ""))
        case _:
            return ""


def _disk_name(path: Path, attributes: DeviceAttributes, vendor: str, model: str) -> str:
    """Returns the name that udev builds for a disk: vendor and model of its SCSI device, and its target:lun."""
    scsi = next(((p, m) for p in path.parents[:5] if (m := _SCSI_DEVICE.fullmatch(p.name))), None)
    if scsi is None:
        return serial_name(vendor, model, attributes.serial or "")
    folder, address = scsi
    vendor, model = _text(folder / "vendor") or vendor, _text(folder / "model") or model
    return serial_name(vendor, model, attributes.serial or "", f"{address[1]}:{address[2]}")


def _optional_number(path: Path) -> int | None:
    found = _text(path)
    return int(found) if _NUMBER.fullmatch(found) else None
