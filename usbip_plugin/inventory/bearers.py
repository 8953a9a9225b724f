"""Who bears a serial number that a selector promises: one device, wherever it is plugged in. Pure.

Two that tell the same are clones, or a selector that names too much: neither is given out as the device. A device that
somebody uses bears its number too: whoever has lost it for the moment is to find it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from usbip_plugin.inventory.facts import Facts, Seen
from usbip_plugin.inventory.reasons import absence
from usbip_plugin.model import DeviceKey, Health, Reason

_SHOWN = 3
_FREE = frozenset({Reason.FREE, Reason.HOLDER_EXPIRED})
_AWAY = frozenset({Reason.NOT_LISTED, Reason.LISTED_WRONG, Reason.SERVER_UNREACHABLE})


@dataclass(frozen=True, order=True, slots=True)
class Bearer:
    """A device that tells a serial number, or is held as the one that does. holder: "" if nobody holds it."""

    key: DeviceKey
    holder: str = ""

    def __str__(self) -> str:
        return f"{self.key}" + (f" (held by node {self.holder})" if self.holder else "")


def bearers(devices: Mapping[str, Seen], found: Mapping[str, Health], facts: Facts) -> Mapping[str, tuple[Bearer, ...]]:
    """Who has each of the serial numbers that a resource promises by more than one device. found: see health."""
    serials = [serial for seen in devices.values() if (serial := seen.selector.selector.serial) is not None]
    borne: dict[str, list[Bearer]] = {serial: [] for serial, n in Counter(serials).items() if n > 1} if serials else {}
    if not borne:
        return {}
    moved = {lock.in_place_of for lock in facts.locks.values() if lock.holder}
    for device_id, seen in devices.items():
        serial, lock = seen.selector.selector.serial, facts.locks.get(device_id)
        if serial not in borne:
            continue
        if lock is None or lock.serial != serial:
            continue
        if lock.holder and found[device_id].reason is not Reason.HOLDER_EXPIRED:
            # as long as it is held for a device that is attached from elsewhere, that is where it is
            if device_id not in moved:
                borne[serial].append(Bearer(seen.key, lock.holder))
        elif device_id in facts.released or absence(facts, seen) is None:
            borne[serial].append(Bearer(seen.key))
    return {serial: tuple(who) for serial, who in borne.items()}


def settled(health: Health, key: DeviceKey, serial: str, bearers: Collection[Bearer]) -> Health:
    """The health of a device that is promised by its serial number, given who else bears it."""
    others = sorted(bearer for bearer in bearers if bearer.key != key)
    if not others:
        return health
    if health.reason in _FREE:
        told = f"serial number {serial} is also that of {_listed(others)}; select by bus_id as well"
        return Health(Reason.AMBIGUOUS, told)
    if health.reason in _AWAY:
        return Health(Reason.MOVED, f"the device with serial number {serial} is {_listed(others)} now")
    return health


def _listed(bearers: Sequence[Bearer]) -> str:
    more = len(bearers) - _SHOWN
    return " and ".join(map(str, bearers[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
