"""Which devices a selector names. Pure."""

from __future__ import annotations

import enum
import fnmatch

from usbip_plugin.config.schema import Selector, several
from usbip_plugin.model import UNTOLD, Descriptor, Identity, UsbId

_GLOB_CHARACTERS = frozenset("*?[")


class Match(enum.Enum):
    """NEEDS_PROBE: all that is known agrees, and the device must be asked for its serial number or interfaces."""

    NO = "no"
    YES = "yes"
    NEEDS_PROBE = "needs probe"


def matches(selector: Selector, descriptor: Descriptor, told: Identity = UNTOLD) -> Match:
    """Whether the selector names this device, of which told is known besides.

    A class agrees with the device's class or with that of any interface. A DEVLIST entry has none of them for a device
    that nobody has configured yet, and an IMPORT reply never has.
    """
    serial = selector.serial
    # first what tells most apart: of hundreds of devices by serial number each is compared with each selector
    if serial is not None and told.serial != serial and told.serial is not None:
        return Match.NO
    if not _has(selector, descriptor.usb_id):
        return Match.NO
    if selector.bus_id is not None and not any(
        fnmatch.fnmatchcase(descriptor.busid, pattern) for pattern in several(selector.bus_id)
    ):
        return Match.NO
    known = serial is None or told.serial is not None
    if selector.class_ is not None and selector.class_ != descriptor.device_class:
        interfaces = descriptor.interfaces or told.interfaces
        if interfaces is None:
            return Match.NEEDS_PROBE
        if selector.class_ not in {interface.class_ for interface in interfaces}:
            return Match.NO
    return Match.YES if known else Match.NEEDS_PROBE


def may_overlap(one: Selector, other: Selector) -> bool:
    """Whether one device could be named by both, as far as the selectors tell. Two different classes count as apart,
    although a composite device may have both.
    """
    for mine, theirs in ((one.serial, other.serial), (one.class_, other.class_)):
        if mine is not None and theirs is not None and mine != theirs:
            return False
    return _ids_may_overlap(one, other) and _bus_ids_may_overlap(several(one.bus_id), several(other.bus_id))


def _ids_may_overlap(one: Selector, other: Selector) -> bool:
    if _apart(several(one.vendor), several(other.vendor)) or _apart(several(one.product), several(other.product)):
        return False
    if not one.usb_ids and not other.usb_ids:
        return True
    return any(_has(one, usb_id) and _has(other, usb_id) for usb_id in one.usb_ids or other.usb_ids)


def _apart(ones: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return bool(ones) and bool(others) and set(ones).isdisjoint(others)


def _has(selector: Selector, usb_id: UsbId) -> bool:
    return (
        _agrees(selector.vendor, usb_id.vendor)
        and _agrees(selector.product, usb_id.product)
        and (not selector.usb_ids or usb_id in selector.usb_ids)
    )


def _agrees(wanted: int | tuple[int, ...] | None, value: int) -> bool:
    return wanted is None or wanted == value or (isinstance(wanted, tuple) and value in wanted)


def _bus_ids_may_overlap(ones: tuple[str, ...], others: tuple[str, ...]) -> bool:
    return not ones or not others or any(_bus_id_may_overlap(one, other) for one in ones for other in others)


def _bus_id_may_overlap(one: str, other: str) -> bool:
    if one == other:
        return True
    if _GLOB_CHARACTERS & set(one) and _GLOB_CHARACTERS & set(other):
        return True
    return fnmatch.fnmatchcase(one, other) or fnmatch.fnmatchcase(other, one)
