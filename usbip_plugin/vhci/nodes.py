"""From a USB device's directory in sysfs to its device nodes. Reads sysfs only: the plugin has no /dev."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.model import DeviceNode
from usbip_plugin.vhci import by_id
from usbip_plugin.vhci.facts import DeviceFacts, number, read_facts, text

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
class Found:
    """The USB node, then child nodes by path, none if the device is gone; and its network interfaces, by name."""

    nodes: tuple[DeviceNode, ...] = ()
    net: tuple[str, ...] = ()


def survey(device: Path, facts: DeviceFacts) -> Found:
    """What a device of these facts has by now. Other USB devices below it are left out."""
    own = _node(device, "usb")
    if own is None:
        return Found()
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
    return Found((own, *sorted(children, key=_natural)), tuple(sorted(net)))


def collect(device: Path) -> tuple[DeviceNode, ...]:
    """The nodes alone."""
    facts = read_facts(device)
    return () if facts is None else survey(device, facts).nodes


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
    name = by_id.serial_name(vendor, model, facts.serial or "")
    file = node.path.rpartition("/")[2]
    match node.kind:
        case "tty":
            return by_id.serial_link(name, interface, _number(path.parent.parent / "port_number"))
        case "hidraw":
            return by_id.hidraw_link(name, interface)
        case "input":
            return by_id.input_link(name, interface, file, by_id.input_class(_capabilities(path.parent)))
        case "video4linux":
            index = _number(path / "index")
            return by_id.video_link(name, index) if index is not None and file.startswith("video") else ""
        case "sound" if file.startswith("controlC"):
            return by_id.sound_link(name, interface)
        case "block":
            return by_id.disk_link(_disk_name(path, facts, vendor, model), partition)
        case _:
            return ""


def _disk_name(path: Path, facts: DeviceFacts, vendor: str, model: str) -> str:
    """A disk is called by what its SCSI device says, and by which of its target's it is."""
    scsi = next(((p, m) for p in path.parents[:5] if (m := _SCSI_DEVICE.fullmatch(p.name))), None)
    if scsi is None:
        return by_id.serial_name(vendor, model, facts.serial or "")
    folder, place = scsi
    with contextlib.suppress(OSError):
        vendor, model = text(folder / "vendor") or vendor, text(folder / "model") or model
    return by_id.serial_name(vendor, model, facts.serial or "", f"{place[1]}:{place[2]}")


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
