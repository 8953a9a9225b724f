"""An attached device in sysfs: its descriptors, device nodes and the names that udev's rules would give them."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.model import DeviceNode, UsbId

MAX_STRING = 126  # characters a USB string descriptor can hold
_USB_ID = re.compile("[0-9a-fA-F]{4}")
_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """An enumerated USB device. devnum tells one enumeration on a bus from the next.

    serial, manufacturer, model: None if it has none, or none that can be printed: the device chose it.
    """

    usb_id: UsbId
    devnum: int
    authorized: bool
    serial: str | None
    manufacturer: str | None = None
    model: str | None = None


def read_facts(device: Path) -> DeviceFacts | None:
    """None while the directory is not complete, or gone."""
    try:
        usb_id = UsbId(_usb_number(device / "idVendor"), _usb_number(device / "idProduct"))
        devnum = number(text(device / "devnum"))
        authorized = text(device / "authorized") != "0"
        text(device / "dev")
    except (OSError, ValueError):
        return None
    serial, manufacturer, model = (_string(device / name) for name in ("serial", "manufacturer", "product"))
    return DeviceFacts(usb_id, devnum, authorized, serial, manufacturer, model)


def text(path: Path) -> str:
    """An attribute, without the white space around it. OSError."""
    return path.read_text(errors="replace").strip()


def number(digits: str) -> int:
    """ValueError for what is no decimal number of at most nine digits."""
    if not _NUMBER.fullmatch(digits):
        raise ValueError(digits[:80])
    return int(digits)


def _string(path: Path) -> str | None:
    try:
        found = text(path)[:MAX_STRING]
    except OSError:
        return None
    return found if found and found.isprintable() else None


def _usb_number(path: Path) -> int:
    found = text(path)
    if not _USB_ID.fullmatch(found):
        raise ValueError(found[:80])
    return int(found, 16)


MAX_PART = 63  # characters of vendor and of model
MAX_NAME = 255  # of the whole, as of any file's name
_SPACE = re.compile(r"\s+")
_BITS = 8 * struct.calcsize("l")  # of each word of a bitmap in sysfs
_FULL_KEYBOARD = range(1, 32)  # Escape, digits and Q to D
_MOUSE_BUTTONS = range(0x110, 0x118)
_JOYSTICK_BUTTONS = range(0x120, 0x140)
_X, _Y = 0, 1


def serial_name(vendor: str, model: str, serial: str, instance: str = "") -> str:
    """udev's ID_SERIAL. vendor, model: their strings, or four digits each; serial: "" for none.

    instance: target:lun of a disk.
    """
    parts = [_part(vendor), _part(model)]
    if serial and all(" " <= c <= "\x7f" and c != "," for c in serial):
        parts.append(_part(serial, MAX_NAME))
    return ("_".join(parts) + (f"-{instance}" if instance else ""))[:MAX_NAME]


def _part(text: str, longest: int = MAX_PART) -> str:
    return "".join(c if _kept(c) else "_" for c in _SPACE.sub("_", text.strip())[:longest])


def _kept(c: str) -> bool:
    if c.isascii():
        return c.isalnum() or c in "#+-.:=@_"
    return c.isprintable()


def serial_link(name: str, interface: int, port: int | None) -> str:
    """Of a ttyUSB or ttyACM. port: of a converter with several, None for a ttyACM."""
    return _link("serial", f"{name}-if{interface:02x}" + ("" if port is None else f"-port{port}"))


def input_link(name: str, interface: int, node: str, what: str) -> str:
    """Of an event, mouse or js node; node: its file's name, what: see input_class. "" if it has none."""
    place = "" if interface == 0 else f"-if{interface:02x}"
    if node.startswith("event"):
        return _link("input", f"{name}{place}-event-{what}" if what else f"{name}-event-if{interface:02x}")
    return _link("input", f"{name}{place}-{what}") if what else ""


def hidraw_link(name: str, interface: int) -> str:
    """Of a hidraw node."""
    return _link("input", name + ("" if interface == 0 else f"-if{interface:02x}") + "-hidraw")


def video_link(name: str, index: int) -> str:
    """Of a videoN. index: which of its device's."""
    return _link("v4l", f"{name}-video-index{index}")


def disk_link(name: str, partition: int) -> str:
    """Of a disk, or of one of its partitions."""
    return _link("disk", name + (f"-part{partition}" if partition else ""))


def sound_link(name: str, interface: int) -> str:
    """Of a controlCN; pcm and midi nodes have none."""
    return _link("snd", f"{name}-{interface:02x}")


def _link(folder: str, name: str) -> str:
    whole = f"usb-{name}"
    return f"/dev/{folder}/by-id/{whole}" if len(whole.encode()) <= MAX_NAME else ""


def input_class(capabilities: Mapping[str, str]) -> str:
    """kbd, mouse, joystick or "", from the bitmaps of an input device: key, rel and abs, as sysfs writes them."""
    key, rel, abs_ = (bits(capabilities.get(name, "")) for name in ("key", "rel", "abs"))
    has_axes = {_X, _Y} <= abs_
    if ({_X, _Y} <= rel or has_axes) and key & set(_MOUSE_BUTTONS):
        return "mouse"
    if has_axes and key & set(_JOYSTICK_BUTTONS):
        return "joystick"
    return "kbd" if key >= set(_FULL_KEYBOARD) else ""


def bits(bitmap: str) -> frozenset[int]:
    """The numbers set in a bitmap: words in hexadecimal, the highest first. Empty if it is none."""
    try:
        words = [int(word, 16) for word in reversed(bitmap.split()[:64])]
    except ValueError:
        return frozenset()
    return frozenset(i * _BITS + bit for i, word in enumerate(words) for bit in range(_BITS) if word >> bit & 1)


CHILD_KINDS = frozenset({"tty", "hidraw", "input", "video4linux", "sound", "block", "usbmisc"})
"""Subsystems whose nodes are children. Of usbmisc, a printer's are a kind of their own."""

MAX_NODES = 64  # of one device; a webcam has about 10, a partitioned disk about 16
MAX_DEPTH = 12  # levels below the device; a disk's partition is 7 deep
_MAX_MAJOR, _MAX_MINOR = 1 << 12, 1 << 20  # MINORBITS of the kernel
_NO_DEVICES = frozenset({"power", "statistics", "queue", "queues", "mq", "capabilities", "id", "integrity", "trace"})
_NET_NAME = re.compile(r"[^\s/:]{1,15}")
_DIGITS = re.compile(r"([0-9]+)")
_SCSI_DEVICE = re.compile(r"[0-9]+:[0-9]+:([0-9]+):([0-9]+)")


@dataclass(frozen=True, slots=True)
class DeviceNodes:
    """The USB node, then child nodes by path, none if the device is gone; and its network interfaces, by name."""

    nodes: tuple[DeviceNode, ...] = ()
    net: tuple[str, ...] = ()


def read_nodes(device: Path, facts: DeviceFacts) -> DeviceNodes:
    """What a device of these facts has by now. Other USB devices below it are left out."""
    own = _node(device, "usb")
    if own is None:
        return DeviceNodes()
    children: set[DeviceNode] = set()
    net: set[str] = set()
    for path, files in _below(device):
        if len(children) + len(net) >= MAX_NODES:
            break
        if "dev" in files and (subsystem := _subsystem(path)) in CHILD_KINDS:
            child = _node(path, subsystem)
            if child is not None:
                children.add(_described(child, path, device, facts))
        elif path.parent.name == "net" and _NET_NAME.fullmatch(path.name) and _subsystem(path) == "net":
            net.add(path.name)
    return DeviceNodes((own, *sorted(children, key=_natural)), tuple(sorted(net)))


def collect(device: Path) -> tuple[DeviceNode, ...]:
    """The nodes alone."""
    facts = read_facts(device)
    return () if facts is None else read_nodes(device, facts).nodes


def _below(device: Path) -> Iterator[tuple[Path, list[str]]]:
    """Directories of the device, not of other USB devices behind it, and the files in each. It is looked at often."""
    root_depth = len(device.parts)
    for folder, folders, files in os.walk(device):
        path = Path(folder)
        if path == device:
            folders[:] = [name for name in folders if name not in _NO_DEVICES]
            continue
        if "devnum" in files:  # another USB device, behind a hub
            folders.clear()
            continue
        if len(path.parts) - root_depth >= MAX_DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if name not in _NO_DEVICES]
        yield path, files


def _natural(node: DeviceNode) -> tuple[list[str | int], DeviceNode]:
    """sda2 comes before sda10."""
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
        major, minor = number(fields["MAJOR"]), number(fields["MINOR"])
        if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
            return None
        if major >= _MAX_MAJOR or minor >= _MAX_MINOR:
            return None
        if kind == "usbmisc" and name.startswith("usb/lp"):
            kind = "printer"
        return DeviceNode(f"/dev/{name}", kind, kind == "block", major, minor)
    except (OSError, KeyError, ValueError):
        return None


def _described(node: DeviceNode, path: Path, device: Path, facts: DeviceFacts) -> DeviceNode:
    """The same with what its place in sysfs says of it: its interface, its partition, its name by udev's rules."""
    interface = _interface(path, device)
    partition = _number(path / "partition") or 0 if node.block else 0
    link = "" if interface is None else _by_id(node, path, interface, partition, facts)
    return DeviceNode(node.path, node.kind, node.block, node.major, node.minor, interface, partition, link)


def _interface(path: Path, device: Path) -> int | None:
    """The number of the interface that the directory belongs to."""
    below = path.relative_to(device).parts[0]
    if not below.startswith(f"{device.name}:"):
        return None
    try:
        return int(text(device / below / "bInterfaceNumber"), 16) & 0xFF
    except (OSError, ValueError):
        return None


def _by_id(node: DeviceNode, path: Path, interface: int, partition: int, facts: DeviceFacts) -> str:
    vendor = facts.manufacturer or f"{facts.usb_id.vendor:04x}"
    model = facts.model or f"{facts.usb_id.product:04x}"
    name = serial_name(vendor, model, facts.serial or "")
    file = node.path.rpartition("/")[2]
    match node.kind:
        case "tty":
            return serial_link(name, interface, _number(path.parent.parent / "port_number"))
        case "hidraw":
            return hidraw_link(name, interface)
        case "input":
            return input_link(name, interface, file, input_class(_capabilities(path.parent)))
        case "video4linux":
            index = _number(path / "index")
            return video_link(name, index) if index is not None and file.startswith("video") else ""
        case "sound" if file.startswith("controlC"):
            return sound_link(name, interface)
        case "block":
            return disk_link(_disk_name(path, facts, vendor, model), partition)
        case _:
            return ""


def _disk_name(path: Path, facts: DeviceFacts, vendor: str, model: str) -> str:
    """A disk is called by what its SCSI device says, and by which of its target's it is."""
    scsi = next(((p, m) for p in path.parents[:5] if (m := _SCSI_DEVICE.fullmatch(p.name))), None)
    if scsi is None:
        return serial_name(vendor, model, facts.serial or "")
    folder, place = scsi
    with contextlib.suppress(OSError):
        vendor, model = text(folder / "vendor") or vendor, text(folder / "model") or model
    return serial_name(vendor, model, facts.serial or "", f"{place[1]}:{place[2]}")


def _capabilities(device: Path) -> dict[str, str]:
    found = {}
    for name in ("key", "rel", "abs"):
        with contextlib.suppress(OSError):
            found[name] = text(device / "capabilities" / name)
    return found


def _number(path: Path) -> int | None:
    try:
        return number(text(path))
    except (OSError, ValueError):
        return None
