"""The lock rules R1 to R7 as pure functions: (record, observation, now) -> decision. No I/O, no clock.

R1 Write before touch: within the import window before an import, a compare-and-swap write on the lock has succeeded.
R2 Free: no object, or an empty holder.
R3 Mine: by node and by boot. Another boot of this node: only if the server, asked then, lists the device as free, and
   no machine with this boot was seen to write the lock within two import windows.
   Such a lock that nobody needs is left: it has no holder, but keeps its boot, and the next taker asks the server.
R4 Expired: unchanged for a whole duration, and after that the server, asked again, lists the device as free.
   The list of a server that was seen to list devices in use shows nothing.
R5 Release only when the local port is free (the caller's duty).
R6 Lost: the holder is another node, another boot, or nobody. A lock that nobody holds is taken again first, and so is,
   for a device that is attached here, a lock that a restore of etcd has set back to an earlier holder. A lock that a
   person has released is never taken again for the pod that had the device.
R7 API server unreachable: nothing new is taken, nothing held is released.

The Lease is not a fence. The USB/IP server is: it exports a device to one client at a time. The rules ensure that no
two nodes have an import in flight for one device, for four reasons:
- R4 requires that the lock was unchanged for a whole duration.
- R1 puts a change of the lock at most one import window before the end of any import.
- The import window is less than half the duration.
- The clocks of two nodes differ in rate by less than a factor of two.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Endpoint, Identity, Lock, NodeIdentity, PodRef, Tenure

UNKNOWN_POD = PodRef("", "")
"""Stands in LockMeta for a pod that has the device and is not known yet."""


@dataclass(frozen=True, slots=True)
class LockMeta:
    """What the holder of a lock writes about the device. None leaves the annotations as they are.

    usb_id: "vendor:product" in hex.
    identity: what was read from the device itself, merged into the annotations known so far.
    traceparent: W3C trace context of the operation.
    in_place_of: ID of the device that is to be attached from this bus ID; None clears the annotation if the lock is
        acquired.
    import_from: from where this node is about to import. None removes that of another epoch.
    serial: the serial number of the device that a pod has, "" if it is not known. With another one on the lock, the
        next process would give the pod another device.
    pod: the pod that has the device; UNKNOWN_POD removes the one that had it before.
    port: the vhci port to which the device is attached.
    """

    usb_id: str | None = None
    identity: Identity | None = None
    traceparent: str | None = None
    in_place_of: str | None = None
    import_from: Endpoint | None = None
    serial: str | None = None
    pod: PodRef | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """Values that go into every write of a lock or session Lease.

    at: wall clock time, for people only.
    write_id: random mark by which the node recognises its own write when it reads the Lease again.
    duration: seconds, written as leaseDurationSeconds, rounded up.
    """

    me: NodeIdentity
    at: datetime
    write_id: str
    duration: float


@dataclass(frozen=True, slots=True)
class Observation:
    """A period in which a lock and its holder's session were unchanged. Times are monotonic seconds of this node.

    lock_version, session_version: resourceVersions; "" if there is no session.
    duration: seconds for which both must stay unchanged before a takeover.
    since: taken after the answer that first showed this state.
    seen: taken before the request that last confirmed it. So seen - since never exceeds the time truly unchanged.
    """

    lock_version: str
    session_version: str
    duration: float
    since: float
    seen: float


@dataclass(frozen=True, slots=True)
class Create:
    """The decision to create a Lease. The API server refuses with a conflict if the name exists by now."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Replace:
    """The decision to replace a Lease: a compare-and-swap on lease.resource_version, the version decided upon."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Denied:
    """The decision to write nothing: the lock belongs to another node or boot, or to nobody. lease: that record."""

    lease: Lease | None


Decision = Create | Replace | Denied


class LockStatus(enum.Enum):
    """The state of a lock as one node sees it."""

    FREE = "free"
    """No Lease exists, or its holder is empty (R2)."""
    MINE = "mine"
    """The holder is this boot of this node."""
    OTHER_BOOT = "other boot"
    """The holder is this node's name under another boot id: the kernel before a reboot, or another machine (R3)."""
    HELD = "held"
    """Another node holds the lock, and this node has not seen it expire."""
    EXPIRED = "expired"
    """Another node holds the lock, and this node has seen this version unchanged for a whole duration (R4)."""


def import_deadline(sent_at: float, import_window: float) -> float:
    """Returns the monotonic time until which an import may run under a write sent at sent_at (R1).

    The window begins before the request: another node may see the write, and wait for its expiry, once it is sent.
    """
    return sent_at + import_window


def may_import(deadline: float, now: float) -> bool:
    """Returns whether an import may still be under way at the monotonic time now (R1)."""
    return now < deadline


def decide_acquire(
    lease: Lease | None,
    key: DeviceKey,
    meta: LockMeta,
    write: Write,
    observation: Observation | None,
    importable: bool,
) -> Decision:
    """Decides whether and how this node may take the lock on key (R2, R3, R4).

    importable: whether the server, asked after the lock had expired, lists the device as free. An older answer does not
    count: an import under the last write may have succeeded since. Nor does the answer of a server that lists devices
    in use, except for a lock that is_left(): when that was left, such a server did not list the device, or its holder
    had no port with it.
    """
    if lease is None:
        return Create(_taken(Lease(name=key.id, labels=record.LOCK_LABELS), key, meta, write))
    if is_mine(lease, write.me):
        return Replace(_stamped(lease, write, _acquired_notes(lease, key, meta), record.epoch_of(lease)))
    # two machines can have one name: the one that holds the lock under another boot id may be alive
    left = is_left(lease, write.me)
    given_up = left or of_another_boot(lease, write.me) or may_take_over(lease, observation)
    if (is_free(lease) and not left) or (importable and given_up):
        return Replace(_taken(lease, key, meta, write))
    return Denied(lease)


def decide_amend(lease: Lease | None, write: Write, changes: Mapping[str, str | None]) -> Decision:
    """Decides on a holder's write to its own lock: a renewal, or annotations (R1).

    Returns Denied if this boot of this node does not hold the lock any more (R6).
    """
    if lease is None or not is_mine(lease, write.me):
        return Denied(lease)
    return Replace(_stamped(lease, write, changes, record.epoch_of(lease)))


def decide_release(lease: Lease | None, write: Write, evident: bool) -> Decision:
    """Decides to clear the holder if it is this node (R5). Returns Denied if it is not.

    A lock of another boot is left: it keeps its boot id, because the machine with that boot may have the device (R3).
    It does not wait for a list with the device, because a bus ID may never be listed again.

    evident: whether the server's next list with the device shows that nobody has it: the server has answered now, and
        it hides devices in use, or does not list the device. No other lock of another boot is released.
    """
    if lease is not None and is_mine(lease, write.me):
        return released(lease, write)
    if lease is not None and of_another_boot(lease, write.me) and evident:
        left = released(lease, write).lease
        boot = lease.annotations.get(record.BOOT_ID, "unknown")
        return Replace(replace(left, annotations={**left.annotations, record.BOOT_ID: boot}))
    return Denied(lease)


def released(lease: Lease, write: Write) -> Replace:
    """Returns the write that clears the holder of a lock, whoever it is.

    Keeps what describes the device, and the last holder's traceparent, to which other nodes link their next steps.
    """
    gone = dict.fromkeys((record.BOOT_ID, record.PORT, record.POD, record.IN_PLACE_OF))
    notes = record.merged_annotations(lease.annotations, {**gone, record.WRITE_ID: write.write_id})
    return Replace(replace(lease, holder="", renew_time=write.at, annotations=notes))


def released_by_person(lease: Lease, at: datetime) -> Replace:
    """Returns the write by which a person clears the holder of a lock, whoever it is.

    The lock is not taken again for the pod that it names (R6). at: wall clock time.
    """
    write = Write(NodeIdentity(lease.holder, ""), at, record.BY_HAND, 0.0)
    after, lock = released(lease, write).lease, record.lock_of(lease)
    pods = (*lock.released_from, lock.pod) if lock.pod is not None else lock.released_from
    notes = {record.RELEASED_FROM: record.released_from_text(pods)}
    return Replace(replace(after, annotations=record.merged_annotations(after.annotations, notes)))


def decide_session(lease: Lease | None, write: Write) -> Decision:
    """Decides on a heartbeat: continues the session of this boot, or begins a new one."""
    name = record.session_name(write.me.node)
    base = lease or Lease(name=name)
    notes = record.merged_annotations(
        base.annotations, {record.BOOT_ID: write.me.boot_id, record.WRITE_ID: write.write_id}
    )
    beat = replace(
        base,
        holder=write.me.node,
        duration_seconds=math.ceil(write.duration),
        renew_time=write.at,
        annotations=notes,
        labels={**base.labels, **record.SESSION_LABELS},
    )
    if lease is None or not is_mine(lease, write.me):
        beat = replace(beat, acquire_time=write.at, transitions=record.epoch_of(base) + 1)
    return Create(beat) if lease is None else Replace(beat)


def is_free(lease: Lease | None) -> bool:
    """Returns whether nobody holds the lock: no Lease exists, or its holder is empty (R2)."""
    return lease is None or lease.holder == ""


def is_left(lease: Lease | None, me: NodeIdentity) -> bool:
    """Returns whether nobody holds the lock, but a machine of another boot may have the device (R3, R5).

    Or the server may still export the device to a dead connection of that machine.
    """
    return lease is not None and is_free(lease) and lease.annotations.get(record.BOOT_ID) not in (None, me.boot_id)


def is_mine(lease: Lease | None, me: NodeIdentity) -> bool:
    """Returns whether this boot of this node holds the lock (R3). If it no longer does, the lock is lost (R6)."""
    return lease is not None and lease.holder == me.node and lease.annotations.get(record.BOOT_ID) == me.boot_id


def of_another_boot(lease: Lease | None, me: NodeIdentity) -> bool:
    """Returns whether a machine of this node's name holds the lock under another boot id (R3).

    Usually that is the kernel before a reboot. It can also be another machine, which is cut off but alive.
    """
    return lease is not None and lease.holder == me.node and not is_mine(lease, me)


def shows_twin(old: Lock | None, new: Lock, me: NodeIdentity, *, listed: bool) -> bool:
    """Returns whether a change of a lock shows that another machine of this node's name is alive (R3).

    The kernel before a reboot takes no lock any more. A restore of etcd may bring back the lock that it had, but in no
    later epoch of the same Lease, and only by a list.
    """
    if new.holder != me.node or new.boot_id in (None, me.boot_id):
        return False
    return not listed if old is None else old.uid == new.uid and new.epoch > old.epoch


def twin_may_import(seen_for: float, import_window: float) -> bool:
    """Returns whether an import under a write by another boot of this node may not have begun yet (R1, R3).

    seen_for: seconds since this process saw the write. Two windows pass here while at least one passes on the clock of
    the machine that wrote.
    """
    return seen_for < 2 * import_window


def is_set_back(lease: Lease | None, me: NodeIdentity, tenure: Tenure | None) -> bool:
    """Returns whether a lock is older than this boot's last hold of it: etcd was restored from a backup (R6).

    Each new holder begins an epoch, and a release keeps it. So no later record of the same Lease has such an epoch. A
    Lease that was deleted and created again has another uid, and begins anew.
    """
    if lease is None or tenure is None or lease.uid != tenure.uid or is_mine(lease, me):
        return False
    epoch = record.epoch_of(lease)
    return epoch < tenure.epoch or (epoch == tenure.epoch and not is_free(lease))


class Loss(enum.Enum):
    """What to do about an attachment, after a look at its lock (R6)."""

    NONE = enum.auto()
    """The lock is this boot's. Nothing is lost."""
    REGAIN = enum.auto()
    """Nobody holds the lock, and no person has released it: take it again, and keep the attachment."""
    WAIT = enum.auto()
    """Another holder has the lock, but its import may still be refused, because the server has exported it here."""
    DETACH = enum.auto()
    """The device must be detached: a person has released it, or another holder keeps the lock."""


def decide_loss(lock: Lock | None, me: NodeIdentity, pod: PodRef | None, held_for: float, import_window: float) -> Loss:
    """Decides what becomes of an attachment whose lock has changed (R6).

    pod: the pod that has the device, None if it is not known.
    held_for: seconds for which this node has seen other holders in the lock.
    import_window: seconds after which a new holder has imported the device, or releases the lock again.
    """
    if lock is None or lock.holder == "":
        return Loss.DETACH if lock is not None and lock.stays_released(pod) else Loss.REGAIN
    if lock.names(me):
        return Loss.NONE
    return Loss.WAIT if held_for < import_window else Loss.DETACH


def observe(
    previous: Observation | None,
    lock: Lease,
    session: Lease | None,
    asked_at: float,
    answered_at: float,
    own_duration: float,
) -> Observation:
    """Returns the observation of a lock after one more read of its holder's session (R4).

    asked_at, answered_at: when the read was sent and answered (monotonic seconds).
    own_duration: the configured lock duration (seconds). The observation waits for the longest of lock, session (both
    at most MAX_DURATION_S) and own_duration.
    """
    versions = (lock.resource_version, session.resource_version if session is not None else "")
    if previous is not None and (previous.lock_version, previous.session_version) == versions:
        return replace(previous, seen=max(previous.seen, asked_at))
    asked_for = [lease.duration_seconds or 0 for lease in (lock, session) if lease is not None]
    duration = max(own_duration, float(min(max(0, *asked_for), record.MAX_DURATION_S)))
    return Observation(*versions, duration, answered_at, answered_at)


def expired(observation: Observation) -> bool:
    """Returns whether a lock was seen unchanged for its whole duration (R4)."""
    return observation.seen - observation.since >= observation.duration


def lives(before: Observation | None, after: Observation) -> bool:
    """Returns whether a holder was alive between two observations of its lock, and did not write the lock.

    A holder that has lost its device writes the lock at each try to attach it again. So if this goes on for a whole
    duration, the device of such a holder is in use, and a server that lists it all the time lists devices in use.
    """
    if before is None or before.lock_version != after.lock_version or not after.session_version:
        return False
    return before.session_version != after.session_version


def may_take_over(lease: Lease, observation: Observation | None) -> bool:
    """Returns whether this very version of a lock was seen to expire. The caller asks the server, too (R4)."""
    return observation is not None and observation.lock_version == lease.resource_version and expired(observation)


def lock_status(lease: Lease | None, me: NodeIdentity, observation: Observation | None) -> LockStatus:
    """Returns the state of a lock as this node sees it."""
    if lease is None or is_free(lease):
        return LockStatus.FREE
    if lease.holder == me.node:
        return LockStatus.MINE if is_mine(lease, me) else LockStatus.OTHER_BOOT
    return LockStatus.EXPIRED if may_take_over(lease, observation) else LockStatus.HELD


def _taken(lease: Lease, key: DeviceKey, meta: LockMeta, write: Write) -> Lease:
    """Returns the record with this node as holder, a new epoch, and without the last holder's pod, port and boot."""
    notes = {record.PORT: None, record.POD: None, **_acquired_notes(lease, key, meta)}
    epoch = record.epoch_of(lease) + 1
    taken = _stamped(lease, write, notes, epoch)
    return replace(taken, holder=write.me.node, acquire_time=write.at, transitions=epoch)


def _stamped(lease: Lease, write: Write, changes: Mapping[str, str | None], epoch: int) -> Lease:
    marks = {
        **record.format_annotations(lease, epoch),
        **changes,
        record.BOOT_ID: write.me.boot_id,
        record.WRITE_ID: write.write_id,
    }
    return replace(
        lease,
        duration_seconds=math.ceil(write.duration),
        renew_time=write.at,
        annotations=record.merged_annotations(lease.annotations, marks),
        labels={**lease.labels, **record.LOCK_LABELS},
    )


def _acquired_notes(lease: Lease, key: DeviceKey, meta: LockMeta) -> dict[str, str | None]:
    return {**record.device_annotations(key), record.IN_PLACE_OF: None, **meta_notes(lease, meta)}


def meta_notes(lease: Lease, meta: LockMeta) -> dict[str, str | None]:
    """Returns the annotation changes that record on a lock what its holder writes about the device."""
    notes = record.usb_id_annotations(lease.annotations, meta.usb_id)
    notes.update(record.serial_annotations(record.merged_annotations(lease.annotations, notes), meta.serial))
    notes.update(record.identity_annotations(record.merged_annotations(lease.annotations, notes), meta.identity))
    if meta.in_place_of is not None:
        notes[record.IN_PLACE_OF] = meta.in_place_of
    if meta.traceparent is not None:
        notes[record.TRACEPARENT] = meta.traceparent
    if meta.pod is not None:
        notes[record.POD] = record.pod_text(meta.pod) if meta.pod != UNKNOWN_POD else None
    if meta.port is not None:
        notes[record.PORT] = str(meta.port)
    if meta.import_from is not None:
        notes[record.IMPORT_FROM] = str(meta.import_from)
    return notes


@dataclass(frozen=True, slots=True)
class Rules:
    """The lock rules as functions that only tests replace: with a wrong rule, the tests of the model must fail."""

    decide_acquire: Callable[[Lease | None, DeviceKey, LockMeta, Write, Observation | None, bool], Decision] = (
        decide_acquire
    )
    decide_amend: Callable[[Lease | None, Write, Mapping[str, str | None]], Decision] = decide_amend
    decide_release: Callable[[Lease | None, Write, bool], Decision] = decide_release
    decide_session: Callable[[Lease | None, Write], Decision] = decide_session
    observe: Callable[[Observation | None, Lease, Lease | None, float, float, float], Observation] = observe
    import_deadline: Callable[[float, float], float] = import_deadline
    may_import: Callable[[float, float], bool] = may_import
    decide_loss: Callable[[Lock | None, NodeIdentity, PodRef | None, float, float], Loss] = decide_loss
    twin_may_import: Callable[[float, float], bool] = twin_may_import
