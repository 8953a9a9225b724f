"""What is advertised after some locks have changed: the same as inventory works out from everything, for a part of it.

With hundreds of devices most events are about one lock, and every node sees every one of them. Pure functions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import replace
from operator import attrgetter

from usbip_plugin.inventory.facts import Facts, Members, Seen
from usbip_plugin.inventory.lists import advertise
from usbip_plugin.inventory.members import learn
from usbip_plugin.locks.record import key_of, parse_usb_id
from usbip_plugin.model import Advertised, ServerKey
from usbip_plugin.sequences import changed_places
from usbip_plugin.usbip.poller import ServerView

Lists = Mapping[str, tuple[Advertised, ...]]
"""What each resource advertises, by its name; devices sorted by ID."""


def only(facts: Facts, members: Members, device_ids: Collection[str]) -> Facts | None:
    """The facts about these devices, and the resources that have or may get one of them, and no others.

    None if others may be concerned, too: one of them has no lock that says where it stands; some device is promised by
    its serial number, which another may tell as well; or a resource of a former configuration still has devices.
    """
    resources = facts.config.resources
    if not members.keys() <= {resource.name for resource in resources}:
        return None
    if any(entry.selector.serial is not None for resource in resources for entry in resource.devices):
        return None
    busids: dict[ServerKey, set[str]] = {}
    for device_id in device_ids:
        lock = facts.locks.get(device_id)
        key = key_of(lock) if lock is not None else None
        if lock is None or key is None or parse_usb_id(lock.usb_id) is None:
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
        locks={i: facts.locks[i] for i in device_ids},
        standings={i: facts.standings[i] for i in device_ids if i in facts.standings},
        claims=claims,
    )


def _part(view: ServerView, busids: set[str]) -> ServerView:
    devices = tuple(view.by_busid[busid] for busid in sorted(busids & view.by_busid.keys()))
    return replace(view, devices=devices)


def relearn(members: Members, lists: Lists, part: Facts, device_ids: Collection[str]) -> tuple[Members, Lists, Lists]:
    """The members and lists after a change of these devices' locks, and what the lists say of these; part: see only.

    A resource whose list does not change keeps the very tuple it has.
    """
    concerned = {resource.name: members.get(resource.name, {}) for resource in part.config.resources}
    before = {name: {i: devices[i] for i in device_ids if i in devices} for name, devices in concerned.items()}
    after = learn(before, part)
    told = advertise(after, part)
    found: dict[str, Mapping[str, Seen]] = {**members}
    for name, changed in after.items():
        devices = members.get(name, {})
        if name not in members or before.get(name, {}) != changed:
            devices = {**{i: seen for i, seen in devices.items() if i in changed or i not in device_ids}, **changed}
        found[name] = devices
    return found, {**lists, **{name: _merged(lists.get(name), of, device_ids) for name, of in told.items()}}, told


def differing(
    before: tuple[Advertised, ...], after: tuple[Advertised, ...]
) -> list[tuple[Advertised | None, Advertised]]:
    """The devices of a list that are not the very same as before, each with what it was."""
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
    told = {device.id: device for device in changed}
    after, same = [*before], True
    for device_id in device_ids:
        place = bisect_left(after, device_id, key=attrgetter("id"))
        known = after[place] if place < len(after) and after[place].id == device_id else None
        now = told.get(device_id)
        if known != now:
            after[place : place + (known is not None)] = [now] if now is not None else []
            same = False
    return before if same else tuple(after)
