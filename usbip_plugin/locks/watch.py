"""The current records of all locks, kept by a watch, and whether the API server can be reached."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeError, KubeServerError, KubeUnauthorized, KubeUnreachable
from usbip_plugin.kube.reflector import Reflector
from usbip_plugin.locks import record
from usbip_plugin.locks.record import ChangeType, Lease, LeaseChange, LeaseList, LeaseStore
from usbip_plugin.model import Lock

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Errors of a call that mean that the API server cannot be used. Any other error is an answer of a working server.
_DOWN = (KubeUnreachable, KubeServerError, KubeUnauthorized)


@dataclass(frozen=True, slots=True)
class ApiState:
    """Whether this node can reach the API server, and since when (monotonic seconds).

    error: None while the API server is reachable, and before anything has failed.
    """

    reachable: bool
    since: float
    error: str | None


class ApiReachability:
    """The API server's reachability: both the watch of locks and the last single call must have succeeded.

    Begins as not reachable, without an error. Calls on_change from within the call that changes `state`.
    """

    def __init__(self, clock: Clock, on_change: Callable[[ApiState], None]) -> None:
        self._clock, self._on_change = clock, on_change
        self._watch_up = False
        self._watch_error: str | None = None
        self._call_error: str | None = None
        self.state = ApiState(reachable=False, since=clock.monotonic(), error=None)

    @property
    def call_failed(self) -> bool:
        return self._call_error is not None

    def watch_up(self) -> None:
        self._watch_up, self._watch_error = True, None
        self._update()

    def watch_down(self, error: KubeError) -> None:
        self._watch_up, self._watch_error = False, str(error)
        self._update()

    def call_ok(self) -> None:
        self._call_error = None
        self._update()

    def call_down(self, error: KubeError) -> None:
        self._call_error = str(error)
        self._update()

    def _update(self) -> None:
        reachable = self._watch_up and self._call_error is None
        error = None if reachable else self._call_error or self._watch_error
        if reachable != self.state.reachable:
            self.state = ApiState(reachable, self._clock.monotonic(), error)
        elif error != self.state.error:
            self.state = replace(self.state, error=error)
        else:
            return
        self._on_change(self.state)


class WatchedStore:
    """A LeaseStore that reports the outcome of each call, but for watch(), to an ApiReachability."""

    def __init__(self, store: LeaseStore, reachability: ApiReachability) -> None:
        self._store, self._reachability = store, reachability

    async def get(self, name: str) -> Lease | None:
        return await self._reported(self._store.get(name))

    async def list(self, labels: Mapping[str, str]) -> LeaseList:
        return await self._reported(self._store.list(labels))

    async def create(self, lease: Lease) -> Lease:
        return await self._reported(self._store.create(lease))

    async def replace(self, lease: Lease) -> Lease:
        return await self._reported(self._store.replace(lease))

    def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncGenerator[LeaseChange, None]:
        return self._store.watch(labels, resource_version)

    async def _reported(self, call: Awaitable[T]) -> T:
        try:
            result = await call
        except _DOWN as error:
            self._reachability.call_down(error)
            raise
        except KubeError:
            self._reachability.call_ok()  # the API server answered, though with an error
            raise
        self._reachability.call_ok()
        return result


@dataclass(frozen=True, slots=True)
class LockChange:
    """A change of a lock's record or status.

    old, new: the lock before and after; None if there is no such Lease. Equal if only the lock's status changed: it
    expired, or no longer counts as expired.
    """

    device_id: str
    old: Lock | None
    new: Lock | None

    @property
    def former(self) -> str:
        """The holder before the change, "" for nobody."""
        return self.old.holder if self.old is not None else ""

    @property
    def holder(self) -> str:
        """The holder after the change, "" for nobody."""
        return self.new.holder if self.new is not None else ""


def newer(version: str, than: str) -> bool:
    """Returns whether a resourceVersion is later than another.

    Kubernetes guarantees integers since 1.35. Versions of any other form count as later if they differ.
    """
    if version.isascii() and than.isascii() and version.isdigit() and than.isdigit():
        # as numbers, of whatever length: int() refuses more than 4300 digits
        one, other = version.lstrip("0"), than.lstrip("0")
        return (len(one), one) > (len(other), other)
    return version != than


class LockCache:
    """The newest known record of each lock: own reads and writes, lists and watch events, merged by resourceVersion.

    locks: the records as locks, by device ID; live and read-only.
    on_change: called once for each change of a record, in order, from within the call that brought it.
    """

    def __init__(self, on_change: Callable[[LockChange], None]) -> None:
        self._on_change = on_change
        self._leases: dict[str, Lease] = {}
        self._locks: dict[str, Lock] = {}
        self.locks: Mapping[str, Lock] = MappingProxyType(self._locks)
        self._gone: dict[str, str] = {}  # device ID -> version of its deletion, since the last list
        self._floor = "0"  # version of the last list or watch event

    def lease(self, device_id: str) -> Lease | None:
        return self._leases.get(device_id)

    def put(self, lease: Lease) -> None:
        """Stores a record from this node's own read or write, or from a watch event. Ignores an older one."""
        known = self._leases.get(lease.name)
        version = known.resource_version if known is not None else self._gone.get(lease.name, "0")
        if newer(lease.resource_version, version):
            self._set(lease.name, lease)

    def missing(self, device_id: str, expected: str) -> None:
        """Removes a record after a read found no Lease, if it still has the version from before the read (expected)."""
        known = self._leases.get(device_id)
        if known is not None and known.resource_version == expected:
            self._gone[device_id] = expected
            self._set(device_id, None)

    def apply(self, change: LeaseChange) -> None:
        """Applies one watch event."""
        lease = change.lease
        if lease is not None and record.is_lock_name(lease.name):
            if change.type is ChangeType.DELETED:
                self._delete(lease.name, change.resource_version)
            else:
                self.put(lease)
        self._floor = change.resource_version

    def reset(self, listing: LeaseList) -> None:
        """Replaces the cache by a full list. Keeps a lock that the list lacks if it was written after the list.

        A list older than the last list or event shows an API server restored from a backup: it replaces every record.
        """
        restored = newer(self._floor, listing.resource_version)
        listed = {lease.name: lease for lease in listing.items if record.is_lock_name(lease.name)}
        for name, known in list(self._leases.items()):
            if name not in listed and (restored or not newer(known.resource_version, listing.resource_version)):
                self._set(name, None)
        self._gone = {name: listing.resource_version for name in self._gone if name not in listed and not restored}
        for name, lease in listed.items():
            if restored and self._leases.get(name) != lease:
                self._set(name, lease)
            else:
                self.put(lease)
        self._floor = listing.resource_version

    def _delete(self, name: str, version: str) -> None:
        known = self._leases.get(name)
        if known is None or newer(version, known.resource_version):
            self._gone[name] = version
            if known is not None:
                self._set(name, None)

    def _set(self, name: str, lease: Lease | None) -> None:
        old = self._locks.get(name)
        if lease is None:
            del self._leases[name], self._locks[name]
        else:
            self._gone.pop(name, None)
            self._leases[name], self._locks[name] = lease, record.lock_of(lease)
        self._on_change(LockChange(name, old, self._locks.get(name)))


# Seconds before the locks are listed and watched again: the first time, and at most.
RETRY_S = (0.2, 5.0)


class LockWatcher(Reflector[LeaseChange]):
    """Keeps a LockCache current, and reports each watch's outcome. Sets ready after the first list."""

    def __init__(
        self,
        store: LeaseStore,
        view: LockCache,
        contact: ApiReachability,
        clock: Clock,
        rng: random.Random,
        ready: asyncio.Event,
    ) -> None:
        super().__init__("leases.coordination.k8s.io", clock, rng, RETRY_S)
        self._store, self._view, self._contact, self._ready = store, view, contact, ready

    async def _list(self) -> str:
        listing = await self._store.list(record.LOCK_LABELS)
        self._view.reset(listing)
        self._ready.set()
        return listing.resource_version

    def _watch(self, version: str) -> AsyncGenerator[LeaseChange, None]:
        return self._store.watch(record.LOCK_LABELS, version)

    def apply(self, event: LeaseChange) -> str:
        self._view.apply(event)
        return event.resource_version

    def _up(self) -> None:
        self._contact.watch_up()

    def _down(self, error: KubeError, *, first: bool) -> None:
        self._contact.watch_down(error)
        if first:
            logger.warning("lock watch failed, will retry", extra={"cause": str(error)})
