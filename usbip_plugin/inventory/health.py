"""Decides why a device is available or not, and which devices share a configured serial number. Pure functions.

If several reasons apply, a device shows the first in this order: its claim on this node, the configuration, other
nodes' locks, API server, driver, server, ports, failed Allocates.

If two devices have the same serial number, neither is offered by it. A device in use owns its serial number while it is
lost, so that it can be re-attached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from usbip_plugin.claims import Claim, ClaimState, place_of, serves
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.errors import OTHER_BOOT
from usbip_plugin.inventory.snapshot import OfferedDevice, Snapshot
from usbip_plugin.inventory.turns import OFFERED_BY_ALL_S
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, Health, Lock, Reason, described
from usbip_plugin.usbip.client import why_unlisted
from usbip_plugin.usbip.poller import ServerState

_SHOWN = 3
"""Maximum number of devices that one reason names."""
_FREE = frozenset({Reason.FREE, Reason.HANDED_OVER, Reason.HOLDER_EXPIRED})
_AWAY = frozenset({Reason.NOT_LISTED, Reason.LISTED_WRONG, Reason.SERVER_UNREACHABLE})


SerialOwners = Mapping[DeviceKey, str]
"""The devices that own one serial number: listed as free with it, or locked with it. Value: the holder, "" for none."""


def serial_owners(
    devices: Mapping[str, OfferedDevice], healths: Mapping[str, Health], snapshot: Snapshot
) -> Mapping[str, SerialOwners]:
    """Returns the owners of each serial number by which a resource offers more than one device.

    devices: the devices of one resource, by device ID.
    healths: the result of health() for each of them, by device ID.
    """
    counts = Counter(serial for offered in devices.values() if (serial := offered.serial) is not None)
    owners: dict[str, dict[DeviceKey, str]] = {serial: {} for serial, n in counts.items() if n > 1}
    if not owners:
        return {}
    moved = {lock.in_place_of for lock in snapshot.locks.values() if lock.holder}
    for device_id, offered in devices.items():
        serial, lock = offered.serial, snapshot.locks.get(device_id)
        if serial not in owners or lock is None or lock.serial != serial:
            continue
        if lock.holder and healths[device_id].reason is not Reason.HOLDER_EXPIRED:
            # if another bus ID is locked in place of this one, the device is there, not here
            if device_id not in moved:
                owners[serial][offered.key] = lock.holder
        elif device_id in snapshot.released or import_obstacle(snapshot, offered) is None:
            owners[serial][offered.key] = ""
    return owners


def resolve_ambiguity(health: Health, key: DeviceKey, serial: str, owners: SerialOwners) -> Health:
    """Returns the health of a device offered by its serial number, given all owners of that serial number."""
    others = [
        str(other) + (f" (held by node {holder})" if holder else "")
        for other, holder in sorted(owners.items())
        if other != key
    ]
    if not others:
        return health
    more = len(others) - _SHOWN
    names = " and ".join(others[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    if health.reason in _FREE:
        return Health(Reason.AMBIGUOUS, f"serial number {serial} also belongs to {names}; select by bus_id as well")
    if health.reason in _AWAY:
        return Health(Reason.MOVED, f"serial number {serial} is now at {names}")
    return health


API_GRACE = 15.0
"""Seconds without the API server after which devices that this node does not hold become Unhealthy (rule R7)."""

SUPER_SPEED = 5
"""USB_SPEED_SUPER of the kernel (include/uapi/linux/usb/ch9.h). Such devices and faster ones need an ss port."""


def health(snapshot: Snapshot, offered: OfferedDevice, resource: str) -> Health:
    """Returns why the device is available or unavailable on this node as this resource."""
    device_id = offered.key.id
    claim = snapshot.claims.get(device_id)
    if claim is not None:
        if not serves(claim, resource, offered.usb_id):
            # the kubelet counts each resource by itself, and would give the device to a second pod
            return Health(
                Reason.OTHER_RESOURCE, f"through resource {claim.resource or 'unknown'}, as device {claim.usb_id}"
            )
        if not offered.configured and (claim.state is ClaimState.RELEASING or claim.pod_ended):
            return Health(Reason.NOT_CONFIGURED, "its pod has ended; it is being released and no longer offered")
        return _claim_health(claim, snapshot)
    if not offered.configured:
        return Health(Reason.NOT_CONFIGURED)
    if (moved := snapshot.moved_here(device_id)) is not None:
        return Health(Reason.IN_PLACE_OF, f"moved here from {moved.key}" + (f", pod {moved.pod}" if moved.pod else ""))
    lock = snapshot.locks.get(device_id)
    status = snapshot.lock_statuses.get(device_id, LockStatus.FREE)
    if status is LockStatus.HELD and lock is not None:
        view = snapshot.servers.get(offered.key.server)
        only = "; its server lists devices in use, so it is not taken over" if view and view.lists_in_use else ""
        return Health(Reason.HELD_ELSEWHERE, _held_by(lock) + only)
    if status is LockStatus.MINE:
        return Health(Reason.IN_PROGRESS, "this node holds its lock: it is being adopted or read")
    if snapshot.api.unreachable_for is not None and snapshot.api.unreachable_for >= API_GRACE:
        return Health(Reason.API_UNREACHABLE, snapshot.api.error)
    if snapshot.driver.error is not None:
        return Health(Reason.NO_DRIVER, snapshot.driver.error)
    unlisted = import_obstacle(snapshot, offered)
    resetting = device_id in snapshot.released and unlisted is not None and unlisted.reason is Reason.NOT_LISTED
    if unlisted is not None and not resetting:
        return replace(unlisted, detail=unlisted.detail + _other_boot(snapshot, device_id))
    speed = offered.descriptor.speed if offered.descriptor is not None else 0
    if (snapshot.driver.free_ss if speed >= SUPER_SPEED else snapshot.driver.free_hs) == 0:
        hub = "SuperSpeed (ss)" if speed >= SUPER_SPEED else "high-speed (hs)"
        return Health(Reason.NO_PORT, f"no free {hub} port of vhci_hcd")
    if (cause := snapshot.paused.get(device_id)) is not None:
        return Health(Reason.ALLOCATES_FAILED, cause)
    if status is LockStatus.EXPIRED and lock is not None:
        return Health(Reason.HOLDER_EXPIRED, f"{_held_by(lock)}, silent for longer than the lock duration")
    if device_id in snapshot.awaited:
        return Health(Reason.HANDED_OVER, f"offered here within {OFFERED_BY_ALL_S:g} s, unless another node takes it")
    return Health(Reason.FREE)


def import_obstacle(snapshot: Snapshot, offered: OfferedDevice) -> Health | None:
    """Returns why the device cannot be imported from its server now, or None if the server lists the offered device."""
    server = offered.key.server
    view = snapshot.servers.get(server)
    if view is None or view.state is ServerState.PENDING:
        return Health(Reason.UNKNOWN, f"{server} has not answered yet")
    if view.state is ServerState.UNREACHABLE:
        return Health(Reason.SERVER_UNREACHABLE, view.error or str(server))
    listed = view.by_busid.get(offered.key.busid)
    if listed is None:
        if why := why_unlisted(view.problems, offered.key.busid):
            return Health(Reason.NOT_LISTED, f"{server}: {why}")
        return Health(Reason.NOT_LISTED, f"{server} does not list {offered.key.busid}: unplugged, not bound, or in use")
    if listed.usb_id != offered.usb_id:
        return Health(Reason.LISTED_WRONG, f"expected {offered.usb_id} at {offered.key}, got {listed.usb_id}")
    if listed.is_hub:
        return Health(Reason.LISTED_WRONG, f"{offered.key} is a USB hub, and USB/IP cannot carry hubs")
    return _identity_health(snapshot, offered, listed)


def _claim_health(claim: Claim, snapshot: Snapshot) -> Health:
    lock = snapshot.locks.get(claim.id)
    match claim.state:
        case ClaimState.RELEASING if lock is not None and lock.holder not in ("", snapshot.me):
            return Health(Reason.HELD_ELSEWHERE, _held_by(lock))
        case ClaimState.RELEASING if snapshot.lock_statuses.get(claim.id) is LockStatus.OTHER_BOOT and lock is not None:
            return Health(Reason.HELD_ELSEWHERE, f"{_held_by(lock)} {OTHER_BOOT}")
        case ClaimState.RELEASING if snapshot.api.unreachable_for is not None:
            # the device is available again only after its lock has been released, and that may take a while
            return Health(Reason.API_UNREACHABLE, snapshot.api.error)
        case ClaimState.ATTACHED:
            where = f", now listed as {place_of(claim)}" if claim.moved_to is not None else ""
            pod = f", pod {claim.pod}" if claim.pod else ""
            withheld = claim.attachment.withheld if claim.attachment is not None else ()
            without = f", without {' and '.join(map(described, withheld))}" if withheld else ""
            return Health(Reason.ATTACHED, f"port {claim.port}{where}{pod}{without}")
        case ClaimState.REATTACHING:
            why = (f"; {claim.blocked_by}" if claim.blocked_by else "") + _other_boot(snapshot, claim.id)
            return Health(Reason.LOST, f"connection to {claim.location.server} lost{why}")
        case ClaimState.LOST:
            if lock is None or not lock.holder:
                stays = lock is not None and lock.stays_released(claim.pod)
                cure = "released by a person; delete its pod to make it available" if stays else ""
                return Health(Reason.LOCK_LOST, cure)
            other_boot = snapshot.lock_statuses.get(claim.id) is LockStatus.OTHER_BOOT
            return Health(Reason.LOCK_LOST, _held_by(lock) + (f" {OTHER_BOOT}" if other_boot else ""))
        case _ if (cause := snapshot.paused.get(claim.id)) is not None:  # a failed Allocate is being undone
            return Health(Reason.ALLOCATES_FAILED, cause)
        case _:
            return Health(Reason.IN_PROGRESS, claim.state.value)


def _identity_health(snapshot: Snapshot, offered: OfferedDevice, listed: Descriptor) -> Health | None:
    """Returns None if the device's identity matches its selector, or the selector has no serial number and no class."""
    selector = offered.selector.selector
    if selector.serial is None and selector.class_ is None:
        return None
    identity = snapshot.identity_of(offered.key.id, listed)
    match matches(selector, listed, identity):
        case Match.NEEDS_PROBE:
            return Health(
                Reason.NOT_READ,
                f"{offered.key} was unplugged or renumbered and may be another device; waiting for a probe",
            )
        case Match.NO if selector.serial is not None and identity.serial != selector.serial:
            detail = f"expected serial number {selector.serial} at {offered.key}, got {identity.serial or 'none'}"
            return Health(Reason.LISTED_WRONG, detail)
        case Match.NO:
            return Health(Reason.LISTED_WRONG, f"{offered.key} no longer matches {selector}")
        case Match.YES:
            return None


def _other_boot(snapshot: Snapshot, device_id: str) -> str:
    """Returns, to be appended to a reason, that a machine of this node's name holds the lock, or "" (R3)."""
    if snapshot.lock_statuses.get(device_id) is not LockStatus.OTHER_BOOT:
        return ""
    return f"; {_held_by(snapshot.locks[device_id])} {OTHER_BOOT}"


def _held_by(lock: Lock) -> str:
    text = f"held by node {lock.holder}"
    if lock.pod is not None:
        text += f" for pod {lock.pod}"
    if lock.acquired_at is not None:
        text += f" since {lock.acquired_at:%Y-%m-%dT%H:%M:%SZ}"
    return text
