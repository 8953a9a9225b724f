"""The current records of all locks, kept by a watch, and whether the API server can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeError, KubeServerError, KubeUnauthorized, KubeUnreachable
from usbip_plugin.kube.reflector import Reflector
from usbip_plugin.locks import record
from usbip_plugin.locks.kept import IgnoredLocks, LockCounts, LockFilter, LockListing, Verdict
from usbip_plugin.locks.record import ChangeType, Lease, LeaseChange, LeaseList, LeaseStore
from usbip_plugin.model import Lock, ServerKey
from usbip_plugin.sync import Broadcast

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

    async def list(self, labels: Mapping[str, str], keep: Callable[[Lease], bool] = lambda _lease: True) -> LeaseList:
        return await self._reported(self._store.list(labels, keep))

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
    listed: whether a list has brought it, which may show what a restore of etcd has set back.
    """

    device_id: str
    old: Lock | None
    new: Lock | None
    listed: bool = False

    @property
    def former(self) -> str:
        """The holder before the change, "" for nobody."""
        return self.old.holder if self.old is not None else ""

    @property
    def holder(self) -> str:
        """The holder after the change, "" for nobody."""
        return self.new.holder if self.new is not None else ""


RECENT_EVENTS = 64
"""Watch events whose versions are remembered, so that an event that is delivered again changes nothing."""


@dataclass(eq=False, slots=True)
class OwnCall:
    """A read or write of one lock by this node that is under way. LockCache.call() makes it.

    passed: the record as list and watch have shown it since the call was sent; None for no Lease.
    listed: whether a list came meanwhile.
    """

    device_id: str
    passed: list[Lease | None]
    listed: bool = False


class LockCache:
    """The newest known record of each lock. Versions are compared for equality only: a restored etcd has old ones.

    List and watch show every change in order, but late. The answer to an own call may be ahead of them. It counts until
    the watch brings its version, or until a list that was requested after the answer came.

    locks: the records as locks, by device ID; live and read-only.
    doubtful: devices whose record may be older or newer than the last list. A read that is sent now settles it.
    ignored: the locks that are left out.
    on_change: called once for each change of a record, in order, from within the call that brought it.
    kept: decides which locks are left out. What an own call has shown never is.
    """

    def __init__(self, on_change: Callable[[LockChange], None], kept: LockFilter | None = None) -> None:
        self._on_change = on_change
        self.kept = kept or LockFilter()
        self._counts = LockCounts()
        self._listing = LockListing(self.kept)  # the one under way, or the last one
        self.ignored = IgnoredLocks()
        self._shown: dict[str, Lease] = {}  # by list and watch
        self._ahead: dict[str, Lease | None] = {}  # by answers that the watch has not brought yet; None: no Lease
        self._calls: dict[str, OwnCall] = {}
        self._answered: set[str] = set()  # devices whose calls were answered since the last list was requested
        self._recent: deque[str] = deque(maxlen=RECENT_EVENTS)
        self._locks: dict[str, Lock] = {}
        self.locks: Mapping[str, Lock] = MappingProxyType(self._locks)
        self.doubtful: set[str] = set()

    def lease(self, device_id: str) -> Lease | None:
        return self._ahead[device_id] if device_id in self._ahead else self._shown.get(device_id)

    @contextlib.contextmanager
    def call(self, device_id: str) -> Iterator[OwnCall]:
        """Marks that a read or write of this lock is under way in the block. A device has one at a time."""
        call = self._calls[device_id] = OwnCall(device_id, [self._shown.get(device_id)])
        try:
            yield call
        finally:
            del self._calls[device_id]

    def answered(self, call: OwnCall, lease: Lease | None) -> bool:
        """Stores what the answer to a read or write has shown, None for no Lease. To be called within call().

        Returns False, and changes nothing, if a list came during the call that shows another record: either may be the
        newer one.
        """
        device_id = call.device_id
        self._answered.add(device_id)
        shown = self._shown.get(device_id)
        if call.listed and lease != shown:
            return False
        before = self.lease(device_id)
        self.doubtful.discard(device_id)
        self._ahead.pop(device_id, None)
        if lease in call.passed:
            pass  # list and watch have shown it, and perhaps a newer one
        elif shown is not None:
            self._ahead[device_id] = lease
        else:  # created just now, or not shown because it is left out or has no label
            self._show(device_id, lease)
        self._report(device_id, before)
        return True

    def apply(self, change: LeaseChange) -> None:
        """Applies one watch event."""
        lease = change.lease
        if lease is None or not record.is_lock_name(lease.name) or change.resource_version in self._recent:
            return
        self._recent.append(change.resource_version)
        device_id, before = lease.name, self.lease(lease.name)
        if not self._is_known(device_id):
            verdict = self.kept.verdict(lease, self._counts, known=False)
            if verdict is not Verdict.KEEP:
                self._ignore(verdict, change.type)
                return
        shown = self._show(device_id, None if change.type is ChangeType.DELETED else lease)
        if device_id in self._calls:
            self._calls[device_id].passed.append(shown)
        # a Lease that loses its label is DELETED with its new version
        if device_id in self._ahead and _version_of(self._ahead[device_id]) in (
            _version_of(shown),
            change.resource_version,
        ):
            del self._ahead[device_id]
            self.doubtful.discard(device_id)
        self._report(device_id, before)

    def begin_list(self) -> Callable[[Lease], bool]:
        """To be called right before a list is requested. Returns whether to keep a Lease of the list."""
        self._answered.clear()
        listing = self._listing = LockListing(self.kept, self._counts, self._shown.__contains__)

        def keep(lease: Lease) -> bool:
            return lease.name in self._ahead or lease.name in self._calls or listing.keep(lease)

        return keep

    def reset(self, listing: LeaseList) -> None:
        """Replaces the cache by a full list: the truth for every record whose last answer came before its request.

        listing: with the Leases only that begin_list() has kept.
        """
        listed = {lease.name: lease for lease in listing.items}
        for device_id in dict.fromkeys((*self._shown, *self._ahead, *self._answered, *listed)):
            before, lease = self.lease(device_id), self._show(device_id, listed.get(device_id))
            if device_id in self._answered and _version_of(before) != _version_of(lease):
                self._ahead[device_id] = before
                self.doubtful.add(device_id)
            else:
                self._ahead.pop(device_id, None)
                self.doubtful.discard(device_id)
            self._report(device_id, before, listed=True)
        self.ignored = self._listing.ignored
        for device_id, call in self._calls.items():
            call.passed.append(self._shown.get(device_id))
            call.listed = True
        self._recent.clear()

    def _is_known(self, device_id: str) -> bool:
        return device_id in self._shown or device_id in self._ahead or device_id in self._calls

    def _ignore(self, verdict: Verdict, change: ChangeType) -> None:
        by = {ChangeType.ADDED: 1, ChangeType.DELETED: -1}.get(change, 0)
        foreign, excess = self.ignored.foreign, self.ignored.excess
        if verdict is Verdict.FOREIGN:
            self.ignored = IgnoredLocks(max(0, foreign + by), excess)
        else:
            self.ignored = IgnoredLocks(foreign, max(0, excess + by))

    def _show(self, device_id: str, lease: Lease | None) -> Lease | None:
        old = self._shown.pop(device_id, None) if lease is None else self._shown.get(device_id)
        if old is not None:
            self._counts.add(old, -1)
        if lease is not None:
            self._counts.add(lease)
            self._shown[device_id] = lease
        return lease

    def _report(self, device_id: str, before: Lease | None, *, listed: bool = False) -> None:
        lease = self.lease(device_id)
        if lease == before:
            return
        old = self._locks.get(device_id)
        if lease is not None:
            self._locks[device_id] = record.lock_of(lease)
        else:
            del self._locks[device_id]
        self._on_change(LockChange(device_id, old, self._locks.get(device_id), listed))


def _version_of(lease: Lease | None) -> str | None:
    return lease.resource_version if lease is not None else None


READ_ROUNDS = 5
"""Most reads of one lock in a row that a list overtakes."""


async def read_lock(store: LeaseStore, cache: LockCache, device_id: str) -> Lease | None:
    """Reads the record of a lock, and returns it, or a newer one that came meanwhile. Raises KubeError.

    Reads again, up to READ_ROUNDS times in all, if a list came meanwhile that shows another record.
    The device must have no other call under way, see LockCache.call().
    """
    for _ in range(READ_ROUNDS):
        with cache.call(device_id) as call:
            if cache.answered(call, await store.get(device_id)):
                break
    return cache.lease(device_id)


# Seconds before the locks are listed and watched again: the first time, and at most.
RETRY_S = (0.2, 5.0)


class LockWatcher(Reflector[LeaseChange]):
    """Keeps a LockCache current, and reports each watch's outcome. Sets ready after the first list.

    covered: the servers whose locks the last list has brought; None for all.
    listed: fires after each list.
    settle(device_id): reads the lock of a device that is in the cache's `doubtful`. Raises KubeError.
    """

    def __init__(
        self,
        store: LeaseStore,
        view: LockCache,
        contact: ApiReachability,
        clock: Clock,
        rng: random.Random,
        ready: asyncio.Event,
        settle: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__("leases.coordination.k8s.io", clock, rng, RETRY_S)
        self._store, self._view, self._contact, self._ready, self._settle = store, view, contact, ready, settle
        self.covered: frozenset[ServerKey] | None = frozenset()
        self.listed = Broadcast()
        self._warned = False

    async def _list(self) -> str:
        servers = self._view.kept.servers
        listing = await self._store.list(record.LOCK_LABELS, self._view.begin_list())
        self._view.reset(listing)
        self.covered = servers
        self._ready.set()
        self.listed.fire()
        self._warned = self._warned and self._view.ignored.excess > 0
        self._warn_of_excess()
        for device_id in sorted(self._view.doubtful):
            await self._settle(device_id)
        return listing.resource_version

    def _warn_of_excess(self) -> None:
        ignored = self._view.ignored.excess
        if ignored and not self._warned:
            self._warned = True
            logger.warning("too many locks, some ignored", extra={"ignored": ignored, "kept": len(self._view.locks)})

    def _watch(self, version: str) -> AsyncGenerator[LeaseChange, None]:
        return self._store.watch(record.LOCK_LABELS, version)

    def apply(self, event: LeaseChange) -> str:
        self._view.apply(event)
        self._warn_of_excess()
        return event.resource_version

    def _up(self) -> None:
        self._contact.watch_up()

    def _down(self, error: KubeError, *, first: bool) -> None:
        self._contact.watch_down(error)
        if first:
            logger.warning("lock watch failed, will retry", extra={"cause": str(error)})
