"""All lock operations of this node: acquire, renew, annotate and release; also follows the locks of other nodes."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from opentelemetry.trace import Tracer

from usbip_plugin.clock import Clock
from usbip_plugin.errors import LockError, LockHeld, LockLost, LockUnavailable
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.protocol import Decision, Denied, LockMeta, LockStatus, Rules, Write
from usbip_plugin.locks.record import Lease, LeaseStore
from usbip_plugin.locks.session import ExpiryWatch, Session
from usbip_plugin.locks.watch import ApiReachability, ApiState, LockCache, LockChange, LockWatcher, WatchedStore
from usbip_plugin.locks.writer import AcknowledgedWrite, WriteAttempts, Writer
from usbip_plugin.model import DeviceKey, Identity, Lock, NodeIdentity, PodRef
from usbip_plugin.observe.spans import device_attributes, span

logger = logging.getLogger(__name__)

# Default duration of a lock (seconds): the least time without a sign of life before another node may take it over.
DURATION_S = 40.0
# Default time in which an import must end after the lock was written (seconds). R1 wants less than half the duration.
IMPORT_WINDOW_S = 10.0
# Wait between two tries to release locks whose acquire() was given up (seconds).
ORPHAN_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class LockSettings:
    """Timing of the locks, in seconds.

    Raises ValueError unless 0 < import_window < duration / 2, on which the safety of a takeover rests.

    duration: time without a sign of life after which other nodes may take over this node's locks.
    import_window: time after a write on the lock within which an import must end (R1).
    """

    duration: float = DURATION_S
    import_window: float = IMPORT_WINDOW_S

    def __post_init__(self) -> None:
        protocol.check_window(self.import_window, self.duration)


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to import a device, given by a write on its lock (R1).

    lock: the record as written.
    epoch: number of the tenure, from leaseTransitions.
    import_deadline: until when an import may run, on this node's Clock.monotonic().
    former: the lock as another node held it, if this grant took it over (R4); else None.
    """

    lock: Lock
    epoch: int
    import_deadline: float
    former: Lock | None = None


class Acquired(enum.Enum):
    """The outcome of an acquire()."""

    TAKEN = "taken"
    """This node holds the lock."""
    HELD = "held"
    """Another node holds the lock."""
    FAILED = "failed"
    """The outcome is unknown, or acquire() was cancelled or refused."""


class Unset(enum.Enum):
    """The default of an argument for which None means "clear": the argument was not given."""

    UNSET = enum.auto()


UNSET = Unset.UNSET


class LockManager:
    """All lock operations of this node. Operations on one device run one after the other, on different devices at once.

    run() must be running: it keeps `locks` current, writes heartbeats and observes the expiry of other nodes' locks.
    Every operation may be cancelled. A cancelled operation may still have taken effect; release() undoes it.

    is_listed(key) asks the device's server, right before a takeover, whether it lists the device as free (R4). The last
    set_importable() may date from before this process was stopped or starved, and the device may be attached since.
    Without is_listed, the last set_importable() decides.

    on_acquire(result, seconds) is called at the end of each acquire().
    """

    def __init__(
        self,
        store: LeaseStore,
        me: NodeIdentity,
        clock: Clock,
        rng: random.Random,
        settings: LockSettings,
        tracer: Tracer,
        rules: Rules | None = None,
        is_listed: Callable[[DeviceKey], Awaitable[bool]] | None = None,
        on_acquire: Callable[[Acquired, float], None] = lambda _result, _seconds: None,
    ) -> None:
        self._me, self._clock, self._settings, self._tracer = me, clock, settings, tracer
        self._rules = rules or Rules()
        self._is_listed = is_listed
        self._on_acquire = on_acquire
        self._subscribers: list[Callable[[LockChange], None]] = []
        self._api_subscribers: list[Callable[[ApiState], None]] = []
        self._contact = ApiReachability(clock, self._api_changed)
        self._store = WatchedStore(store, self._contact)
        self._view = LockCache(self._changed)
        self._writer = Writer(self._store, self._view, me, clock, rng, settings.duration, tracer, self._session_need)
        self._session = Session(self._store, self._writer.new_write, clock, rng, settings.duration, self._rules)
        self._expiry = ExpiryWatch(
            self._store, self._view, me.node, clock, settings.duration, self._rules, self._standing_changed
        )
        self.ready = asyncio.Event()
        self._follower = LockWatcher(self._store, self._view, self._contact, clock, rng, self.ready)
        self._device_locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._mine: set[str] = set()
        self._taking = 0
        # By device ID: the epoch that an acquire() may have begun, which was given up before it knew the outcome.
        self._abandoned: dict[str, tuple[DeviceKey, int]] = {}
        self._orphaned = asyncio.Event()

    async def run(self) -> None:
        """Runs until cancelled. Leaves the locks as they are."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follower.run(), name="lock-watch")
            group.create_task(self._session.run(), name="lock-session")
            group.create_task(self._expiry.run(), name="lock-expiry")
            group.create_task(self._release_orphans(), name="lock-orphans")

    @property
    def settings(self) -> LockSettings:
        return self._settings

    @property
    def rules(self) -> Rules:
        """The lock rules, with which callers check during an import whether it may go on (R1)."""
        return self._rules

    @property
    def locks(self) -> Mapping[str, Lock]:
        """The newest known record of each lock, held or released, by device ID. A live read-only view."""
        return self._view.locks

    @property
    def api(self) -> ApiState:
        return self._contact.state

    @property
    def heartbeat_at(self) -> float | None:
        """When the last successful heartbeat was sent (monotonic seconds), None if this process has sent none."""
        return self._session.written_at

    def mine(self) -> tuple[Lock, ...]:
        """Returns the locks that name this node, also under an earlier boot, in the order of their IDs.

        Leaves out locks that run() is releasing because their acquire() was given up before the write took effect.
        """
        let_go = {device_id for device_id in self._abandoned if self._orphan(device_id) is not None}
        return tuple(self._view.locks[device_id] for device_id in sorted(self._mine - let_go))

    def lock_status(self, device_id: str) -> LockStatus:
        """Returns the lock's status as this node sees it. EXPIRED only while the device is importable.

        set_importable() and importable_changed() say which devices are importable.
        """
        return protocol.lock_status(self._view.lease(device_id), self._me, self._expiry.observation(device_id))

    def set_importable(self, device_ids: frozenset[str]) -> None:
        """Sets the devices that their servers list as free to import now. Only these are observed for expiry (R4)."""
        self._expiry.set_importable(device_ids)

    def importable_changed(self, device_id: str, *, importable: bool) -> None:
        """Sets for one device whether its server lists it as free to import. Leaves the other devices as they are."""
        self._expiry.importable_changed(device_id, importable=importable)

    def subscribe(self, callback: Callable[[LockChange], None]) -> Callable[[], None]:
        """Calls callback synchronously, in order, at each change of a lock or of its status.

        The callback must be quick and must not raise. A change by one of this node's operations is reported before the
        operation returns. Returns a function that unsubscribes.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def subscribe_api(self, callback: Callable[[ApiState], None]) -> Callable[[], None]:
        """Calls callback synchronously, in order, at each change of the API server's reachability.

        The callback must be quick and must not raise. Returns a function that unsubscribes.
        """
        self._api_subscribers.append(callback)
        return lambda: self._api_subscribers.remove(callback)

    async def acquire(self, key: DeviceKey, meta: LockMeta | None = None, *, claimed: bool = False) -> Grant:
        """Takes the lock, or writes it once more if this boot of this node holds it already (R2, R3, R4).

        Raises LockHeld if another node holds it, LockUnavailable if the API server does not answer or refuses.
        If the call is cancelled or unavailable and its write takes effect after all, run() releases the lock again.
        With claimed=True, run() does not: the caller answers for the lock, whatever the outcome of this call.
        """
        use_meta = meta or LockMeta()
        former: Lock | None = None

        async def decide(lease: Lease | None, write: Write) -> Decision:
            nonlocal former
            importable = self._expiry.importable(key.id)
            observation = self._expiry.observation(key.id)
            if lease is not None and observation is not None and protocol.may_take_over(lease, observation):
                observation = await self._expiry.confirm(lease)
                # ask only after the expiry: by then every import under an earlier write has ended
                if importable and self._is_listed is not None:
                    importable = await self._is_listed(key)
            decision = self._rules.decide_acquire(lease, key, use_meta, write, observation, importable)
            taken = lease is not None and not isinstance(decision, Denied) and lease.holder not in ("", self._me.node)
            former = record.lock_of(lease) if lease is not None and taken else None
            return decision

        with self._timed(), span(self._tracer, "lock.acquire", device_attributes(key)) as acquiring:
            async with self._device_lock(key.id):
                effort = WriteAttempts()
                if claimed:
                    self._abandoned.pop(key.id, None)
                self._taking += 1
                try:
                    outcome = await self._writer.drive(key, decide, effort)
                    grant = await self._timely(key, outcome)
                except BaseException:
                    if not claimed:
                        self._abandon(key, effort)
                    raise
                finally:
                    self._taking -= 1
                    self._session_need()
                self._abandoned.pop(key.id, None)
            acquiring.set_attribute("usbip.lock.epoch", grant.epoch)
            return replace(grant, former=former)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began, result = self._clock.monotonic(), Acquired.FAILED
        try:
            yield
            result = Acquired.TAKEN
        except LockHeld:
            result = Acquired.HELD
            raise
        finally:
            self._on_acquire(result, self._clock.monotonic() - began)

    async def renew(self, key: DeviceKey) -> Grant:
        """Writes the lock again before a re-attach, which opens a new import window (R1).

        Raises LockLost if this boot of this node does not hold the lock any more, LockUnavailable if the API server
        does not answer or refuses. Whatever the outcome, the caller answers for the lock from now on, as after
        acquire(claimed=True).
        """
        async with self._device_lock(key.id):
            self._abandoned.pop(key.id, None)
            return self._grant(await self._amend(key, {}))

    async def annotate(
        self,
        key: DeviceKey,
        *,
        port: int | Unset | None = UNSET,
        pod: PodRef | Unset | None = UNSET,
        identity: Identity | None = None,
    ) -> Lock:
        """Writes the given annotations onto the lock and returns the new record.

        Raises LockLost if this boot of this node does not hold the lock any more, LockUnavailable if the API server
        does not answer or refuses.

        port: the vhci port, None to clear it.
        pod: the pod that has the device, None to clear it.
        identity: what was read from the device. Identity annotations of a device attached before are removed.
        """
        changes: dict[str, str | None] = {}
        if not isinstance(port, Unset):
            changes[record.PORT] = None if port is None else str(port)
        if not isinstance(pod, Unset):
            changes[record.POD] = record.pod_text(pod)
        async with self._device_lock(key.id):
            return record.lock_of((await self._amend(key, changes, identity)).lease)

    async def release(self, key: DeviceKey) -> None:
        """Clears the holder if it is this node, under whichever boot. Does nothing otherwise.

        Raises LockUnavailable if the API server does not answer or refuses. The caller is responsible for R5: the local
        port is free again, or was never used.
        """
        with span(self._tracer, "lock.release", device_attributes(key)):
            async with self._device_lock(key.id):
                await self._writer.drive(key, self._decide_release)

    async def _amend(
        self, key: DeviceKey, changes: Mapping[str, str | None], identity: Identity | None = None
    ) -> AcknowledgedWrite:
        async def decide(lease: Lease | None, write: Write) -> Decision:
            known = lease.annotations if lease is not None else {}
            return self._rules.decide_amend(lease, write, {**changes, **record.identity_notes(known, identity)})

        outcome = await self._writer.drive(key, decide)
        if isinstance(outcome, Denied):
            raise LockLost(str(key), record.holder_text(outcome.lease.holder) if outcome.lease is not None else "")
        return outcome

    async def _timely(self, key: DeviceKey, outcome: AcknowledgedWrite | Denied) -> Grant:
        """Returns the grant for a write. Writes again if half the import window passed before its outcome was known.

        Raises LockHeld or LockUnavailable if the write was denied, LockLost if the lock was lost before the second one.
        """
        if isinstance(outcome, Denied):
            raise _held(key, outcome.lease)
        written = outcome
        if self._clock.monotonic() - written.sent_at > self._settings.import_window / 2:
            written = await self._amend(key, {})
        return self._grant(written)

    def _grant(self, written: AcknowledgedWrite) -> Grant:
        lock = record.lock_of(written.lease)
        deadline = self._rules.import_deadline(written.sent_at, self._settings.import_window)
        return Grant(lock, lock.epoch, deadline)

    def _device_lock(self, device_id: str) -> asyncio.Lock:
        return self._device_locks.setdefault(device_id, asyncio.Lock())

    def _session_need(self) -> None:
        self._session.need(bool(self._mine) or self._taking > 0)

    def _changed(self, change: LockChange) -> None:
        if change.new is not None and change.new.holder == self._me.node:
            self._mine.add(change.device_id)
            self._check_orphan(change.device_id)
        else:
            self._mine.discard(change.device_id)
        self._session_need()
        self._expiry.lock_changed(change.device_id)
        self._tell(change)

    def _standing_changed(self, device_id: str) -> None:
        lock = self._view.locks.get(device_id)
        self._tell(LockChange(device_id, lock, lock))

    def _tell(self, change: LockChange) -> None:
        for callback in tuple(self._subscribers):
            callback(change)

    def _api_changed(self, state: ApiState) -> None:
        if self._contact.call_failed:
            self._follower.relist()
        for callback in tuple(self._api_subscribers):
            callback(state)

    def _abandon(self, key: DeviceKey, effort: WriteAttempts) -> None:
        if effort.tenure is not None:
            self._abandoned[key.id] = (key, effort.tenure)
            self._check_orphan(key.id)

    def _orphan(self, device_id: str) -> DeviceKey | None:
        """Returns the device's key if this node holds the lock only by the write of an acquire() that was given up."""
        key, epoch = self._abandoned.get(device_id, (None, None))
        lease = self._view.lease(device_id)
        held = lease is not None and protocol.is_mine(lease, self._me) and lease.transitions == epoch
        return key if held else None

    def _check_orphan(self, device_id: str) -> None:
        if self._orphan(device_id) is not None:
            self._orphaned.set()

    async def _release_orphans(self) -> None:
        while True:
            await self._orphaned.wait()
            self._orphaned.clear()
            for device_id in sorted(self._abandoned):
                async with self._device_lock(device_id):
                    key = self._orphan(device_id)
                    if key is None:
                        continue
                    logger.info("releasing a lock whose acquisition was given up", extra={"device": str(key)})
                    try:
                        await self._writer.drive(key, self._decide_release)
                    except LockUnavailable as error:
                        logger.warning("orphaned lock not released", extra={"device": str(key), "cause": str(error)})
                        self._orphaned.set()
                    else:
                        del self._abandoned[device_id]
            if self._orphaned.is_set():
                await self._clock.sleep(ORPHAN_RETRY_S)

    async def _decide_release(self, lease: Lease | None, write: Write) -> Decision:
        return self._rules.decide_release(lease, write)


def _held(key: DeviceKey, lease: Lease | None) -> LockError:
    if lease is None:
        return LockUnavailable(str(key), "its record vanished")
    lock = record.lock_of(lease)
    since = lock.acquired_at.isoformat(timespec="seconds") if lock.acquired_at is not None else None
    return LockHeld(str(key), lock.holder, str(lock.pod) if lock.pod is not None else None, since)
