"""The cluster's devices as their lock Leases tell of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS, is_lock_name, lock_of, session_name
from usbip_plugin.locks.store import Lease, LeaseStore
from usbip_plugin.model import Lock

COLUMNS = ("device", "state", "holder", "pod", "since", "epoch", "reason")
WIDE = (*COLUMNS, "id", "usb_id", "serial", "port")

Row = Mapping[str, str | int | None]
"""What `devices` shows of one device; the keys are stable."""


@dataclass(frozen=True, slots=True)
class Known:
    """A device by its lock, as read at one moment. session: of its holder, None if there is none."""

    lease: Lease
    lock: Lock
    session: Lease | None

    @property
    def device(self) -> str | None:
        """SERVER/BUSID, None for a lock that does not say."""
        return f"{self.lock.server}/{self.lock.busid}" if self.lock.server and self.lock.busid else None


async def known_devices(store: LeaseStore) -> tuple[Known, ...]:
    """Every device that was ever locked, sorted by device. Raises the KubeError family.

    What others wrote into a lock is printable and short, see locks/record.py; a Lease under another name is no lock.
    """
    locks = await store.list(LOCK_LABELS)
    sessions = {lease.name: lease for lease in (await store.list(SESSION_LABELS)).items}
    found = [
        Known(lease, lock_of(lease), sessions.get(session_name(lease.holder)) if lease.holder else None)
        for lease in locks.items
        if is_lock_name(lease.name)
    ]
    return tuple(sorted(found, key=lambda known: (str(known.device), known.lock.device_id)))


def last_sign(known: Known) -> datetime | None:
    """When the holder wrote last, by its own clock: the session, or the lock itself."""
    signs = [lease.renew_time for lease in (known.session, known.lease) if lease is not None and lease.renew_time]
    return max(signs, default=None)


def silent(known: Known, now: datetime) -> bool:
    """Whether the holder's last sign is older than its lock lasts, as far as clocks agree. For people only."""
    sign = last_sign(known)
    asked = [lease.duration_seconds or 0 for lease in (known.session, known.lease) if lease is not None]
    return bool(known.lock.holder) and (sign is None or now - sign > timedelta(seconds=max(0, *asked)))


def reason(known: Known, now: datetime) -> str:
    """In words, from the Leases alone."""
    lock = known.lock
    if not lock.holder:
        return "nobody holds it"
    if silent(known, now):
        sign = last_sign(known)
        return "holder silent" + (f" since {stamp(sign)}" if sign is not None else "") + "; may be taken over"
    if lock.port is None:
        return "being allocated or let go"
    return "in use"


def stamp(moment: datetime) -> str:
    """As the API has it: 2026-05-04T03:02:01Z, in UTC."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def row(known: Known, now: datetime) -> Row:
    lock = known.lock
    sign = last_sign(known) if lock.holder else None
    return {
        "device": known.device,
        "id": lock.device_id,
        "server": lock.server,
        "busid": lock.busid,
        "usb_id": lock.usb_id,
        "serial": lock.serial or None,
        "state": "free" if not lock.holder else "silent" if silent(known, now) else "held",
        "holder": lock.holder or None,
        "pod": str(lock.pod) if lock.holder and lock.pod is not None else None,
        "port": lock.port if lock.holder else None,
        "since": stamp(lock.acquired_at) if lock.holder and lock.acquired_at else None,
        "last_sign": stamp(sign) if sign is not None else None,
        "epoch": lock.epoch,
        "reason": reason(known, now),
        "in_place_of": lock.in_place_of if lock.holder else None,
    }


def rows(devices: Sequence[Known], now: datetime) -> list[Row]:
    return [row(known, now) for known in devices]
