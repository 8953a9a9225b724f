"""What is odd about the devices that are offered, said in the log when it is first seen.

That is one device as two resources, and two devices with one serial number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from usbip_plugin.inventory.facts import Members
from usbip_plugin.model import Advertised, Reason

log = logging.getLogger(__name__)

_SHOWN = 5
_NOT_THERE = frozenset(
    {
        *(Reason.NOT_LISTED, Reason.LISTED_WRONG, Reason.NOT_READ, Reason.MOVED),
        *(Reason.SERVER_UNREACHABLE, Reason.UNKNOWN),
    }
)


class Oddities:
    """Of one node. What has been said is not said again while it lasts."""

    def __init__(self) -> None:
        self._shared: frozenset[tuple[str, ...]] = frozenset()
        self._ambiguous: frozenset[tuple[str, str]] = frozenset()

    def look(self, members: Members, advertised: Mapping[str, tuple[Advertised, ...]]) -> None:
        """At each evaluation."""
        shared = shared_devices(advertised)
        for resources in sorted(shared.keys() - self._shared):
            devices = shared[resources]
            extra = {"resources": list(resources), "devices": devices[:_SHOWN], "count": len(devices)}
            log.warning("offered as several resources, and in use as one of them only", extra=extra)
        # those that are not there for the moment have been told of, and come back
        self._shared |= shared.keys()
        ambiguous = ambiguous_devices(members, advertised)
        for resource, serial in sorted(ambiguous.keys() - self._ambiguous):
            devices = ambiguous[resource, serial]
            extra = {"resource": resource, "serial": serial, "devices": devices[:_SHOWN], "count": len(devices)}
            log.warning("several devices tell one serial number, none of them is offered by it", extra=extra)
        self._ambiguous = frozenset(ambiguous)


def shared_devices(advertised: Mapping[str, tuple[Advertised, ...]]) -> dict[tuple[str, ...], list[str]]:
    """Devices that are there and that several resources offer, by the names of these."""
    by_device: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    if len(advertised) < 2:
        return {}
    for resource, devices in sorted(advertised.items()):
        for device in devices:
            if device.health.reason not in _NOT_THERE:
                by_device.setdefault(device.id, []).append(resource)
                names[device.id] = str(device.key)
    found: dict[tuple[str, ...], list[str]] = {}
    for device_id, resources in by_device.items():
        if len(resources) > 1:
            found.setdefault(tuple(resources), []).append(names[device_id])
    return found


def ambiguous_devices(
    members: Members, advertised: Mapping[str, tuple[Advertised, ...]]
) -> dict[tuple[str, str], list[str]]:
    """Devices that are not offered because others tell their serial number, by resource and that."""
    found: dict[tuple[str, str], list[str]] = {}
    for resource, devices in advertised.items():
        for device in devices:
            if device.health.reason is Reason.AMBIGUOUS:
                serial = members[resource][device.id].selector.selector.serial or ""
                found.setdefault((resource, serial), []).append(str(device.key))
    return found
