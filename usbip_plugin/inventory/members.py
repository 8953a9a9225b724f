"""Decides which devices a resource offers: those that a server lists now, that have a lock or claim, or seen before.

A device that vanishes becomes Unhealthy and is not dropped, because the kubelet would forget a running pod's device.
A new configuration drops it, but not while it is claimed on this node. MAX_VANISHED limits how many are kept.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from usbip_plugin.claims import Claim
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.inventory.facts import OfferedDevice, OfferedDevices, Snapshot
from usbip_plugin.model import UNKNOWN_IDENTITY, Descriptor, DeviceKey, Identity, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerView

MAX_VANISHED = 256
"""Maximum number of devices of one server that a resource keeps without a listing, a lock or a claim.

The devices that were learnt first are dropped first. Without the limit, a server that lists different devices at each
poll would fill the memory of the node and of the kubelet.
"""


def learn(before: OfferedDevices, facts: Snapshot) -> OfferedDevices:
    """Returns the devices that each resource offers now, given those that it offered before."""
    found: dict[str, dict[str, OfferedDevice]] = {}
    candidates = list(_candidates(facts))
    for resource in facts.config.resources:
        mine: dict[str, OfferedDevice] = {}
        old = before.get(resource.name, {})
        for device_id, seen in old.items():
            descriptor = seen.descriptor or _bare(seen.key.busid, seen.usb_id)
            selector = _selector_for(resource, seen.key, descriptor, seen.identity)
            if selector is not None:
                same = selector is seen.selector and seen.configured
                mine[device_id] = seen if same else replace(seen, selector=selector, configured=True)
            elif held_as(facts.claims, device_id, resource.name):
                mine[device_id] = replace(seen, configured=_may_name(resource, seen))
        for key, descriptor, listed in candidates:
            lock = facts.locks.get(key.id)
            identity = (
                facts.identity_of(key.id, descriptor)
                if listed
                else lock.identity
                if lock is not None
                else UNKNOWN_IDENTITY
            )
            selector = _selector_for(resource, key, descriptor, identity)
            if selector is None:
                continue
            known = mine.get(key.id)
            if listed or known is None:
                mine[key.id] = OfferedDevice(key, descriptor.usb_id, selector, descriptor if listed else None, identity)
            elif identity.serial is not None:
                mine[key.id] = replace(known, selector=selector, identity=identity, configured=True)
        if len(mine) > MAX_VANISHED:
            for device_id in _too_old(mine, {key.id for key, _, _ in candidates}):
                del mine[device_id]
        found[resource.name] = mine
    for name in sorted(before.keys() - found.keys()):
        for device_id, seen in before[name].items():
            if held_as(facts.claims, device_id, name):
                found.setdefault(name, {})[device_id] = replace(seen, configured=False)
    for claim in facts.claims.values():
        if claim.resource is not None and claim.id not in found.get(claim.resource, {}):
            # The pod has the device by this resource, whatever the configuration and servers say now, and may be older
            # than this process. A kubelet crashes when an answer names a device that is not in its list (1.37,
            # allocateContainerResources).
            found.setdefault(claim.resource, {})[claim.id] = _by_claim(facts.config, claim)
    return found


def importable(servers: Mapping[ServerKey, ServerView]) -> frozenset[str]:
    """Returns the IDs of the devices that the servers list now, see ServerView.exported."""
    return frozenset(key.id for view in servers.values() for key in view.exported)


def held_as(claims: Mapping[str, Claim], device_id: str, resource: str) -> bool:
    """Returns whether the device has a claim that was, or may have been, made by this resource.

    An adopted claim does not know its resource (None), and counts for every resource.
    """
    claim = claims.get(device_id)
    return claim is not None and claim.resource in (resource, None)


# Cached because each evaluation calls it for every lock.
@functools.lru_cache(maxsize=1024)
def _bare(busid: str, usb_id: UsbId) -> Descriptor:
    """Returns a descriptor with only bus id and USB ID, for a device that its server does not list now."""
    return Descriptor(busid, "", 0, 0, 0, usb_id, 0, 0, 0, 0, 0, 0, 0)


def _candidates(facts: Snapshot) -> Iterable[tuple[DeviceKey, Descriptor, bool]]:
    """Yields (key, descriptor, listed now) for every known device. Listed devices come last, so that they win."""
    for lock in facts.locks.values():
        key, usb_id = lock.key, lock.usb_id
        if key is not None and usb_id is not None:
            yield key, _bare(key.busid, usb_id), False
    for claim in facts.claims.values():
        yield claim.key, _bare(claim.key.busid, claim.usb_id), False
    for server, view in facts.servers.items():
        for descriptor in view.devices:
            yield DeviceKey(server, descriptor.busid), descriptor, True


def _by_claim(config: Config, claim: Claim) -> OfferedDevice:
    resource = next((one for one in config.resources if one.name == claim.resource), None)
    entries = resource.devices if resource is not None else ()
    bare = DeviceSelector(claim.key.server)
    selector = next((entry for entry in entries if entry.target == claim.key.server), bare)
    seen = OfferedDevice(claim.key, claim.usb_id, selector, identity=Identity(serial=claim.serial))
    return replace(seen, configured=resource is not None and _may_name(resource, seen))


def _may_name(resource: ResourceConfig, seen: OfferedDevice) -> bool:
    """Returns whether a selector of the resource matches the device, or may match it once its identity is known."""
    descriptor = seen.descriptor or _bare(seen.key.busid, seen.usb_id)
    return any(
        entry.target == seen.key.server and matches(entry.selector, descriptor, seen.identity) is not Match.NO
        for entry in resource.devices
    )


def _too_old(mine: dict[str, OfferedDevice], present: Collection[str]) -> list[str]:
    """Returns the absent devices beyond the MAX_VANISHED of each server that were learnt last."""
    room: Counter[ServerKey] = Counter()
    gone: list[str] = []
    for device_id, seen in reversed(mine.items()):
        if device_id not in present:
            room[seen.key.server] += 1
            if room[seen.key.server] > MAX_VANISHED:
                gone.append(device_id)
    return gone


def _selector_for(
    resource: ResourceConfig, key: DeviceKey, descriptor: Descriptor, identity: Identity
) -> DeviceSelector | None:
    for selector in resource.devices:
        if selector.target == key.server and matches(selector.selector, descriptor, identity) is Match.YES:
            return selector
    return None
