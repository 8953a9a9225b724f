"""The removal of Leases of what is gone: which they are, which is pure, and the deletes, each of the version shown."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from usbip_plugin.config.schema import Config
from usbip_plugin.config.selectors import may_select
from usbip_plugin.errors import KubeConflict, KubeError, KubeNotFound
from usbip_plugin.locks.locked_devices import LockedDevice, last_sign
from usbip_plugin.locks.record import MAX_DURATION_S, Lease, holder_text, session_name
from usbip_plugin.model import Descriptor, ServerKey

FORGOTTEN = timedelta(days=1)
"""Time for which nobody has written a lock whose server does not list the device: after it, nodes forget the device."""
MAX_SHOWN = 20
"""Leases of one kind that are shown."""
AT_ONCE = 8
"""Deletes that are under way at once."""


class Gone(enum.Enum):
    """Why a Lease can be removed."""

    NODE = "locks held by nodes that do not exist"
    NOT_CONFIGURED = "locks of devices that the configuration does not name and nobody holds"
    NOT_LISTED = "locks of devices that their server does not list and nobody has held for a day"
    SESSION = "sessions of nodes that do not exist"


@dataclass(frozen=True, slots=True)
class Removable:
    """A Lease that can be removed, and what it stands for."""

    lease: Lease
    name: str
    gone: Gone


def removable(
    known: Iterable[LockedDevice],
    sessions: Iterable[Lease],
    nodes: Collection[str],
    config: Config | None,
    listed: Mapping[ServerKey, Collection[str]],
    now: datetime,
) -> list[Removable]:
    """Returns the Leases of what is gone, by kind.

    A lock whose holder exists, or has given a sign of life within the time that its lock lasts, is never among them.

    sessions: all of them. nodes: the names of all nodes of the cluster.
    config: None if it is not known; then locks without a holder stay.
    listed: the bus IDs that servers list, of those that answer.
    """
    found: list[Removable] = []
    holders = set()
    for one in known:
        gone = _gone(one, nodes, config, listed, now)
        if gone is not None:
            holder = f", node {one.lock.holder}" if one.lock.holder else ""
            found.append(Removable(one.lease, (one.device or one.lock.device_id) + holder, gone))
        elif one.lease.holder:
            holders.add(session_name(one.lease.holder))
    live = {session_name(node) for node in nodes} | holders
    found += [
        Removable(lease, holder_text(lease.holder) or lease.name, Gone.SESSION)
        for lease in sessions
        if lease.name not in live and not _lives((lease,), lease.renew_time, now)
    ]
    return sorted(found, key=lambda one: (list(Gone).index(one.gone), one.name))


def _gone(
    known: LockedDevice,
    nodes: Collection[str],
    config: Config | None,
    listed: Mapping[ServerKey, Collection[str]],
    now: datetime,
) -> Gone | None:
    lock, lease = known.lock, known.lease
    if lease.holder:
        signs = tuple(one for one in (lease, known.session) if one is not None)
        lives = lease.holder in nodes or _lives(signs, last_sign(known), now)
        return None if lives else Gone.NODE
    if config is None:
        return None
    if lock.key is None or not _is_named(known, config):
        return Gone.NOT_CONFIGURED
    busids = listed.get(lock.key.server)
    old = lease.renew_time is None or now - lease.renew_time > FORGOTTEN
    return Gone.NOT_LISTED if busids is not None and lock.key.busid not in busids and old else None


def _is_named(known: LockedDevice, config: Config) -> bool:
    """Returns whether a resource selects the device, as far as its lock says what it is."""
    key, usb_id = known.lock.key, known.lock.usb_id
    if key is None or key.server not in config.servers():
        return False
    if usb_id is None:
        return True
    bare = Descriptor(key.busid, "", 0, 0, 0, usb_id, 0, 0, 0, 0, 0, 0, 0)
    return any(may_select(resource, key, bare, known.lock.identity) for resource in config.resources)


def _lives(leases: Iterable[Lease], sign: datetime | None, now: datetime) -> bool:
    """Returns whether a sign of life is not older than the Leases last, and not as far in the future."""
    longest = max((min(lease.duration_seconds or 0, MAX_DURATION_S) for lease in leases), default=0.0)
    return sign is not None and abs(now - sign) <= timedelta(seconds=longest)


def summary(found: Iterable[Removable]) -> Iterator[str]:
    """Yields what is to be removed, in lines: each kind with its number, and the first of its Leases."""
    by_kind: dict[Gone, list[str]] = {}
    for one in found:
        by_kind.setdefault(one.gone, []).append(one.name)
    for gone, names in by_kind.items():
        yield f"{gone.value} ({len(names)}):"
        yield from (f"  {name}" for name in names[:MAX_SHOWN])
        if len(names) > MAX_SHOWN:
            yield f"  and {len(names) - MAX_SHOWN} more"


class Deletes(Protocol):
    """A store that can delete Leases."""

    async def delete(self, lease: Lease) -> None:
        """Deletes the Lease if it is still of this version, else raises KubeConflict or KubeNotFound."""


async def prune(store: Deletes, found: Iterable[Removable]) -> int:
    """Deletes the Leases that are still as they were shown. Returns how many were. Raises KubeError."""
    room = asyncio.Semaphore(AT_ONCE)

    async def delete(one: Removable) -> bool:
        async with room:
            try:
                await store.delete(one.lease)
            except (KubeConflict, KubeNotFound):
                return False
            return True

    try:
        async with asyncio.TaskGroup() as group:
            deleted = [group.create_task(delete(one)) for one in found]
    except* KubeError as errors:
        raise first_of(errors) from None
    return sum(task.result() for task in deleted)


def first_of(errors: BaseExceptionGroup[KubeError]) -> KubeError:
    one = errors.exceptions[0]
    return first_of(one) if isinstance(one, BaseExceptionGroup) else one
