"""The child nodes of an attached device: which nodes its interface classes lead to expect, and the wait for them.

An interface of a class that the kernel has a driver for is expected to get a node. A vendor-specific interface is not:
only the binding of a driver shows that the kernel has one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.clock import Clock
from usbip_plugin.model import DeviceNode
from usbip_plugin.sync import Bell
from usbip_plugin.vhci.devices import DeviceFacts, DeviceNodes, read_facts, read_nodes, text
from usbip_plugin.vhci.uevents import Uevent

CLASS_AUDIO, CLASS_COMM, CLASS_HID, CLASS_PRINTER, CLASS_STORAGE, CLASS_VIDEO = 0x01, 0x02, 0x03, 0x07, 0x08, 0x0E
SUBCLASS_CONTROL = 0x01  # the control interface of audio and video; only this interface of the function gets a node
SUBCLASS_ACM = 0x02  # Abstract Control Model of CLASS_COMM: a serial port (cdc-acm)


@dataclass(frozen=True, order=True, slots=True)
class ExpectedNode:
    """A USB interface for which the kernel is expected to create a device node.

    interface: the bInterfaceNumber.
    kinds: the possible kinds of the node; one node of any of them is enough.
    """

    interface: int
    kinds: frozenset[str]


def expected_nodes(device: Path) -> tuple[ExpectedNode, ...]:
    """Returns what the interfaces of a device lead to expect, sorted by interface number.

    device: the device's directory in sysfs. Interfaces that cannot be read are left out.
    """
    found = []
    for interface in device.glob(f"{device.name}:*"):
        try:
            number, class_, subclass = (
                int(text(interface / name), 16)
                for name in ("bInterfaceNumber", "bInterfaceClass", "bInterfaceSubClass")
            )
        except (OSError, ValueError):
            continue
        if kinds := _kinds(class_, subclass):
            found.append(ExpectedNode(number, kinds))
    return tuple(sorted(found, key=lambda promise: promise.interface))


def _kinds(class_: int, subclass: int) -> frozenset[str]:
    match class_, subclass:
        case _ if class_ == CLASS_STORAGE:
            return frozenset({"block"})
        case _ if class_ == CLASS_HID:
            return frozenset({"hidraw", "input"})
        case _ if class_ == CLASS_PRINTER:
            return frozenset({"printer"})
        case _ if (class_, subclass) == (CLASS_COMM, SUBCLASS_ACM):
            return frozenset({"tty"})
        case _ if (class_, subclass) == (CLASS_AUDIO, SUBCLASS_CONTROL):
            return frozenset({"sound"})
        case _ if (class_, subclass) == (CLASS_VIDEO, SUBCLASS_CONTROL):
            return frozenset({"video4linux"})
        case _:
            return frozenset()


def kinds_of(nodes: Collection[DeviceNode]) -> frozenset[str]:
    """Returns the kinds of the nodes. A printer's node counts as "printer" and as "usbmisc"."""
    kinds = {node.kind for node in nodes}
    return frozenset(kinds | {"usbmisc"} if "printer" in kinds else kinds)


def wants(kinds: tuple[str, ...] | None, node: DeviceNode) -> bool:
    """Returns whether a resource whose `children` are these kinds includes the node. None includes every node."""
    return kinds is None or bool(kinds_of((node,)) & set(kinds))


def missing(asked: tuple[str, ...] | None, nodes: Collection[DeviceNode]) -> tuple[str, ...]:
    """Returns all requested kinds if no node is of any of them, otherwise an empty tuple.

    A single match is enough: a resource with several device models may list the kinds of all of them.
    """
    return () if not asked or kinds_of(nodes) & set(asked) else tuple(asked)


def complete(asked: tuple[str, ...] | None, promised: Collection[ExpectedNode], nodes: Collection[DeviceNode]) -> bool:
    """Returns whether all nodes to wait for are there.

    If kinds are requested, a node of at least one of them must exist. In addition, each interface in `promised` must
    have its node; with requested kinds, this holds only for interfaces that are expected to bring one of those kinds.
    """
    if missing(asked, nodes):
        return False
    there = {(node.interface, node.kind) for node in nodes}
    wanted = None if asked is None else frozenset(asked)
    relevant = (promise for promise in promised if wanted is None or promise.kinds & wanted)
    return all(any((promise.interface, kind) in there for kind in promise.kinds) for promise in relevant)


CHILD_RECHECK_S = 0.25  # seconds between checks for child nodes; needed only where uevents are unavailable


class Children:
    """The wait for the child nodes of a device that has just enumerated.

    Checks whenever the bell rings. The caller must pass every uevent to `heard` before it rings the bell for it.
    """

    def __init__(self, clock: Clock, bell: Bell) -> None:
        self._clock = clock
        self._bell = bell
        self._read: set[tuple[int, int]] = set()

    def heard(self, event: Uevent) -> None:
        """Notes which disks have had their partition table read, and ignores all other uevents.

        The kernel sends the "add" uevent of a disk after it has read the table (block/genhd.c: device_add_disk).
        """
        if event.fields.get("SUBSYSTEM") != "block" or event.fields.get("DEVTYPE") != "disk":
            return
        try:
            numbers = int(event.fields["MAJOR"]), int(event.fields["MINOR"])
        except (KeyError, ValueError):
            return
        if event.action == "remove":
            self._read.discard(numbers)
        elif event.action == "add":
            self._read.add(numbers)

    async def wait(self, device: Path, facts: DeviceFacts, asked: tuple[str, ...] | None, limit: float) -> DeviceNodes:
        """Returns the nodes of the device as soon as they are complete (see `complete`), or after limit seconds.

        Waits also for the partitions of a disk, unless only kinds other than "block" are requested. Returns no nodes
        once the device of these facts is gone, even if another device has taken its place. Cancel-safe.
        """

        def look() -> DeviceNodes | None:
            found = self._survey(device, facts)
            done = complete(asked, expected_nodes(device), found.nodes) and (
                (asked is not None and "block" not in asked) or self._disks_read(found.nodes)
            )
            return found if done or not found.nodes else None

        try:
            return await self._bell.until(look, self._clock, timeout=limit, recheck=CHILD_RECHECK_S)
        except TimeoutError:
            return self._survey(device, facts)

    def _disks_read(self, nodes: tuple[DeviceNode, ...]) -> bool:
        disks = [node for node in nodes if node.block and node.partition == 0]
        return all((disk.major, disk.minor) in self._read for disk in disks)

    @staticmethod
    def _survey(device: Path, facts: DeviceFacts) -> DeviceNodes:
        found = read_nodes(device, facts)
        now = read_facts(device)
        same = now is not None and (now.devnum, now.usb_id) == (facts.devnum, facts.usb_id)
        return found if same else DeviceNodes()
