"""The devices that have or had a lock, read once with the sessions of their holders, for a command of people.

What follows from the times in Leases is right only as far as the clocks of their writers and of the reader agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from usbip_plugin.config.schema import IMPORT_WINDOW_S
from usbip_plugin.locks.record import (
    LOCK_LABELS,
    SESSION_LABELS,
    Lease,
    LeaseStore,
    is_lock_name,
    lock_of,
    session_name,
)
from usbip_plugin.model import Lock


@dataclass(frozen=True, slots=True)
class LockedDevice:
    """A device that has or had a lock, as its Leases were read.

    lock: the lock that `lease` has.
    session: the session Lease of the holder, None if there is none.
    """

    lease: Lease
    lock: Lock
    session: Lease | None

    @property
    def device(self) -> str | None:
        """Returns SERVER/BUSID, or None if the lock does not name them."""
        return f"{self.lock.server}/{self.lock.busid}" if self.lock.server and self.lock.busid else None


async def known_devices(
    store: LeaseStore, keep: Callable[[Lease], bool] = lambda _lease: True
) -> tuple[LockedDevice, ...]:
    """Returns every device that was ever locked, sorted by device. Raises KubeError if the Leases cannot be read.

    lock_of() makes all texts printable and short, whoever wrote them. Leases with other names than locks are left out.

    keep: whether a lock is of interest.
    """
    locks = await store.list(LOCK_LABELS, keep)
    holders = {session_name(lease.holder) for lease in locks.items if lease.holder}
    listed = await store.list(SESSION_LABELS, lambda lease: lease.name in holders)
    sessions = {lease.name: lease for lease in listed.items}
    found = [
        LockedDevice(lease, lock_of(lease), sessions.get(session_name(lease.holder)) if lease.holder else None)
        for lease in locks.items
        if is_lock_name(lease.name)
    ]
    return tuple(sorted(found, key=lambda known: (str(known.device), known.lock.device_id)))


def last_sign(known: LockedDevice) -> datetime | None:
    """Returns when the holder last wrote its session or the lock, by the holder's clock. None if neither has a time."""
    signs = [lease.renew_time for lease in (known.session, known.lease) if lease is not None and lease.renew_time]
    return max(signs, default=None)


def silent(known: LockedDevice, now: datetime) -> bool:
    """Returns whether the lock has a holder that has not written for longer than the lock lasts, or never.

    The lock lasts for the longer of the durations of its Lease and the holder's session.
    """
    sign = last_sign(known)
    durations = [lease.duration_seconds or 0 for lease in (known.session, known.lease) if lease is not None]
    return bool(known.lock.holder) and (sign is None or now - sign > timedelta(seconds=max(0, *durations)))


def is_attached(known: LockedDevice, now: datetime) -> bool:
    """Returns whether a living holder has the device attached, and has not written the lock just now.

    A holder that has lost the device writes the lock at each try to attach it again.
    """
    written = known.lease.renew_time
    settled = written is not None and now - written > timedelta(seconds=2 * IMPORT_WINDOW_S)
    return bool(known.lock.holder) and known.lock.port is not None and settled and not silent(known, now)
