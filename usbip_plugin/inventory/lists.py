"""What each resource tells the kubelet."""

from __future__ import annotations

from collections.abc import Mapping

from usbip_plugin.inventory.bearers import bearers, settled
from usbip_plugin.inventory.facts import Facts, Members, Seen
from usbip_plugin.inventory.reasons import health
from usbip_plugin.model import Advertised, Health


def advertise(members: Members, facts: Facts) -> Mapping[str, tuple[Advertised, ...]]:
    """What each resource tells the kubelet, by resource name, devices sorted by ID."""
    return {
        resource: tuple(
            Advertised(i, devices[i].key, found) for i, found in sorted(_healths(resource, devices, facts).items())
        )
        for resource, devices in members.items()
    }


def _healths(resource: str, devices: Mapping[str, Seen], facts: Facts) -> Mapping[str, Health]:
    found = {device_id: health(facts, seen, resource) for device_id, seen in devices.items()}
    for serial, borne in bearers(devices, found, facts).items():
        for device_id, seen in devices.items():
            if seen.selector.selector.serial == serial:
                found[device_id] = settled(found[device_id], seen.key, serial, borne)
    return found
