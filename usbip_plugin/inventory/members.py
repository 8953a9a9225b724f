"""Which devices a resource offers: those listed by a server now, or locked now, or seen before.

A device that vanishes becomes Unhealthy and is never dropped, because the kubelet would forget a running pod's device;
only a new configuration drops it, and not while it is claimed on this node.
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
from usbip_plugin.usbip.poller import ServerState, ServerView

MAX_VANISHED = 256
"""Devices of one server that a resource remembers although nobody lists, locks or claims them; the oldest go first.

A server that lists others each time it is asked would otherwise fill the node's memory, and the kubelet's.
"""


def learn(before: OfferedDevices, facts: Snapshot) -> OfferedDevices:
    """The devices each resource offers now, given those it offered before."""
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
            told = (
                facts.identity_of(key.id, descriptor)
                if listed
                else lock.identity
                if lock is not None
                else UNKNOWN_IDENTITY
            )
            selector = _selector_for(resource, key, descriptor, told)
            if selector is None:
                continue
            known = mine.get(key.id)
            if listed or known is None:
                mine[key.id] = OfferedDevice(key, descriptor.usb_id, selector, descriptor if listed else None, told)
            elif told.serial is not None:
                mine[key.id] = replace(known, selector=selector, identity=told, configured=True)
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
            # Its pod has it by this resource, whatever is said of the device by now, and may be older than us. A
            # kubelet that is answered with a device that its list has not crashes (1.37, allocateContainerResources).
            found.setdefault(claim.resource, {})[claim.id] = _by_claim(facts.config, claim)
    return found


def importable(servers: Mapping[ServerKey, ServerView]) -> frozenset[str]:
    """IDs of the devices that a reachable server lists now: usbipd hides those in use."""
    return frozenset(
        DeviceKey(server, descriptor.busid).id
        for server, view in servers.items()
        if view.state is ServerState.REACHABLE
        for descriptor in view.devices
    )


def held_as(claims: Mapping[str, Claim], device_id: str, resource: str) -> bool:
    """Whether it is held as this resource. A claim that was adopted does not know by which resource it was made."""
    claim = claims.get(device_id)
    return claim is not None and claim.resource in (resource, None)


# Of every lock at each evaluation.
@functools.lru_cache(maxsize=1024)
def _bare(busid: str, usb_id: UsbId) -> Descriptor:
    """What can be said of a device whose server does not list it now."""
    return Descriptor(busid, "", 0, 0, 0, usb_id, 0, 0, 0, 0, 0, 0, 0)


def _candidates(facts: Snapshot) -> Iterable[tuple[DeviceKey, Descriptor, bool]]:
    """(key, descriptor, listed now) of every device that can be seen anywhere, listed ones last so that they win."""
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
    """Whether some selector of the resource names the device, as far as is known of it."""
    descriptor = seen.descriptor or _bare(seen.key.busid, seen.usb_id)
    return any(
        entry.target == seen.key.server and matches(entry.selector, descriptor, seen.identity) is not Match.NO
        for entry in resource.devices
    )


def _too_old(mine: dict[str, OfferedDevice], present: Collection[str]) -> list[str]:
    """Those that are not present and beyond MAX_VANISHED of their server, counted from the one learnt last."""
    room: Counter[ServerKey] = Counter()
    gone: list[str] = []
    for device_id, seen in reversed(mine.items()):
        if device_id not in present:
            room[seen.key.server] += 1
            if room[seen.key.server] > MAX_VANISHED:
                gone.append(device_id)
    return gone


def _selector_for(
    resource: ResourceConfig, key: DeviceKey, descriptor: Descriptor, told: Identity
) -> DeviceSelector | None:
    for selector in resource.devices:
        if selector.target == key.server and matches(selector.selector, descriptor, told) is Match.YES:
            return selector
    return None
