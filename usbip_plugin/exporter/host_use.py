"""What this host itself uses of a USB device: a device in use must not be taken from its driver.

The kernel would let it go at once, with its file system mounted or its network in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from usbip_plugin.vhci.devices import DeviceNodes

MAX_MOUNTS_BYTES = 1 << 20
"""Bytes read of mountinfo and of swaps."""
_FILE_SYSTEMS = ("ext4", "xfs", "f2fs")
"""File systems that show in /sys/fs, by the name of the block device, that they are mounted, in any mount namespace."""


def in_use(nodes: DeviceNodes, sysfs: Path, proc: Path) -> str | None:
    """Returns what this host uses of a device and the cure, or None if it uses nothing.

    A disk is in use if it is mounted, is swap, or belongs to a volume (LVM, LUKS, RAID); a network interface if it is
    up. A container sees all but mounts of other namespaces whose file system does not show them in /sys/fs.
    """
    mounts, swaps = _read(proc / "self/mountinfo"), _read(proc / "swaps")
    for disk in (node for node in nodes.nodes if node.block):
        name = disk.path.rpartition("/")[2]
        if holder := next(_names(sysfs / "class/block" / name / "holders"), None):
            return f"{name} belongs to the volume {holder} of this host; close the volume"
        if disk.path in (line.partition(" ")[0] for line in swaps):
            return f"{name} is swap of this host; run: swapoff {disk.path}"
        place = _mount_point(mounts, f"{disk.major}:{disk.minor}", disk.path)
        if place is not None or _has_file_system(sysfs, name):
            return f"{name} is mounted on this host{f' at {place}' if place else ''}; unmount it"
    for interface in nodes.net:
        if _read(sysfs / "class/net" / interface / "operstate") == ["up"]:
            return f"network interface {interface} of this host is up; run: ip link set {interface} down"
    return None


def _mount_point(mounts: Iterable[str], number: str, path: str) -> str | None:
    """Returns where a block device is mounted, None if nowhere. mounts: lines of /proc/self/mountinfo, see proc(5)."""
    for line in mounts:
        fields, _, source = line.partition(" - ")
        columns, sources = fields.split(), source.split()
        if len(columns) >= 5 and (columns[2] == number or path in sources[1:2]):
            return columns[4]
    return None


def _has_file_system(sysfs: Path, name: str) -> bool:
    pools = (sysfs / "fs/btrfs").glob(f"*/devices/{name}")
    return any((sysfs / "fs" / kind / name).exists() for kind in _FILE_SYSTEMS) or any(pools)


def _names(directory: Path) -> Iterator[str]:
    try:
        return iter(sorted(path.name for path in directory.iterdir()))
    except OSError:
        return iter(())


def _read(path: Path) -> list[str]:
    try:
        with path.open(errors="replace") as file:
            return file.read(MAX_MOUNTS_BYTES).splitlines()
    except OSError:
        return []
