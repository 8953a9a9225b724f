"""The child nodes of an attached device: which the interface classes promise, and waiting for them."""

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
SUBCLASS_CONTROL = 0x01  # of audio and of video: the others of the function have no node of their own
SUBCLASS_ACM = 0x02


@dataclass(frozen=True, order=True, slots=True)
class ExpectedNode:
    """An interface that is to bring a node of one of these kinds."""

    interface: int
    kinds: frozenset[str]


def expected_nodes(device: Path) -> tuple[ExpectedNode, ...]:
    """Those of a device's interfaces, by their numbers."""
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
    """The kinds that are there. A printer's node is one of usbmisc, too."""
    kinds = {node.kind for node in nodes}
    return frozenset(kinds | {"usbmisc"} if "printer" in kinds else kinds)


def wants(kinds: tuple[str, ...] | None, node: DeviceNode) -> bool:
    """Whether a resource with these children wants the node; None wants all."""
    return kinds is None or bool(kinds_of((node,)) & set(kinds))


def missing(asked: tuple[str, ...] | None, nodes: Collection[DeviceNode]) -> tuple[str, ...]:
    """The kinds asked for, if no node is of any: a resource may list what its devices have between them."""
    return () if not asked or kinds_of(nodes) & set(asked) else tuple(asked)


def complete(asked: tuple[str, ...] | None, promised: Collection[ExpectedNode], nodes: Collection[DeviceNode]) -> bool:
    """Whether a kind asked for is there, and a node of each interface that promises one of those; if nothing is asked
    for, of each that promises any.
    """
    if missing(asked, nodes):
        return False
    there = {(node.interface, node.kind) for node in nodes}
    wanted = None if asked is None else frozenset(asked)
    relevant = (promise for promise in promised if wanted is None or promise.kinds & wanted)
    return all(any((promise.interface, kind) in there for kind in promise.kinds) for promise in relevant)


CHILD_RECHECK_S = 0.25  # children have uevents; this is for a node without netlink


class Children:
    """Looks whenever the bell rings. heard() is to be told every uevent before the bell rings for it."""

    def __init__(self, clock: Clock, bell: Bell) -> None:
        self._clock = clock
        self._bell = bell
        self._read: set[tuple[int, int]] = set()

    def heard(self, event: Uevent) -> None:
        """A disk is announced when its partition table has been read (block/genhd.c: device_add_disk)."""
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
        """What the device has, as soon as all that is waited for is there (promises.complete), or after limit seconds.

        A disk's partitions are waited for with the disk. Empty once the device of these facts is gone, although
        another may stand in its place. Cancel-safe.
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
