"""Where a lost device is now, when its server does not list it under its own bus id any more. Pure.

It is known by its vendor:product and its serial number. DEVLIST carries no serial numbers, and what a lock's annotation
says may be of a device that stood there before. It is believed only as far as a mistake does no harm: what seems to be
the device is compared once more when it has enumerated, and that none of them is it is said only when all are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from usbip_plugin.model import Descriptor, DeviceKey


@dataclass(frozen=True, slots=True)
class Reading:
    """A serial number as a device told it. devid: see Descriptor, None for whatever is listed there.

    until: on the monotonic clock; not every server numbers devices anew.
    """

    devid: int | None
    serial: str
    until: float

    def holds(self, descriptor: Descriptor, now: float) -> bool:
        """Whether it is of the device that is listed so."""
        return now < self.until and self.devid in (None, descriptor.devid)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A listed device of the same kind. serial: None if it is not known; sure: it was read from this very device."""

    key: DeviceKey
    descriptor: Descriptor
    serial: str | None
    sure: bool


@dataclass(frozen=True, slots=True)
class Found:
    key: DeviceKey


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Several devices tell this serial number."""

    keys: tuple[DeviceKey, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Nothing can be said before the serial numbers of these have been read."""

    sightings: tuple[Sighting, ...]


@dataclass(frozen=True, slots=True)
class Nowhere:
    """None of the listed devices is it."""


Verdict = Found | Ambiguous | Ask | Nowhere


def decide(serial: str, sightings: Iterable[Sighting]) -> Verdict:
    """Which of these is the device with this serial number."""
    seen = tuple(sightings)
    same = [sighting for sighting in seen if sighting.serial == serial]
    match len(same):
        case 0:
            ask = [sighting for sighting in seen if not sighting.sure]
        case 1:
            ask = [sighting for sighting in seen if sighting.serial is None]
        case _:
            ask = [sighting for sighting in same if not sighting.sure]
    if ask:
        return Ask(tuple(ask))
    if len(same) == 1:
        return Found(same[0].key)
    return Ambiguous(tuple(sorted(sighting.key for sighting in same))) if same else Nowhere()
