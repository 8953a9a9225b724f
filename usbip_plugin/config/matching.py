"""Which devices a selector names. Pure."""

from __future__ import annotations

import enum
import fnmatch

from usbip_plugin.config.schema import Selector
from usbip_plugin.model import Descriptor

_GLOB_CHARACTERS = frozenset("*?[")


class Match(enum.Enum):
    """NEEDS_SERIAL: everything else agrees and the device's serial number is not known yet."""

    NO = "no"
    YES = "yes"
    NEEDS_SERIAL = "needs serial"


def matches(selector: Selector, descriptor: Descriptor, serial: str | None) -> Match:
    """Whether the selector names this device.

    serial None means not known (yet); a device known to have none is "". A class agrees with the device's class or
    with that of any interface; an IMPORT reply carries no interfaces, so match against DEVLIST entries.
    """
    if selector.vendor is not None and selector.vendor != descriptor.usb_id.vendor:
        return Match.NO
    if selector.product is not None and selector.product != descriptor.usb_id.product:
        return Match.NO
    if selector.bus_id is not None and not fnmatch.fnmatchcase(descriptor.busid, selector.bus_id):
        return Match.NO
    if selector.class_ is not None and selector.class_ not in {
        descriptor.device_class,
        *(interface.class_ for interface in descriptor.interfaces),
    }:
        return Match.NO
    if selector.serial is None:
        return Match.YES
    if serial is None:
        return Match.NEEDS_SERIAL
    return Match.YES if serial == selector.serial else Match.NO


def may_overlap(one: Selector, other: Selector) -> bool:
    """Whether one device could be named by both, as far as the selectors tell. Two different classes count as apart,
    although a composite device may have both.
    """
    for mine, theirs in (
        (one.vendor, other.vendor),
        (one.product, other.product),
        (one.serial, other.serial),
        (one.class_, other.class_),
    ):
        if mine is not None and theirs is not None and mine != theirs:
            return False
    if one.bus_id is None or other.bus_id is None or one.bus_id == other.bus_id:
        return True
    one_glob, other_glob = bool(_GLOB_CHARACTERS & set(one.bus_id)), bool(_GLOB_CHARACTERS & set(other.bus_id))
    if one_glob and other_glob:
        return True
    return fnmatch.fnmatchcase(one.bus_id, other.bus_id) or fnmatch.fnmatchcase(other.bus_id, one.bus_id)
