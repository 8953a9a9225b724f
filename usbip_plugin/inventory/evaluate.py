"""Evaluates what each resource advertises, all of it or the part that a change affects, and warns about overlaps.

Every node sees each change of a lock. So with hundreds of devices, only the part that a change affects is evaluated,
with the same result.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter, is_not

from usbip_plugin.inventory.health import health, resolve_ambiguity, serial_owners
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.inventory.snapshot import OfferedDevices, Snapshot
from usbip_plugin.model import Advertised, DeviceKey, Reason, ServerKey
from usbip_plugin.usbip.poller import ServerView

log = logging.getLogger(__name__)


Devices = tuple[Advertised, ...]
"""The devices that one resource advertises, sorted by device ID."""
Lists = Mapping[str, Devices]
"""Advertised devices by resource name (without the domain)."""


def changed_indexes(before: Sequence[object], after: Sequence[object]) -> Iterator[int]:
    """Yields the indexes at which two sequences of the same length have different objects.

    Compares objects by identity only: `after` must keep the objects of `before` that did not change.
    """
    return compress(range(len(after)), map(is_not, before, after))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of one evaluation: what each resource advertised before, and what it advertises from now on.

    lists: the lists from now on. After a partial evaluation, an unchanged list is the same tuple as in `before`.
    snapshot: what was evaluated; only the affected devices after a partial evaluation.
    """

    before: Lists
    lists: Lists
    snapshot: Snapshot


def advertise(members: OfferedDevices, snapshot: Snapshot) -> Lists:
    """Returns what each resource advertises to the kubelet."""
    lists = {}
    for resource, devices in members.items():
        healths = {device_id: health(snapshot, offered, resource) for device_id, offered in devices.items()}
        for serial, owners in serial_owners(devices, healths, snapshot).items():
            for device_id, offered in devices.items():
                if offered.serial == serial:
                    healths[device_id] = resolve_ambiguity(healths[device_id], offered.key, serial, owners)
        lists[resource] = tuple(Advertised(i, devices[i].key, healths[i]) for i in sorted(healths))
    return lists


def restrict(snapshot: Snapshot, members: OfferedDevices, device_ids: Collection[str]) -> Snapshot | None:
    """Returns the part of a snapshot that a change of these devices can affect.

    The part has the devices, and the resources that offer or may offer one of them. Returns None if the change may
    affect other devices, too:
    - a device has no lock or claim that names its server and bus ID, or a lock without a USB ID;
    - a device is attached from another device's bus ID;
    - a selector in the configuration has a serial number, which another device may have as well;
    - a resource of a former configuration still has devices.
    """
    resources = snapshot.config.resources
    if not members.keys() <= {resource.name for resource in resources}:
        return None
    if any(entry.selector.serial is not None for resource in resources for entry in resource.devices):
        return None
    busids: dict[ServerKey, set[str]] = {}
    for device_id in device_ids:
        lock, claim = snapshot.locks.get(device_id), snapshot.claims.get(device_id)
        key = lock.key if lock is not None else claim.key if claim is not None else None
        if key is None or (lock is not None and lock.usb_id is None):
            return None
        if claim is not None and claim.moved_to is not None:
            return None
        busids.setdefault(key.server, set()).add(key.busid)
    claims = {i: snapshot.claims[i] for i in device_ids if i in snapshot.claims}
    claimed_as = {claim.resource for claim in claims.values()}
    affected = tuple(
        resource
        for resource in resources
        if resource.name in claimed_as
        or any(entry.target in busids for entry in resource.devices)
        or not members.get(resource.name, {}).keys().isdisjoint(device_ids)
    )
    return replace(
        snapshot,
        config=replace(snapshot.config, resources=affected),
        servers={s: _part(snapshot.servers[s], names) for s, names in busids.items() if s in snapshot.servers},
        locks={i: snapshot.locks[i] for i in device_ids if i in snapshot.locks},
        lock_statuses={i: snapshot.lock_statuses[i] for i in device_ids if i in snapshot.lock_statuses},
        claims=claims,
    )


def _part(view: ServerView, busids: set[str]) -> ServerView:
    return replace(view, devices=tuple(view.by_busid[busid] for busid in sorted(busids) if busid in view.by_busid))


def evaluate_part(
    members: OfferedDevices, lists: Lists, part: Snapshot, device_ids: Collection[str]
) -> tuple[OfferedDevices, Lists, Lists]:
    """Returns what the resources offer after a change of these devices' locks or claims.

    The result is the offered devices, the lists of all resources, and the lists of these devices alone. A resource
    whose list does not change keeps the same tuple.

    part: the snapshot that restrict() returned for these devices.
    """
    affected = {resource.name: members.get(resource.name, {}) for resource in part.config.resources}
    before = {name: {i: devices[i] for i in device_ids if i in devices} for name, devices in affected.items()}
    after = update_offered(before, part)
    evaluated = advertise(after, part)
    offered = {**members}
    for name, changed in after.items():
        if name not in members or before.get(name, {}) != changed:
            kept = {i: one for i, one in members.get(name, {}).items() if i in changed or i not in device_ids}
            offered[name] = {**kept, **changed}
    merged = {name: _merged(lists.get(name), changed, device_ids) for name, changed in evaluated.items()}
    return offered, {**lists, **merged}, evaluated


def differing(before: Devices, after: Devices) -> list[tuple[Advertised | None, Advertised]]:
    """Returns the devices of `after` that are not the same object as before, each as (old or None, new)."""
    if len(before) == len(after):
        pairs = [(before[index], after[index]) for index in changed_indexes(before, after)]
        if all(old.id == new.id for old, new in pairs):
            return [*pairs]
    by_id = {device.id: device for device in before}
    return [(old, device) for device in after if (old := by_id.get(device.id)) is not device]


def _merged(before: Devices | None, changed: Devices, device_ids: Collection[str]) -> Devices:
    if before is None:
        return changed
    evaluated = {device.id: device for device in changed}
    after, same = [*before], True
    for device_id in device_ids:
        index = bisect_left(after, device_id, key=attrgetter("id"))
        old = after[index] if index < len(after) and after[index].id == device_id else None
        new = evaluated.get(device_id)
        if old != new:
            after[index : index + (old is not None)] = [new] if new is not None else []
            same = False
    return before if same else tuple(after)


_SHOWN = 5
"""Maximum number of devices that one warning names."""
_ABSENT = frozenset(
    (Reason.NOT_LISTED, Reason.LISTED_WRONG, Reason.NOT_READ, Reason.MOVED, Reason.SERVER_UNREACHABLE, Reason.UNKNOWN)
)


class OverlapWarnings:
    """Warns once about devices offered by several resources and about serial numbers that several devices share."""

    def __init__(self) -> None:
        self._known_shared: frozenset[tuple[str, ...]] = frozenset()
        self._ambiguous: frozenset[tuple[str, str]] = frozenset()

    def warn(self, members: OfferedDevices, advertised: Lists) -> None:
        """Logs the overlaps that are new since the last call."""
        shared = shared_devices(advertised)
        for resources in sorted(shared.keys() - self._known_shared):
            devices = shared[resources]
            extra = {"resources": list(resources), "devices": devices[:_SHOWN], "count": len(devices)}
            log.warning("devices offered by several resources, usable by one at a time", extra=extra)
        # never forgotten: a shared device may be absent for a while
        self._known_shared |= shared.keys()
        ambiguous = ambiguous_devices(members, advertised)
        for resource, serial in sorted(ambiguous.keys() - self._ambiguous):
            devices = ambiguous[resource, serial]
            extra = {"resource": resource, "serial": serial, "devices": devices[:_SHOWN], "count": len(devices)}
            log.warning("duplicate serial number, devices not offered", extra=extra)
        self._ambiguous = frozenset(ambiguous)


def shared_devices(advertised: Lists) -> dict[tuple[str, ...], list[str]]:
    """Returns the devices that several resources offer, by the names of these resources. Leaves out absent devices."""
    if len(advertised) < 2:
        return {}
    offers: dict[str, tuple[DeviceKey, list[str]]] = {}
    for resource, devices in sorted(advertised.items()):
        for device in devices:
            if device.health.reason not in _ABSENT:
                offers.setdefault(device.id, (device.key, []))[1].append(resource)
    shared: dict[tuple[str, ...], list[str]] = {}
    for key, resources in offers.values():
        if len(resources) > 1:
            shared.setdefault(tuple(resources), []).append(str(key))
    return shared


def ambiguous_devices(members: OfferedDevices, advertised: Lists) -> dict[tuple[str, str], list[str]]:
    """Returns the devices not offered because others have the same serial number, by (resource, serial number)."""
    ambiguous: dict[tuple[str, str], list[str]] = {}
    for resource, devices in advertised.items():
        for device in devices:
            if device.health.reason is Reason.AMBIGUOUS:
                serial = members[resource][device.id].serial or ""
                ambiguous.setdefault((resource, serial), []).append(str(device.key))
    return ambiguous
