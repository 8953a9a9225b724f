"""Evaluates what each resource advertises, all of it or the part that a change affects, and warns about overlaps.

With hundreds of devices most changes are about one lock, and every node sees each of them. Evaluating a part gives
the same result as evaluating everything. Pure functions but for the warnings.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter, is_not

from usbip_plugin.inventory.facts import OfferedDevice, OfferedDevices, Snapshot
from usbip_plugin.inventory.health import health, resolve_ambiguity, serial_owners
from usbip_plugin.inventory.members import learn
from usbip_plugin.model import Advertised, Health, Reason, ServerKey
from usbip_plugin.usbip.poller import ServerView

log = logging.getLogger(__name__)


Lists = Mapping[str, tuple[Advertised, ...]]
"""Advertised devices by resource name (without the domain), sorted by device ID."""


def changed_places(before: Sequence[object], after: Sequence[object]) -> Iterator[int]:
    """Yields the indexes at which two sequences of the same length have different objects.

    Compares objects by identity only: `after` must keep the objects of `before` that did not change.
    """
    return compress(range(len(after)), map(is_not, before, after))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of one evaluation: what each resource advertised before, and what it advertises from now on.

    before: the lists before this evaluation.
    lists: the lists from now on. After a partial evaluation, an unchanged list is the same tuple as in `before`.
    facts: the snapshot that was evaluated. It covers only a part of all devices if only a part has changed.
    """

    before: Lists
    lists: Lists
    facts: Snapshot


def advertise(members: OfferedDevices, facts: Snapshot) -> Mapping[str, tuple[Advertised, ...]]:
    """Returns what each resource advertises to the kubelet, by resource name; devices sorted by ID."""
    return {
        resource: tuple(
            Advertised(i, devices[i].key, found) for i, found in sorted(_healths(resource, devices, facts).items())
        )
        for resource, devices in members.items()
    }


def _healths(resource: str, devices: Mapping[str, OfferedDevice], facts: Snapshot) -> Mapping[str, Health]:
    found = {device_id: health(facts, seen, resource) for device_id, seen in devices.items()}
    for serial, borne in serial_owners(devices, found, facts).items():
        for device_id, seen in devices.items():
            if seen.selector.selector.serial == serial:
                found[device_id] = resolve_ambiguity(found[device_id], seen.key, serial, borne)
    return found


def only(facts: Snapshot, members: OfferedDevices, device_ids: Collection[str]) -> Snapshot | None:
    """Returns a snapshot of these devices and of the resources that have or may get one of them, without all others.

    Returns None if a change of these devices may affect other devices, too:
    - a device has no lock or claim that names its server and bus id, or a lock without a USB ID;
    - a device is attached from another device's bus id;
    - a selector in the configuration has a serial number, which another device may have as well;
    - a resource of a former configuration still has devices.
    """
    resources = facts.config.resources
    if not members.keys() <= {resource.name for resource in resources}:
        return None
    if any(entry.selector.serial is not None for resource in resources for entry in resource.devices):
        return None
    busids: dict[ServerKey, set[str]] = {}
    for device_id in device_ids:
        lock, claim = facts.locks.get(device_id), facts.claims.get(device_id)
        key = lock.key if lock is not None else claim.key if claim is not None else None
        if key is None or (lock is not None and lock.usb_id is None):
            return None
        if claim is not None and claim.moved_to is not None:
            return None
        busids.setdefault(key.server, set()).add(key.busid)
    claims = {i: facts.claims[i] for i in device_ids if i in facts.claims}
    concerned = {claim.resource for claim in claims.values()}
    mine = [
        resource
        for resource in resources
        if resource.name in concerned
        or any(entry.target in busids for entry in resource.devices)
        or not members.get(resource.name, {}).keys().isdisjoint(device_ids)
    ]
    views = {server: facts.servers[server] for server in busids if server in facts.servers}
    return replace(
        facts,
        config=replace(facts.config, resources=tuple(mine)),
        servers={server: _part(view, busids[server]) for server, view in views.items()},
        locks={i: facts.locks[i] for i in device_ids if i in facts.locks},
        lock_statuses={i: facts.lock_statuses[i] for i in device_ids if i in facts.lock_statuses},
        claims=claims,
    )


def _part(view: ServerView, busids: set[str]) -> ServerView:
    devices = tuple(view.by_busid[busid] for busid in sorted(busids & view.by_busid.keys()))
    return replace(view, devices=devices)


def relearn(
    members: OfferedDevices, lists: Lists, part: Snapshot, device_ids: Collection[str]
) -> tuple[OfferedDevices, Lists, Lists]:
    """Returns what the resources offer after a change of these devices' locks or claims.

    The result is the offered devices, the lists of all resources, and the lists of these devices alone. A resource
    whose list does not change keeps the same tuple.

    part: the snapshot that only() returned for these devices.
    """
    concerned = {resource.name: members.get(resource.name, {}) for resource in part.config.resources}
    before = {name: {i: devices[i] for i in device_ids if i in devices} for name, devices in concerned.items()}
    after = learn(before, part)
    evaluated = advertise(after, part)
    found: dict[str, Mapping[str, OfferedDevice]] = {**members}
    for name, changed in after.items():
        devices = members.get(name, {})
        if name not in members or before.get(name, {}) != changed:
            devices = {**{i: seen for i, seen in devices.items() if i in changed or i not in device_ids}, **changed}
        found[name] = devices
    return (
        found,
        {**lists, **{name: _merged(lists.get(name), of, device_ids) for name, of in evaluated.items()}},
        evaluated,
    )


def differing(
    before: tuple[Advertised, ...], after: tuple[Advertised, ...]
) -> list[tuple[Advertised | None, Advertised]]:
    """Returns the devices of `after` that are not the same object as before, each as (old or None, new)."""
    if len(before) == len(after):
        places = [*changed_places(before, after)]
        if all(before[place].id == after[place].id for place in places):
            return [(before[place], after[place]) for place in places]
    known = {device.id: device for device in before}
    return [(old, device) for device in after if (old := known.get(device.id)) is not device]


def _merged(
    before: tuple[Advertised, ...] | None, changed: tuple[Advertised, ...], device_ids: Collection[str]
) -> tuple[Advertised, ...]:
    if before is None:
        return changed
    evaluated = {device.id: device for device in changed}
    after, same = [*before], True
    for device_id in device_ids:
        place = bisect_left(after, device_id, key=attrgetter("id"))
        known = after[place] if place < len(after) and after[place].id == device_id else None
        now = evaluated.get(device_id)
        if known != now:
            after[place : place + (known is not None)] = [now] if now is not None else []
            same = False
    return before if same else tuple(after)


_SHOWN = 5
"""Maximum number of devices that one warning names."""
_NOT_THERE = frozenset(
    {
        *(Reason.NOT_LISTED, Reason.LISTED_WRONG, Reason.NOT_READ, Reason.MOVED),
        *(Reason.SERVER_UNREACHABLE, Reason.UNKNOWN),
    }
)


class OverlapWarnings:
    """Warns once about devices offered by several resources and about serial numbers that several devices share.

    One instance serves one node.
    """

    def __init__(self) -> None:
        self._known_shared: frozenset[tuple[str, ...]] = frozenset()
        self._ambiguous: frozenset[tuple[str, str]] = frozenset()

    def warn(self, members: OfferedDevices, advertised: Mapping[str, tuple[Advertised, ...]]) -> None:
        """Logs the overlaps that are new since the last call. To be called at each evaluation."""
        shared = shared_devices(advertised)
        for resources in sorted(shared.keys() - self._known_shared):
            devices = shared[resources]
            extra = {"resources": list(resources), "devices": devices[:_SHOWN], "count": len(devices)}
            log.warning("offered as several resources, and in use as one of them only", extra=extra)
        # shared devices that are away for the moment have been logged already, and come back
        self._known_shared |= shared.keys()
        ambiguous = ambiguous_devices(members, advertised)
        for resource, serial in sorted(ambiguous.keys() - self._ambiguous):
            devices = ambiguous[resource, serial]
            extra = {"resource": resource, "serial": serial, "devices": devices[:_SHOWN], "count": len(devices)}
            log.warning("several devices tell one serial number, none of them is offered by it", extra=extra)
        self._ambiguous = frozenset(ambiguous)


def shared_devices(advertised: Mapping[str, tuple[Advertised, ...]]) -> dict[tuple[str, ...], list[str]]:
    """Returns the devices that several resources offer, by the names of these resources. Leaves out absent devices."""
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
    members: OfferedDevices, advertised: Mapping[str, tuple[Advertised, ...]]
) -> dict[tuple[str, str], list[str]]:
    """Returns the devices not offered because others have the same serial number, by (resource, serial number)."""
    found: dict[tuple[str, str], list[str]] = {}
    for resource, devices in advertised.items():
        for device in devices:
            if device.health.reason is Reason.AMBIGUOUS:
                serial = members[resource][device.id].selector.selector.serial or ""
                found.setdefault((resource, serial), []).append(str(device.key))
    return found
