"""Decides which devices a resource offers: those that a server lists or has listed, and those with a lock or claim.

A device that vanishes becomes Unhealthy and is not dropped, because the kubelet would forget a running pod's device.
A new configuration drops it, unless it has a claim on this node. FORGET_AFTER and MAX_VANISHED limit what is kept.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from usbip_plugin.claims import Claim
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig
from usbip_plugin.config.selectors import may_select, selector_for
from usbip_plugin.inventory.snapshot import OfferedDevice, OfferedDevices, Snapshot
from usbip_plugin.model import UNKNOWN_IDENTITY, Descriptor, DeviceKey, Identity, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerState, ServerView

MAX_VANISHED = 256
"""Maximum number of devices of one server that a resource keeps without a listing, a lock or a claim.

The oldest are dropped first. Without the limit, a server that lists different devices at each poll would fill the
memory of the node and of the kubelet.
"""

FORGET_AFTER = 24 * 3600.0
"""Seconds for which a device stays offered that its server does not list and nobody holds.

Some servers make the bus ID of bus and device number, so that each replug leaves another bus ID behind.
"""


def update_absent(
    before: Mapping[str, float], offered: OfferedDevices, snapshot: Snapshot, now: float
) -> dict[str, float]:
    """Returns since when each device has been absent: not listed by its server, which answers, and held by nobody.

    Devices that are not absent are left out. before: the result of the last call. now: seconds, monotonic.
    """
    keys = {i: device.key for devices in offered.values() for i, device in devices.items()}
    keys.update((i, lock.key) for i, lock in snapshot.locks.items() if lock.key is not None)
    return {
        device_id: before.get(device_id, now)
        for device_id, key in keys.items()
        if (view := snapshot.servers.get(key.server)) is not None
        and view.state is ServerState.REACHABLE
        and key.busid not in view.by_busid
        and not _held(snapshot, device_id)
    }


def _held(snapshot: Snapshot, device_id: str) -> bool:
    lock = snapshot.locks.get(device_id)
    return device_id in snapshot.claims or (lock is not None and lock.holder != "")


def update_offered(before: OfferedDevices, snapshot: Snapshot) -> OfferedDevices:
    """Returns the devices that each resource offers now, given those that it offered before."""
    candidates = list(_candidates(snapshot))
    forgotten = {i for i in snapshot.forgotten if not _held(snapshot, i)}
    if forgotten:
        forgotten -= {key.id for key, *_, listed in candidates if listed}
        candidates = [candidate for candidate in candidates if candidate[0].id not in forgotten]
    present = {key.id for key, *_ in candidates}
    result: dict[str, dict[str, OfferedDevice]] = {}
    for resource in snapshot.config.resources:
        devices = result[resource.name] = _kept(resource, before.get(resource.name, {}), snapshot.claims)
        for device_id in forgotten & devices.keys():
            del devices[device_id]
        for key, descriptor, identity, listed in candidates:
            selector = selector_for(resource, key, descriptor, identity)
            if selector is None:
                continue
            known = devices.get(key.id)
            if listed or known is None or (known.usb_id != descriptor.usb_id and _held(snapshot, key.id)):
                shown = descriptor if listed else None
                devices[key.id] = OfferedDevice(key, descriptor.usb_id, selector, shown, identity)
            elif identity.serial is not None:
                devices[key.id] = replace(known, selector=selector, identity=identity, configured=True)
        if len(devices) > MAX_VANISHED:
            for device_id in _too_old(devices, present):
                del devices[device_id]
    for name in sorted(before.keys() - result.keys()):
        for device_id, offered in before[name].items():
            if held_as(snapshot.claims, device_id, name):
                result.setdefault(name, {})[device_id] = replace(offered, configured=False)
    for claim in snapshot.claims.values():
        if claim.resource is not None and claim.id not in result.get(claim.resource, {}):
            # A pod that may be older than this process has the device by this resource. A kubelet crashes when an
            # answer names a device that is not in its list (1.37, allocateContainerResources).
            result.setdefault(claim.resource, {})[claim.id] = _by_claim(snapshot.config, claim)
    return result


def importable(servers: Mapping[ServerKey, ServerView]) -> frozenset[str]:
    """Returns the IDs of the devices that the servers list now, see ServerView.exported."""
    return frozenset(key.id for view in servers.values() for key in view.exported)


def held_as(claims: Mapping[str, Claim], device_id: str, resource: str) -> bool:
    """Returns whether the device has a claim that was, or may have been, made by this resource.

    An adopted claim does not know its resource (None), and counts for every resource.
    """
    claim = claims.get(device_id)
    return claim is not None and claim.resource in (resource, None)


# Cached, because each evaluation calls it for every lock.
@functools.lru_cache(maxsize=1024)
def _bare(busid: str, usb_id: UsbId) -> Descriptor:
    """Returns a descriptor with bus ID and USB ID only, for a device that its server does not list now."""
    return Descriptor(busid, "", 0, 0, 0, usb_id, 0, 0, 0, 0, 0, 0, 0)


def _candidates(snapshot: Snapshot) -> Iterable[tuple[DeviceKey, Descriptor, Identity, bool]]:
    """Yields (key, descriptor, identity, listed now) of every device. Listed ones come last, to replace all others."""
    for lock in snapshot.locks.values():
        if lock.key is not None and lock.usb_id is not None:
            yield lock.key, _bare(lock.key.busid, lock.usb_id), lock.identity, False
    for claim in snapshot.claims.values():
        held = snapshot.locks.get(claim.id)
        identity = held.identity if held is not None else UNKNOWN_IDENTITY
        yield claim.key, _bare(claim.key.busid, claim.usb_id), identity, False
    for server, view in snapshot.servers.items():
        for descriptor in view.devices:
            key = DeviceKey(server, descriptor.busid)
            yield key, descriptor, snapshot.identity_of(key.id, descriptor), True


def _kept(
    resource: ResourceConfig, before: Mapping[str, OfferedDevice], claims: Mapping[str, Claim]
) -> dict[str, OfferedDevice]:
    """Returns the devices that a selector of the resource still matches, or that are held as this resource."""
    kept = {}
    for device_id, offered in before.items():
        selector = selector_for(resource, offered.key, _descriptor_of(offered), offered.identity)
        if selector is not None:
            same = selector is offered.selector and offered.configured
            kept[device_id] = offered if same else replace(offered, selector=selector, configured=True)
        elif held_as(claims, device_id, resource.name):
            kept[device_id] = replace(offered, configured=_may_select(resource, offered))
    return kept


def _by_claim(config: Config, claim: Claim) -> OfferedDevice:
    resource = next((one for one in config.resources if one.name == claim.resource), ResourceConfig("", ()))
    bare = DeviceSelector(claim.key.server)
    selector = next((entry for entry in resource.devices if entry.target == claim.key.server), bare)
    offered = OfferedDevice(claim.key, claim.usb_id, selector, identity=Identity(serial=claim.serial))
    return replace(offered, configured=_may_select(resource, offered))


def _may_select(resource: ResourceConfig, offered: OfferedDevice) -> bool:
    return may_select(resource, offered.key, _descriptor_of(offered), offered.identity)


def _descriptor_of(offered: OfferedDevice) -> Descriptor:
    return offered.descriptor or _bare(offered.key.busid, offered.usb_id)


def _too_old(devices: dict[str, OfferedDevice], present: Collection[str]) -> list[str]:
    """Returns the absent devices to drop: all but the latest MAX_VANISHED of each server."""
    absent: Counter[ServerKey] = Counter()
    dropped: list[str] = []
    for device_id, offered in reversed(devices.items()):
        if device_id not in present:
            absent[offered.key.server] += 1
            if absent[offered.key.server] > MAX_VANISHED:
                dropped.append(device_id)
    return dropped
