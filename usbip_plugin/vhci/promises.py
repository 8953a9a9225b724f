"""Which child nodes a device is to be waited for: what its interfaces promise, and what a resource asks for. Pure.

A class of interfaces that the kernel has a driver for promises a node. One of a vendor's own promises none: whether a
driver knows it, the kernel only says by binding one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.model import DeviceNode
from usbip_plugin.vhci.facts import text

CLASS_AUDIO, CLASS_COMM, CLASS_HID, CLASS_PRINTER, CLASS_STORAGE, CLASS_VIDEO = 0x01, 0x02, 0x03, 0x07, 0x08, 0x0E
SUBCLASS_CONTROL = 0x01  # of audio and of video: the others of the function have no node of their own
SUBCLASS_ACM = 0x02


@dataclass(frozen=True, order=True, slots=True)
class Promise:
    """An interface that is to bring a node of one of these kinds."""

    interface: int
    kinds: frozenset[str]


def promises(device: Path) -> tuple[Promise, ...]:
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
            found.append(Promise(number, kinds))
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


def complete(asked: tuple[str, ...] | None, promised: Collection[Promise], nodes: Collection[DeviceNode]) -> bool:
    """Whether a kind asked for is there, and a node of each interface that promises one of those; if nothing is asked
    for, of each that promises any.
    """
    if missing(asked, nodes):
        return False
    there = {(node.interface, node.kind) for node in nodes}
    wanted = None if asked is None else frozenset(asked)
    relevant = (promise for promise in promised if wanted is None or promise.kinds & wanted)
    return all(any((promise.interface, kind) in there for kind in promise.kinds) for promise in relevant)
