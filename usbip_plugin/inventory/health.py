"""Decides why a device is available or not, and which devices share a configured serial number. Pure functions.

The reason of a device is the first that applies, those nearest to this node first.

One device owns a serial number, wherever it is plugged in. Two devices with the same number are clones, or the
selector names too much: neither is offered by that number. A device in use owns its number too, so that a pod that
has lost it for the moment can find it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from usbip_plugin.claims import Claim, ClaimState, place_of, serves
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.inventory.facts import OfferedDevice, Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, Health, Lock, Reason
from usbip_plugin.usbip.poller import ServerState

_SHOWN = 3
"""Maximum number of devices that one reason names."""
_FREE = frozenset({Reason.FREE, Reason.HOLDER_EXPIRED})
_AWAY = frozenset({Reason.NOT_LISTED, Reason.LISTED_WRONG, Reason.SERVER_UNREACHABLE})


@dataclass(frozen=True, order=True, slots=True)
class SerialOwner:
    """A device that has a serial number, or whose lock is held for the device with that serial number.

    holder: the node that holds the lock; "" if no node does.
    """

    key: DeviceKey
    holder: str = ""

    def __str__(self) -> str:
        return f"{self.key}" + (f" (held by node {self.holder})" if self.holder else "")


def serial_owners(
    devices: Mapping[str, OfferedDevice], found: Mapping[str, Health], facts: Snapshot
) -> Mapping[str, tuple[SerialOwner, ...]]:
    """Returns the owners of each serial number by which a resource offers more than one device.

    devices: the devices of one resource, by device ID.
    found: the result of health() for each of them, by device ID.
    """
    serials = [serial for seen in devices.values() if (serial := seen.selector.selector.serial) is not None]
    borne: dict[str, list[SerialOwner]] = (
        {serial: [] for serial, n in Counter(serials).items() if n > 1} if serials else {}
    )
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
            # a lock held for a device that is attached from another bus id: the device is there, not here
            if device_id not in moved:
                borne[serial].append(SerialOwner(seen.key, lock.holder))
        elif device_id in facts.released or import_obstacle(facts, seen) is None:
            borne[serial].append(SerialOwner(seen.key))
    return {serial: tuple(who) for serial, who in borne.items()}


def resolve_ambiguity(health: Health, key: DeviceKey, serial: str, bearers: Collection[SerialOwner]) -> Health:
    """Returns the health of a device offered by its serial number, given all owners of that serial number."""
    others = sorted(bearer for bearer in bearers if bearer.key != key)
    if not others:
        return health
    if health.reason in _FREE:
        detail = f"serial number {serial} is also that of {_listed(others)}; select by bus_id as well"
        return Health(Reason.AMBIGUOUS, detail)
    if health.reason in _AWAY:
        return Health(Reason.MOVED, f"the device with serial number {serial} is {_listed(others)} now")
    return health


def _listed(bearers: Sequence[SerialOwner]) -> str:
    more = len(bearers) - _SHOWN
    return " and ".join(map(str, bearers[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


API_GRACE = 15.0
"""Seconds without the API server after which devices that this node does not hold become Unhealthy (rule R7)."""

SUPER_SPEED = 5
"""USB_SPEED_SUPER of the kernel (include/uapi/linux/usb/ch9.h). Such devices and faster ones need an ss port."""


def health(facts: Snapshot, seen: OfferedDevice, resource: str) -> Health:
    """Returns why the device is available or unavailable on this node as this resource.

    If several reasons hold, the one nearest to this node wins.
    """
    device_id = seen.key.id
    claim = facts.claims.get(device_id)
    if claim is not None:
        if not serves(claim, resource, seen.usb_id):
            # the kubelet counts each resource by itself, and would give the device to a second pod
            return Health(Reason.OTHER_RESOURCE, f"a {claim.usb_id} of {claim.resource or 'unknown'}")
        if not seen.configured and (claim.state is ClaimState.RELEASING or claim.pod_ended):
            return Health(Reason.NOT_CONFIGURED, "its pod has ended, and nobody new is to have it")
        return _claim_health(claim, facts)
    if not seen.configured:
        return Health(Reason.NOT_CONFIGURED)
    if (moved := facts.moved_here(device_id)) is not None:
        return Health(Reason.IN_PLACE_OF, f"it is what was {moved.key}" + (f", pod {moved.pod}" if moved.pod else ""))
    lock = facts.locks.get(device_id)
    standing = facts.lock_statuses.get(device_id, LockStatus.FREE)
    if standing is LockStatus.HELD and lock is not None:
        return Health(Reason.HELD_ELSEWHERE, _held_by(lock))
    if facts.api.unreachable_for is not None and facts.api.unreachable_for >= API_GRACE:
        return Health(Reason.API_UNREACHABLE, facts.api.error)
    if facts.driver.error is not None:
        return Health(Reason.NO_DRIVER, facts.driver.error)
    unlisted = import_obstacle(facts, seen)
    resetting = device_id in facts.released and unlisted is not None and unlisted.reason is Reason.NOT_LISTED
    if unlisted is not None and not resetting:
        return unlisted
    speed = seen.descriptor.speed if seen.descriptor is not None else 0
    if (facts.driver.free_ss if speed >= SUPER_SPEED else facts.driver.free_hs) == 0:
        return Health(Reason.NO_PORT, f"no free {'ss' if speed >= SUPER_SPEED else 'hs'} port")
    if standing is LockStatus.EXPIRED and lock is not None:
        return Health(Reason.HOLDER_EXPIRED, f"{_held_by(lock)}, silent for longer than the lock lasts")
    return Health(Reason.FREE)


def import_obstacle(facts: Snapshot, seen: OfferedDevice) -> Health | None:
    """Returns why the device cannot be imported from its server now, or None if the server lists the offered device."""
    server = seen.key.server
    view = facts.servers.get(server)
    if view is None or view.state is ServerState.PENDING:
        return Health(Reason.UNKNOWN, f"{server} has not answered yet")
    if view.state is ServerState.UNREACHABLE:
        return Health(Reason.SERVER_UNREACHABLE, view.error or str(server))
    listed = view.by_busid.get(seen.key.busid)
    if listed is None:
        return Health(Reason.NOT_LISTED, f"{server} does not list {seen.key.busid}: unplugged, not bound, or in use")
    if listed.usb_id != seen.usb_id:
        return Health(Reason.LISTED_WRONG, f"{seen.key} is now {listed.usb_id}, was {seen.usb_id}")
    return _identity_health(facts, seen, listed)


def _claim_health(claim: Claim, facts: Snapshot) -> Health:
    lock = facts.locks.get(claim.id)
    match claim.state:
        case ClaimState.RELEASING if lock is not None and lock.holder not in ("", facts.me):
            return Health(Reason.HELD_ELSEWHERE, _held_by(lock))
        case ClaimState.RELEASING if facts.api.unreachable_for is not None:
            # the device is available again only after its lock has been released, and that may take a while
            return Health(Reason.API_UNREACHABLE, facts.api.error)
        case ClaimState.ATTACHED:
            where = f", listed as {place_of(claim)} now" if claim.moved_to is not None else ""
            return Health(Reason.ATTACHED, f"port {claim.port}{where}" + (f", pod {claim.pod}" if claim.pod else ""))
        case ClaimState.REATTACHING:
            why = f"; {claim.blocked_by}" if claim.blocked_by else ""
            return Health(Reason.LOST, f"connection to {claim.key.server} lost{why}")
        case ClaimState.LOST:
            by_hand = "released by hand; end its pod" if lock is not None and lock.by_hand else ""
            return Health(Reason.LOCK_LOST, _held_by(lock) if lock is not None and lock.holder else by_hand)
        case _:
            return Health(Reason.IN_PROGRESS, claim.state.value)


def _identity_health(facts: Snapshot, seen: OfferedDevice, listed: Descriptor) -> Health | None:
    """Returns None if the device's identity matches its selector, or the selector has no serial number and no class."""
    selector = seen.selector.selector
    if selector.serial is None and selector.class_ is None:
        return None
    identity = facts.identity_of(seen.key.id, listed)
    match matches(selector, listed, identity):
        case Match.NEEDS_PROBE:
            return Health(Reason.NOT_READ, f"{seen.key} was plugged in anew, and may be another device")
        case Match.NO if selector.serial is not None and identity.serial != selector.serial:
            number = f"serial number {identity.serial}" if identity.serial else "no serial number"
            return Health(Reason.LISTED_WRONG, f"{seen.key} has {number} now, not {selector.serial}")
        case Match.NO:
            return Health(Reason.LISTED_WRONG, f"{seen.key} is now a device that {selector} does not name")
        case Match.YES:
            return None


def _held_by(lock: Lock) -> str:
    text = f"held by node {lock.holder}"
    if lock.pod is not None:
        text += f" for pod {lock.pod}"
    if lock.acquired_at is not None:
        text += f" since {lock.acquired_at:%Y-%m-%dT%H:%M:%SZ}"
    return text
