"""The lock rules R1 to R7 as pure functions: (record, observation, now) -> decision. No I/O, no clock.

R1 Write before touch: within the import window before an import, a compare-and-swap write on the lock has succeeded.
R2 Free: no object, or an empty holder. R3 Mine: by node, and by boot.
R4 Expired: unchanged for a whole duration, and after that the server, asked anew, lists the device as free to import.
R5 Release only when the local port is free (the caller's duty). R6 Lost: somebody else, or nobody, stands in it.
R7 API server unreachable: nothing new is taken, nothing held is let go.

The Lease is no fence; the USB/IP server is, which exports a device to one client at a time. The rules make sure that no
two nodes have an import in flight for one device: R4 needs that the lock was unchanged for a duration, R1 puts a change
at most an import window before the end of any import, the import window is less than half a duration, and the clocks of
two nodes differ in rate by less than a factor of two.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Identity, NodeIdentity


@dataclass(frozen=True, slots=True)
class LockMeta:
    """What the holder writes about a device besides its own name.

    told: what the device has said itself, laid over what is known of it.
    in_place_of: the ID of the device that is to be attached from here; None if it is for this very one.
    """

    usb_id: str | None = None
    identity: Identity | None = None
    traceparent: str | None = None
    in_place_of: str | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """What goes into every write: who, when (for people only), and a mark by which to know it again."""

    me: NodeIdentity
    at: datetime
    write_id: str
    duration: float


@dataclass(frozen=True, slots=True)
class Observation:
    """A lock and its holder's session, as they have stood unchanged. Times in seconds on this node's monotonic clock.

    since is taken after the answer that first showed this state, seen before the request that last confirmed it, so
    that seen - since never exceeds the time it was truly unchanged. session_version is "" where there is no session.
    """

    lock_version: str
    session_version: str
    duration: float
    since: float
    seen: float


@dataclass(frozen=True, slots=True)
class Create:
    lease: Lease


@dataclass(frozen=True, slots=True)
class Replace:
    """Compare-and-swap on lease.resource_version, the version of the record that was decided upon."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Denied:
    """Nothing may be written: the record, None if there is none, belongs to somebody else or to nobody."""

    lease: Lease | None


Decision = Create | Replace | Denied


class LockStatus(enum.Enum):
    FREE = "free"
    MINE = "mine"
    HELD = "held"
    EXPIRED = "expired"


def check_window(import_window: float, duration: float) -> None:
    """ValueError unless the import window (seconds) is positive and less than half the duration (R1, R4)."""
    if not 0 < import_window < duration / 2:
        msg = f"the import window ({import_window:g} s) must be less than half the lock duration ({duration:g} s)"
        raise ValueError(msg)


def import_deadline(sent_at: float, import_window: float) -> float:
    """R1: until when an import may run, by the write sent at sent_at.

    Counted from before the request went out, not from its answer: another node may have seen the write, and begun to
    wait for its expiry, as soon as it was sent.
    """
    return sent_at + import_window


def may_import(deadline: float, now: float) -> bool:
    """R1: whether an import may still be under way."""
    return now < deadline


def decide_acquire(
    lease: Lease | None,
    key: DeviceKey,
    meta: LockMeta,
    write: Write,
    observation: Observation | None,
    importable: bool,
) -> Decision:
    """R2, R3, R4: whether and how the lock on key may be taken, given its record and what was observed of it.

    importable is what the server said when it was asked after the lock had expired. An older answer is worth nothing:
    an import under the last write may have ended well since.
    """
    if lease is None:
        return Create(_taken(Lease(name=key.id, labels=record.LOCK_LABELS), key, meta, write))
    if is_free(lease):
        return Replace(_taken(lease, key, meta, write))
    if lease.holder == write.me.node:
        if is_mine(lease, write.me):
            return Replace(_stamped(lease, write, _meta_notes(lease, key, meta)))
        return Replace(_taken(lease, key, meta, write))
    if importable and may_take_over(lease, observation):
        return Replace(_taken(lease, key, meta, write))
    return Denied(lease)


def decide_amend(lease: Lease | None, write: Write, changes: Mapping[str, str | None]) -> Decision:
    """R1, R6: a holder's write on its own lock (renewal, annotations); Denied when it is not its own any more."""
    if lease is None or is_lost(lease, write.me):
        return Denied(lease)
    return Replace(_stamped(lease, write, changes))


def decide_release(lease: Lease | None, write: Write) -> Decision:
    """R5: clear the holder, if it is this node, of whichever boot. Denied: nothing of ours to clear.

    What is true of the device whoever holds it stays: server, busid, usb-id, serial, and the trace of the last holder,
    so that others can link to it what they do upon the release.
    """
    if lease is None or lease.holder != write.me.node:
        return Denied(lease)
    gone = dict.fromkeys((record.BOOT_ID, record.PORT, record.POD, record.IN_PLACE_OF))
    notes = record.with_notes(lease.annotations, {**gone, record.WRITE_ID: write.write_id})
    return Replace(replace(lease, holder="", renew_time=write.at, annotations=notes))


def decide_session(lease: Lease | None, write: Write) -> Decision:
    """A heartbeat: continues the session of this boot, or begins a new one."""
    name = record.session_name(write.me.node)
    base = lease or Lease(name=name)
    notes = record.with_notes(base.annotations, {record.BOOT_ID: write.me.boot_id, record.WRITE_ID: write.write_id})
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
    """R2."""
    return lease is None or lease.holder == ""


def is_mine(lease: Lease | None, me: NodeIdentity) -> bool:
    """R3: held by this boot of this node."""
    return lease is not None and lease.holder == me.node and lease.annotations.get(record.BOOT_ID) == me.boot_id


def is_lost(lease: Lease | None, me: NodeIdentity) -> bool:
    """R6, for a lock that was ours."""
    return not is_mine(lease, me)


def observe(
    previous: Observation | None,
    lock: Lease,
    session: Lease | None,
    asked_at: float,
    answered_at: float,
    own_duration: float,
) -> Observation:
    """R4: what is known after reading the holder's session, the read having been sent and answered at these times.

    The time to wait is the longest that holder, session or this node's own configuration asks for (seconds).
    """
    session_version = session.resource_version if session is not None else ""
    if (
        previous is not None
        and previous.lock_version == lock.resource_version
        and previous.session_version == session_version
    ):
        return replace(previous, seen=max(previous.seen, asked_at))
    asked_for = [lease.duration_seconds or 0 for lease in (lock, session) if lease is not None]
    duration = max(own_duration, float(min(max(0, *asked_for), record.MAX_DURATION_S)))
    return Observation(lock.resource_version, session_version, duration, answered_at, answered_at)


def expired(observation: Observation) -> bool:
    """R4: unchanged for a whole duration."""
    return observation.seen - observation.since >= observation.duration


def may_take_over(lease: Lease, observation: Observation | None) -> bool:
    """R4, but for the server's word: this very version of the record was seen to expire."""
    return observation is not None and observation.lock_version == lease.resource_version and expired(observation)


def lock_status(lease: Lease | None, me: NodeIdentity, observation: Observation | None) -> LockStatus:
    """How a lock stands for this node. MINE also under an earlier boot, from which it can be taken at once (R3)."""
    if lease is None or is_free(lease):
        return LockStatus.FREE
    if lease.holder == me.node:
        return LockStatus.MINE
    return LockStatus.EXPIRED if may_take_over(lease, observation) else LockStatus.HELD


def _taken(lease: Lease, key: DeviceKey, meta: LockMeta, write: Write) -> Lease:
    """The record with a new holder: a new epoch, and nothing left of the last holder's pod, port and boot."""
    notes = {**_meta_notes(lease, key, meta), record.PORT: None, record.POD: None}
    taken = _stamped(lease, write, notes)
    return replace(taken, holder=write.me.node, acquire_time=write.at, transitions=record.epoch_of(lease) + 1)


def _stamped(lease: Lease, write: Write, changes: Mapping[str, str | None]) -> Lease:
    marks = {**changes, record.BOOT_ID: write.me.boot_id, record.WRITE_ID: write.write_id}
    return replace(
        lease,
        duration_seconds=math.ceil(write.duration),
        renew_time=write.at,
        annotations=record.with_notes(lease.annotations, marks),
        labels={**lease.labels, **record.LOCK_LABELS},
    )


def _meta_notes(lease: Lease, key: DeviceKey, meta: LockMeta) -> dict[str, str | None]:
    notes: dict[str, str | None] = {**record.device_notes(key), record.IN_PLACE_OF: meta.in_place_of}
    if meta.usb_id is not None:
        notes[record.USB_ID] = meta.usb_id
        if lease.annotations.get(record.USB_ID, meta.usb_id) != meta.usb_id:
            # read from another device under the same bus id
            notes.update(dict.fromkeys((record.SERIAL, record.INTERFACES, record.READ_FROM)))
    notes.update(record.identity_notes(record.with_notes(lease.annotations, notes), meta.identity))
    if meta.traceparent is not None:
        notes[record.TRACEPARENT] = meta.traceparent
    return notes


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules as they are called, so that a simulation can put a wrong one in and see it caught."""

    decide_acquire: Callable[[Lease | None, DeviceKey, LockMeta, Write, Observation | None, bool], Decision] = (
        decide_acquire
    )
    decide_amend: Callable[[Lease | None, Write, Mapping[str, str | None]], Decision] = decide_amend
    decide_release: Callable[[Lease | None, Write], Decision] = decide_release
    decide_session: Callable[[Lease | None, Write], Decision] = decide_session
    observe: Callable[[Observation | None, Lease, Lease | None, float, float, float], Observation] = observe
    import_deadline: Callable[[float, float], float] = import_deadline
    may_import: Callable[[float, float], bool] = may_import
