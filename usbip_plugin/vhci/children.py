"""The child nodes of an attached device: which nodes its interface classes lead to expect, and the wait for them.

An interface of a vendor-specific class is not expected to get a node: only the binding of a driver shows that the
kernel has one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.clock import Clock
from usbip_plugin.model import DeviceNode
from usbip_plugin.sync import Broadcast
from usbip_plugin.vhci.devices import DeviceAttributes, DeviceNodes, read_attributes, read_nodes, text
from usbip_plugin.vhci.interfaces import is_authorized
from usbip_plugin.vhci.uevents import Uevent

CLASS_AUDIO, CLASS_COMM, CLASS_HID, CLASS_PRINTER, CLASS_STORAGE, CLASS_VIDEO = 0x01, 0x02, 0x03, 0x07, 0x08, 0x0E
SUBCLASS_CONTROL = 0x01  # the control interface of audio and video; only this interface of the function gets a node
SUBCLASS_ACM = 0x02  # Abstract Control Model of CLASS_COMM: a serial port (cdc-acm)
_KINDS_OF_CLASS = {CLASS_STORAGE: {"block"}, CLASS_HID: {"hidraw", "input"}, CLASS_PRINTER: {"printer"}}
_KINDS_OF_SUBCLASS = {
    (CLASS_COMM, SUBCLASS_ACM): {"tty"},
    (CLASS_AUDIO, SUBCLASS_CONTROL): {"sound"},
    (CLASS_VIDEO, SUBCLASS_CONTROL): {"video4linux"},
}


@dataclass(frozen=True, order=True, slots=True)
class ExpectedNode:
    """A USB interface (bInterfaceNumber) for which the kernel is expected to create a node of one of these kinds."""

    interface: int
    kinds: frozenset[str]


def expected_nodes(device: Path) -> tuple[ExpectedNode, ...]:
    """Returns the expected nodes of a device's readable interfaces, sorted by number. device: its sysfs directory.

    An interface that is not authorised gets no node.
    """
    found = []
    for interface in device.glob(f"{device.name}:*"):
        if not is_authorized(interface):
            continue
        try:
            number, class_, subclass = (
                int(text(interface / name), 16)
                for name in ("bInterfaceNumber", "bInterfaceClass", "bInterfaceSubClass")
            )
        except (OSError, ValueError):
            continue
        if kinds := _KINDS_OF_CLASS.get(class_) or _KINDS_OF_SUBCLASS.get((class_, subclass)):
            found.append(ExpectedNode(number, frozenset(kinds)))
    return tuple(sorted(found, key=lambda expected: expected.interface))


def kinds_of(nodes: Collection[DeviceNode]) -> frozenset[str]:
    """Returns the kinds of the nodes. A printer's node counts as "printer" and as "usbmisc"."""
    kinds = {node.kind for node in nodes}
    return frozenset(kinds | {"usbmisc"} if "printer" in kinds else kinds)


def wants(kinds: tuple[str, ...] | None, node: DeviceNode) -> bool:
    """Returns whether a resource whose `children` are these kinds includes the node. None includes every node."""
    return kinds is None or bool(kinds_of((node,)) & set(kinds))


def missing(asked: tuple[str, ...] | None, nodes: Collection[DeviceNode]) -> tuple[str, ...]:
    """Returns all requested kinds if no node is of any of them, otherwise an empty tuple.

    One match is enough: a resource with several device models may list the kinds of all of them.
    """
    return () if not asked or kinds_of(nodes) & set(asked) else tuple(asked)


def complete(asked: tuple[str, ...] | None, expected: Collection[ExpectedNode], nodes: Collection[DeviceNode]) -> bool:
    """Returns whether all nodes to wait for are there: each expected one.

    If kinds are requested, these are a node of at least one of them, and the relevant expected nodes.
    """
    if missing(asked, nodes):
        return False
    there = {(node.interface, node.kind) for node in nodes}
    return all(any((node.interface, kind) in there for kind in node.kinds) for node in relevant(asked, expected))


def relevant(asked: tuple[str, ...] | None, expected: Collection[ExpectedNode]) -> tuple[ExpectedNode, ...]:
    """Returns the expected nodes that can be of a requested kind."""
    return tuple(node for node in expected if asked is None or not node.kinds.isdisjoint(asked))


CHILD_RECHECK_S = 0.25  # seconds between checks for child nodes; needed only where uevents are unavailable
QUIET_S = 0.2  # seconds without a new node after which a driver that was late has made all; most make them at once


class Children:
    """The wait for the child nodes of a device that has just enumerated.

    Checks whenever `changed` fires. The caller must pass every uevent to `note_disk` before it fires `changed` for it.
    """

    def __init__(self, clock: Clock, changed: Broadcast) -> None:
        self._clock = clock
        self._changed = changed
        self._read: set[tuple[int, int]] = set()

    def note_disk(self, event: Uevent) -> None:
        """Notes that the kernel has read the partition table of a disk. Ignores uevents of anything else.

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

    async def wait(
        self, device: Path, attributes: DeviceAttributes, asked: tuple[str, ...] | None, limit: float
    ) -> DeviceNodes:
        """Returns the nodes of the device as soon as they are complete (see `complete`), or after limit seconds.

        Waits also for the partitions of a disk, unless only kinds other than "block" are requested. Where no interface
        class says which nodes of the requested kinds come, the first late one may not be the last: waits until none has
        come for QUIET_S. Returns no nodes once the device of these attributes is gone, even if another device has taken
        its place. Cancel-safe.
        """
        before: tuple[DeviceNode, ...] | None = None
        quiet_at = 0.0

        def check() -> DeviceNodes | None:
            nonlocal before, quiet_at
            found = self._nodes(device, attributes)
            expected = expected_nodes(device)
            if found.nodes != before:
                known = before is None or not asked or relevant(asked, expected)
                before, quiet_at = found.nodes, 0.0 if known else self._clock.monotonic() + QUIET_S
            done = (
                complete(asked, expected, found.nodes)
                and ((asked is not None and "block" not in asked) or self._disks_read(found.nodes))
                and self._clock.monotonic() >= quiet_at
            )
            return found if done or not found.nodes else None

        try:
            return await self._changed.until_within(check, self._clock, timeout=limit, recheck=CHILD_RECHECK_S)
        except TimeoutError:
            return self._nodes(device, attributes)

    def _disks_read(self, nodes: tuple[DeviceNode, ...]) -> bool:
        disks = [node for node in nodes if node.block and node.partition == 0]
        return all((disk.major, disk.minor) in self._read for disk in disks)

    @staticmethod
    def _nodes(device: Path, attributes: DeviceAttributes) -> DeviceNodes:
        found = read_nodes(device, attributes)
        now = read_attributes(device, strings=False)
        return found if now is not None and now.is_same_device(attributes) else DeviceNodes()
