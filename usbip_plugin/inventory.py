"""What each resource advertises, and why: pure functions from what is known to what the kubelet is told.

Known devices = listed by a server now, or locked now, or seen before. A device that vanishes becomes Unhealthy and is
never dropped, because the kubelet would forget a running pod's device; only a new configuration drops it, and not while
it is claimed on this node.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from usbip_plugin.claims import Claim, State, serves
from usbip_plugin.config import Config, DeviceSelector, Match, ResourceConfig, matches
from usbip_plugin.locks.manager import Standing
from usbip_plugin.model import Advertised, Descriptor, DeviceKey, Health, Lock, Reason, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerState, ServerView
from usbip_plugin.usbip.protocol import valid_busid

API_GRACE = 15.0
"""Seconds without the API server after which devices that this node does not hold become Unhealthy (rule R7)."""

RESET_GRACE = 1.0
"""Seconds after a release in which a server that does not list the device says nothing.

usbip-host resets a device for about 0.3 s and hides it meanwhile; an import then waits for it (retry.import_busy).
"""

MAX_VANISHED = 256
"""Devices of one server that a resource remembers although nobody lists, locks or claims them; the oldest go first.

A server that lists others each time it is asked would otherwise fill the node's memory, and the kubelet's.
"""

MAX_LOCKS = 512
"""Of one server. With so many, a device that has none yet is not locked to read its serial number: Leases stay."""

MAX_PROBES = 16
"""Devices of one server whose serial numbers are read at a time, those that wait for their next try included."""

SUPER_SPEED = 5
MAX_TCP_PORT = 65535
_PORT = re.compile("[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Seen:
    """A device a resource offers, as last seen. descriptor is None while only its lock is known."""

    key: DeviceKey
    usb_id: UsbId
    selector: DeviceSelector
    descriptor: Descriptor | None = None
    serial: str | None = None


Members = Mapping[str, Mapping[str, Seen]]
"""resource name -> device ID -> Seen. Carried from one evaluation to the next."""


@dataclass(frozen=True, slots=True)
class Driver:
    """This node's vhci_hcd. error is None while it can attach; free and used ports by hub."""

    error: str | None = None
    free_hs: int = 1
    free_ss: int = 1
    used_hs: int = 0
    used_ss: int = 0


@dataclass(frozen=True, slots=True)
class Api:
    """The API server as the lock watch sees it. unreachable_for: seconds, None while it answers."""

    unreachable_for: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that decides what is advertised. Mappings by device ID, servers by key.

    released: devices let go by their holder within the last RESET_GRACE seconds. moved_here(device_id): the claim on
    another device that is attached from this one's place.
    """

    me: str
    config: Config
    servers: Mapping[ServerKey, ServerView]
    locks: Mapping[str, Lock]
    standings: Mapping[str, Standing]
    claims: Mapping[str, Claim]
    driver: Driver = field(default_factory=Driver)
    api: Api = field(default_factory=Api)
    released: frozenset[str] = frozenset()
    moved_here: Callable[[str], Claim | None] = lambda _device_id: None


def key_of(lock: Lock) -> DeviceKey | None:
    """The device a lock is about, None if its annotations do not say so or do not hash to its own name."""
    if not lock.server or not lock.busid:
        return None
    host, _, port = lock.server.rpartition(":")
    if not host or not _PORT.fullmatch(port) or not 0 < int(port) <= MAX_TCP_PORT or not valid_busid(lock.busid):
        return None  # nobody could connect to that
    key = DeviceKey(ServerKey(host.removeprefix("[").removesuffix("]"), int(port)), lock.busid)
    return key if key.id == lock.device_id else None


def parse_usb_id(text: str | None) -> UsbId | None:
    """ "0951:1666" as the lock's annotation has it; None for anything else."""
    vendor, _, product = (text or "").partition(":")
    if len(vendor) != 4 or len(product) != 4:
        return None
    try:
        return UsbId(int(vendor, 16), int(product, 16))
    except ValueError:
        return None


def _bare(busid: str, usb_id: UsbId) -> Descriptor:
    """What can be said of a device whose server does not list it now."""
    return Descriptor(busid, "", 0, 0, 0, usb_id, 0, 0, 0, 0, 0, 0, 0)


def _candidates(facts: Facts) -> Iterable[tuple[DeviceKey, Descriptor, bool]]:
    """(key, descriptor, listed now) of every device that can be seen anywhere, listed ones last so that they win."""
    for lock in facts.locks.values():
        key, usb_id = key_of(lock), parse_usb_id(lock.usb_id)
        if key is not None and usb_id is not None:
            yield key, _bare(key.busid, usb_id), False
    for claim in facts.claims.values():
        yield claim.key, _bare(claim.key.busid, claim.usb_id), False
    for server, view in facts.servers.items():
        for descriptor in view.devices:
            yield DeviceKey(server, descriptor.busid), descriptor, True


def learn(before: Members, facts: Facts) -> Members:
    """The devices each resource offers now, given those it offered before."""
    found: dict[str, dict[str, Seen]] = {}
    candidates = list(_candidates(facts))
    for resource in facts.config.resources:
        mine: dict[str, Seen] = {}
        old = before.get(resource.name, {})
        for device_id, seen in old.items():
            selector = _selector_for(
                resource, seen.key, seen.descriptor or _bare(seen.key.busid, seen.usb_id), seen.serial
            )
            if selector is not None:
                mine[device_id] = Seen(seen.key, seen.usb_id, selector, seen.descriptor, seen.serial)
            elif _claimed_from(facts, device_id, resource.name):
                mine[device_id] = seen
        for key, descriptor, listed in candidates:
            lock = facts.locks.get(key.id)
            serial = lock.serial if lock is not None else None
            selector = _selector_for(resource, key, descriptor, serial)
            if selector is None:
                continue
            known = mine.get(key.id)
            if listed or known is None:
                mine[key.id] = Seen(key, descriptor.usb_id, selector, descriptor if listed else None, serial)
            elif serial is not None:
                mine[key.id] = Seen(key, known.usb_id, selector, known.descriptor, serial)
        for claim in facts.claims.values():
            if claim.resource == resource.name and claim.id not in mine and resource.devices:
                # its pod has it by this resource, whatever is said of the device by now, and may be older than us
                here = (selector for selector in resource.devices if selector.target == claim.key.server)
                mine[claim.id] = Seen(claim.key, claim.usb_id, next(here, resource.devices[0]))
        for device_id in _too_old(mine, {key.id for key, _, _ in candidates}):
            del mine[device_id]
        found[resource.name] = mine
    for name, devices in before.items():
        held = {i: seen for i, seen in devices.items() if _claimed_from(facts, i, name)}
        if name not in found and held:
            found[name] = held
    return found


def _too_old(mine: dict[str, Seen], present: Collection[str]) -> list[str]:
    """Those that are not present and beyond MAX_VANISHED of their server, counted from the one learnt last."""
    room: Counter[ServerKey] = Counter()
    gone: list[str] = []
    for device_id, seen in reversed(mine.items()):
        if device_id not in present:
            room[seen.key.server] += 1
            if room[seen.key.server] > MAX_VANISHED:
                gone.append(device_id)
    return gone


def _claimed_from(facts: Facts, device_id: str, resource: str) -> bool:
    """A claim that was adopted does not know by which resource it was made."""
    claim = facts.claims.get(device_id)
    return claim is not None and claim.resource in (resource, None)


def wanting_serial(facts: Facts) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Listed devices that some selector could take if only their serial number were known.

    A device that has no lock yet is left out where its server has MAX_LOCKS already.
    """
    locked = Counter(key.server for lock in facts.locks.values() if (key := key_of(lock)) is not None)
    wanted: dict[str, tuple[DeviceKey, Descriptor]] = {}
    for key, descriptor, listed in _candidates(facts):
        lock = facts.locks.get(key.id)
        if not listed or (lock is not None and lock.serial is not None):
            continue
        if lock is None and locked[key.server] >= MAX_LOCKS:
            continue
        for resource in facts.config.resources:
            for selector in resource.devices:
                if selector.target == key.server and matches(selector.selector, descriptor, None) is Match.NEEDS_SERIAL:
                    wanted[key.id] = (key, descriptor)
    return tuple(wanted[device_id] for device_id in sorted(wanted))


def next_probes(
    wanted: Iterable[tuple[DeviceKey, Descriptor]],
    running: Mapping[str, ServerKey],
    last: Mapping[ServerKey, str],
) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Which serial numbers to begin to read: MAX_PROBES of a server at a time, in turn after the one begun last.

    running: by device ID, those under way; last: of each server, the ID begun last.
    """
    room = Counter(running.values())
    chosen = []
    for key, descriptor in sorted(wanted, key=lambda one: (one[0].id <= last.get(one[0].server, ""), one[0].id)):
        if key.id not in running and room[key.server] < MAX_PROBES:
            room[key.server] += 1
            chosen.append((key, descriptor))
    return tuple(chosen)


def configured(config: Config, key: DeviceKey, descriptor: Descriptor, serial: str) -> bool:
    """Whether some resource offers such a device at this place. Its class is left out: it may not be listed yet."""
    return any(
        device.target == key.server and matches(replace(device.selector, class_=None), descriptor, serial) is Match.YES
        for resource in config.resources
        for device in resource.devices
    )


def _selector_for(
    resource: ResourceConfig, key: DeviceKey, descriptor: Descriptor, serial: str | None
) -> DeviceSelector | None:
    for selector in resource.devices:
        if selector.target == key.server and matches(selector.selector, descriptor, serial) is Match.YES:
            return selector
    return None


def health(facts: Facts, seen: Seen, resource: str) -> Health:
    """Why the device can or cannot be had on this node as this resource. The first reason that holds, nearest to this
    node first."""
    device_id = seen.key.id
    claim = facts.claims.get(device_id)
    if claim is not None:
        if not serves(claim, resource, seen.usb_id):
            # the kubelet counts each resource by itself, and would give it to a second pod
            return Health(Reason.OTHER_RESOURCE, f"a {claim.usb_id} of {claim.resource or 'unknown'}")
        return _claim_health(claim, facts)
    if (moved := facts.moved_here(device_id)) is not None:
        return Health(Reason.IN_PLACE_OF, f"it is what was {moved.key}" + (f", pod {moved.pod}" if moved.pod else ""))
    lock = facts.locks.get(device_id)
    standing = facts.standings.get(device_id, Standing.FREE)
    if standing is Standing.HELD and lock is not None:
        return Health(Reason.HELD_ELSEWHERE, _held_by(lock))
    if facts.api.unreachable_for is not None and facts.api.unreachable_for >= API_GRACE:
        return Health(Reason.API_UNREACHABLE, facts.api.error)
    if facts.driver.error is not None:
        return Health(Reason.NO_DRIVER, facts.driver.error)
    unlisted = _server_health(facts.servers.get(seen.key.server), seen)
    resetting = device_id in facts.released and unlisted is not None and unlisted.reason is Reason.NOT_LISTED
    if unlisted is not None and not resetting:
        return unlisted
    speed = seen.descriptor.speed if seen.descriptor is not None else 0
    if (facts.driver.free_ss if speed >= SUPER_SPEED else facts.driver.free_hs) == 0:
        return Health(Reason.NO_PORT, f"no free {'ss' if speed >= SUPER_SPEED else 'hs'} port")
    if standing is Standing.EXPIRED and lock is not None:
        return Health(Reason.HOLDER_EXPIRED, f"{_held_by(lock)}, silent for longer than the lock lasts")
    return Health(Reason.FREE)


def _claim_health(claim: Claim, facts: Facts) -> Health:
    lock = facts.locks.get(claim.id)
    match claim.state:
        case State.RELEASING if lock is not None and lock.holder not in ("", facts.me):
            return Health(Reason.HELD_ELSEWHERE, _held_by(lock))
        case State.RELEASING if facts.api.unreachable_for is not None:
            # it can be had again only when its lock has been released, and that may take a while
            return Health(Reason.API_UNREACHABLE, facts.api.error)
        case State.ATTACHED:
            where = f", listed as {claim.place.busid} now" if claim.moved_to is not None else ""
            return Health(Reason.ATTACHED, f"port {claim.port}{where}" + (f", pod {claim.pod}" if claim.pod else ""))
        case State.REATTACHING:
            hindrance = f"; {claim.hindrance}" if claim.hindrance else ""
            return Health(Reason.LOST, f"connection to {claim.key.server} lost{hindrance}")
        case State.LOST:
            by_hand = "released by hand; end its pod" if lock is not None and lock.by_hand else ""
            return Health(Reason.LOCK_LOST, _held_by(lock) if lock is not None and lock.holder else by_hand)
        case _:
            return Health(Reason.IN_PROGRESS, claim.state.value)


def _server_health(view: ServerView | None, seen: Seen) -> Health | None:
    """None if the server lists the promised device."""
    server = seen.key.server
    if view is None or view.state is ServerState.PENDING:
        return Health(Reason.UNKNOWN, f"{server} has not answered yet")
    if view.state is ServerState.UNREACHABLE:
        return Health(Reason.SERVER_UNREACHABLE, view.error or str(server))
    listed = next((d for d in view.devices if d.busid == seen.key.busid), None)
    if listed is None:
        return Health(Reason.NOT_LISTED, f"{server} does not list {seen.key.busid}: unplugged, not bound, or in use")
    if listed.usb_id != seen.usb_id:
        return Health(Reason.LISTED_WRONG, f"{seen.key} is now {listed.usb_id}, was {seen.usb_id}")
    return None


def _held_by(lock: Lock) -> str:
    text = f"held by node {lock.holder}"
    if lock.pod is not None:
        text += f" for pod {lock.pod}"
    if lock.acquired_at is not None:
        text += f" since {lock.acquired_at:%Y-%m-%dT%H:%M:%SZ}"
    return text


def advertise(members: Members, facts: Facts) -> Mapping[str, tuple[Advertised, ...]]:
    """What each resource tells the kubelet, by resource name, devices sorted by ID."""
    return {
        resource: tuple(Advertised(i, seen.key, health(facts, seen, resource)) for i, seen in sorted(devices.items()))
        for resource, devices in members.items()
    }


def importable(servers: Mapping[ServerKey, ServerView]) -> frozenset[str]:
    """IDs of the devices that a reachable server lists now: usbipd hides those in use."""
    return frozenset(
        DeviceKey(server, descriptor.busid).id
        for server, view in servers.items()
        if view.state is ServerState.REACHABLE
        for descriptor in view.devices
    )


def preferred(
    available: Iterable[str], must: Iterable[str], size: int, node: str, health_by_id: Mapping[str, Health]
) -> tuple[str, ...]:
    """GetPreferredAllocation: the must-haves, then attached here, then healthy, in rendezvous order of (node, device).

    Different nodes thus reach for different devices first, and contend less.
    """
    chosen = list(dict.fromkeys(must))

    def order(device_id: str) -> tuple[int, bytes]:
        known = health_by_id.get(device_id)
        rank = 2 if known is None or not known.healthy else 1
        if known is not None and known.reason is Reason.ATTACHED:
            rank = 0
        return rank, hashlib.sha256(f"{node}/{device_id}".encode()).digest()

    rest = sorted(set(available) - set(chosen), key=order)
    return tuple(chosen + rest[: max(0, size - len(chosen))])
