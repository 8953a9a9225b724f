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
from functools import partial

from opentelemetry.trace import Tracer

from usbip_plugin.clock import Clock
from usbip_plugin.config.schema import DEFAULT_LOCK_DURATION_S, IMPORT_WINDOW_S
from usbip_plugin.errors import LockError, LockHeld, LockLost, LockReleased, LockUnavailable
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.kept import IgnoredLocks, LockFilter
from usbip_plugin.locks.protocol import Decision, Denied, LockMeta, LockStatus, Rules, Write
from usbip_plugin.locks.record import Lease, LeaseStore
from usbip_plugin.locks.session import ExpiryWatch, Session
from usbip_plugin.locks.watch import ApiReachability, ApiState, LockCache, LockChange, LockWatcher, WatchedStore
from usbip_plugin.locks.writer import AcknowledgedWrite, WriteAttempts, Writer
from usbip_plugin.model import DeviceKey, Identity, Lock, NodeIdentity, PodRef, ServerKey, Tenure, UsbId
from usbip_plugin.observe.spans import device_attributes, span
from usbip_plugin.usbip.poller import ExportState

logger = logging.getLogger(__name__)

ORPHAN_RETRY_S = 5.0
"""Seconds between two tries to release locks whose acquire() was given up."""
MAX_TWINS = 16
"""Boot IDs of other machines of this node's name that are remembered. Whoever may write the locks chooses them."""


@dataclass(frozen=True, slots=True)
class LockSettings:
    """Timing of the locks in seconds, by default as in config/schema.py.

    Raises ValueError unless 0 < import_window < duration / 2, on which the safety of a takeover rests (R1, R4).
    """

    duration: float = DEFAULT_LOCK_DURATION_S
    import_window: float = IMPORT_WINDOW_S

    def __post_init__(self) -> None:
        if not 0 < self.import_window < self.duration / 2:
            half = f"half the lock duration ({self.duration:g} s)"
            raise ValueError(f"import window must be less than {half}, got {self.import_window:g} s")


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to import a device, given by a write on its lock (R1).

    lock: the record as written.
    epoch: leaseTransitions of the record.
    import_deadline: until when an import may run (monotonic seconds of this node).
    former: the lock as another node held it, if this grant took it over (R4).
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


class LockManager:
    """All lock operations of this node. Operations on one device run one after the other, on different devices at once.

    run() must be running: it keeps `locks` current, writes heartbeats and observes the expiry of other nodes' locks.
    Every operation may be cancelled. A cancelled operation may still have taken effect; release() undoes it.

    locks: the newest known record of each lock, held or released, by device ID; live and read-only. Without locks of
        other servers than those of follow(), and bounded, see locks/kept.py.
    rules: the lock rules, with which callers check during an import whether it may go on (R1).
    ready: set once the locks have been read.
    export_state(key): asks the device's server, right before a takeover, whether it lists the device (R3, R4): `expiry`
        may be stale if this process was suspended. With None, `expiry` alone decides.
    on_acquire(result, seconds): called at the end of each acquire().
    is_claimed(device_id): whether the node has a claim on the device, so that its lock is kept in `locks`.
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
        export_state: Callable[[DeviceKey], Awaitable[ExportState]] | None = None,
        on_acquire: Callable[[Acquired, float], None] = lambda _result, _seconds: None,
        is_claimed: Callable[[str], bool] = lambda _device_id: False,
    ) -> None:
        self._me, self._clock, self._tracer = me, clock, tracer
        self.settings, self.rules = settings, rules or Rules()
        self._export_state = export_state
        self._on_acquire = on_acquire
        self._subscribers: list[Callable[[LockChange], None]] = []
        self._api_subscribers: list[Callable[[ApiState], None]] = []
        self._reachability = ApiReachability(clock, self._api_changed)
        watched = WatchedStore(store, self._reachability)
        self._view = LockCache(self._changed, LockFilter(me.node, is_claimed))
        self.locks: Mapping[str, Lock] = self._view.locks
        self._writer = Writer(watched, self._view, me, clock, rng, settings.duration, tracer, self._update_session)
        self.session = Session(watched, self._writer.new_write, clock, rng, settings.duration, self.rules)
        self.expiry = ExpiryWatch(
            watched, self._view, me.node, clock, settings.duration, self.rules, self._status_changed
        )
        self.ready = asyncio.Event()
        self._watcher = LockWatcher(watched, self._view, self._reachability, clock, rng, self.ready, self._settle)
        self._device_locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._mine: set[str] = set()
        self._tenures: dict[str, Tenure] = {}  # by device ID: the last hold by this boot
        self._twins: dict[str, None] = {}  # boot IDs of other machines of this node's name, seen to be alive
        self._twin_wrote: dict[str, float] = {}  # by device ID: when another boot of this node was last seen to write
        self._taking = 0
        # By device ID: the epoch that an acquire() may have begun before it was given up.
        self._abandoned: dict[str, tuple[DeviceKey, int]] = {}
        self._orphaned = asyncio.Event()

    async def run(self) -> None:
        """Runs until cancelled. Leaves the locks as they are."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watcher.run(), name="lock-watch")
            group.create_task(self.session.run(), name="lock-session")
            group.create_task(self.expiry.run(), name="lock-expiry")
            group.create_task(self._release_orphans(), name="lock-orphans")

    @property
    def api(self) -> ApiState:
        return self._reachability.state

    @property
    def ignored(self) -> IgnoredLocks:
        """Returns the numbers of the locks that `locks` leaves out."""
        return self._view.ignored

    def follow(self, servers: frozenset[ServerKey]) -> None:
        """Sets the servers whose locks are kept. If there are new ones, lists the locks again."""
        before, self._view.kept.servers = self._view.kept.servers, servers
        if before is not None and servers - before:
            self._watcher.relist()

    async def followed(self, servers: frozenset[ServerKey]) -> None:
        """Waits until a list has brought the locks of these servers, of which follow() was told. Cancel-safe."""
        await self._watcher.listed.until(lambda: (covered := self._watcher.covered) is None or servers <= covered)

    @property
    def list_began_at(self) -> float | None:
        """Returns when the last list of locks began (monotonic seconds), None while a watch is open."""
        return self._watcher.turned_at

    def mine(self) -> tuple[Lock, ...]:
        """Returns the locks that name this node, also under an earlier boot, in the order of their IDs.

        Leaves out locks that run() is releasing because their acquire() was given up before the write took effect, and
        those of another machine of this node's name that was seen to be alive.
        """
        orphans = {device_id for device_id in self._abandoned if self._orphan(device_id) is not None}
        named = (self.locks[device_id] for device_id in sorted(self._mine - orphans))
        return tuple(lock for lock in named if lock.boot_id not in self._twins)

    def lock_status(self, device_id: str) -> LockStatus:
        """Returns the lock's status as this node sees it. EXPIRED only while `expiry` has the device as importable."""
        return protocol.lock_status(self._view.lease(device_id), self._me, self.expiry.observation(device_id))

    def subscribe(self, callback: Callable[[LockChange], None]) -> Callable[[], None]:
        """Calls callback synchronously, in order, at each change of a lock or of its status. Returns an unsubscriber.

        The callback must be quick and must not raise. A change by an own operation is reported before that returns.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def subscribe_api(self, callback: Callable[[ApiState], None]) -> Callable[[], None]:
        """Like subscribe(), for each change of the API server's reachability."""
        self._api_subscribers.append(callback)
        return lambda: self._api_subscribers.remove(callback)

    def tenure(self, device_id: str) -> Tenure | None:
        """Returns this boot's last hold of the lock, None if it has none or has released it."""
        return self._tenures.get(device_id)

    def remember(self, device_id: str, tenure: Tenure) -> None:
        """Recalls a hold of this boot from an earlier process, for a device that is still attached.

        Does nothing if the lock names this boot now, or if this process knows a later hold or one of another Lease.
        """
        if protocol.is_mine(self._view.lease(device_id), self._me):
            return
        known = self._tenures.setdefault(device_id, tenure)
        if known.uid == tenure.uid and known.epoch < tenure.epoch:
            self._tenures[device_id] = tenure

    def is_set_back(self, device_id: str) -> bool:
        """Returns whether a restore of etcd has set the lock back to before this boot's hold of it (R6)."""
        return protocol.is_set_back(self._view.lease(device_id), self._me, self._tenures.get(device_id))

    def is_of_earlier_boot(self, device_id: str) -> bool:
        """Returns whether the lock names an earlier boot of this node, as far as is known (R3)."""
        lease, lock = self._view.lease(device_id), self.locks.get(device_id)
        return protocol.of_another_boot(lease, self._me) and lock is not None and lock.boot_id not in self._twins

    async def acquire(
        self,
        key: DeviceKey,
        meta: LockMeta | None = None,
        *,
        claimed: bool = False,
        attached: bool = False,
        listed: bool = False,
    ) -> Grant:
        """Takes the lock, or writes it once more if this boot of this node holds it already (R2, R3, R4).

        Raises LockHeld if another node holds it, or another boot of this node (R3). Raises LockUnavailable if the API
        server does not answer or refuses, or if another boot left the lock and the server does not list the device.
        If the call is cancelled or unavailable and its write takes effect after all, run() releases the lock again.
        With claimed=True, run() does not release it: the caller must, whatever the outcome of this call. Raises
        LockReleased then for a lock that a person has released (R6).
        With attached=True, the device is attached here, so that nobody else has it: a lock that was set back or left is
        taken. With listed=True, a lock that nobody holds is taken only if the server lists the device: the connection
        of its last holder may be half-open there, and only that node, from the port on the lock, can end it.
        """
        former: Lock | None = None
        tenure = self._tenures.get(key.id) if attached else None

        async def decide(lease: Lease | None, write: Write) -> Decision:
            nonlocal former
            if lease is not None and protocol.is_set_back(lease, self._me, tenure):
                before = replace(lease, holder="")
                return self.rules.decide_acquire(before, key, meta or LockMeta(), write, None, True)
            free = record.lock_of(lease) if lease is not None and protocol.is_free(lease) else None
            if claimed and free is not None and free.stays_released(meta.pod if meta is not None else None):
                return Denied(lease)  # a person has released it since the caller looked
            if listed and free is not None:
                await self._check_listed(key)
            left = protocol.is_left(lease, self._me)
            other_boot = protocol.of_another_boot(lease, self._me)
            # an import under that write may not have begun yet (R1)
            pending = other_boot and self._twin_may_import(key.id)
            importable = attached if left else self.expiry.importable(key.id) and not pending
            observation = self.expiry.observation(key.id)
            ask = (left and not attached) or (other_boot and not pending)
            if lease is not None and observation is not None and protocol.may_take_over(lease, observation):
                observation = await self.expiry.confirm(lease)
                # ask only after the expiry: by then every import under an earlier write has ended
                ask = importable
            if ask and self._export_state is not None:
                state = await self._export_state(key)
                importable = state is ExportState.FREE or (left and state is ExportState.LISTED)
            decision = self.rules.decide_acquire(lease, key, meta or LockMeta(), write, observation, importable)
            taken = lease is not None and not isinstance(decision, Denied) and lease.holder not in ("", self._me.node)
            former = record.lock_of(lease) if lease is not None and taken else None
            return decision

        with self._timed(), span(self._tracer, "lock.acquire", device_attributes(key)) as acquiring:
            async with self._device_lock(key.id):
                attempts = WriteAttempts()
                if claimed:
                    self._abandoned.pop(key.id, None)
                self._taking += 1
                try:
                    outcome = await self._writer.drive(key, decide, attempts)
                    grant = await self._fresh_grant(key, outcome)
                except BaseException:
                    if not claimed and attempts.tenure is not None:
                        self._abandoned[key.id] = (key, attempts.tenure)
                        self._check_orphan(key.id)
                    raise
                finally:
                    self._taking -= 1
                    self._update_session()
                self._abandoned.pop(key.id, None)
            acquiring.set_attribute("usbip.lock.epoch", grant.epoch)
            return replace(grant, former=former)

    async def _check_listed(self, key: DeviceKey) -> None:
        if self._export_state is not None and await self._export_state(key) in (
            ExportState.UNLISTED,
            ExportState.UNKNOWN,
        ):
            cause = "the connection of its last holder may be half-open, because its server does not list the device"
            raise LockUnavailable(str(key), cause)

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

    async def renew(self, key: DeviceKey, meta: LockMeta | None = None) -> Grant:
        """Writes the lock again before a re-attach, which opens a new import window (R1).

        meta: what the lock is to say; None to leave that as it is.

        Raises LockLost if this boot of this node does not hold the lock any more, LockUnavailable if the API server
        does not answer or refuses. Whatever the outcome, run() does not release the lock: the caller must.
        """
        async with self._device_lock(key.id):
            self._abandoned.pop(key.id, None)
            return self._grant(await self._amend(key, meta or LockMeta()))

    async def annotate(
        self,
        key: DeviceKey,
        *,
        port: int | None = None,
        pod: PodRef | None = None,
        usb_id: UsbId | None = None,
        identity: Identity | None = None,
    ) -> Lock:
        """Writes the given annotations onto the lock and returns the new record. Raises the errors of renew().

        An identity, or another USB ID, replaces what was read from another device, which was attached before.
        """
        meta = LockMeta(str(usb_id) if usb_id is not None else None, identity, pod=pod, port=port)
        async with self._device_lock(key.id):
            return record.lock_of((await self._amend(key, meta)).lease)

    async def release(self, key: DeviceKey, *, failed: bool | None = None, left: bool = False) -> None:
        """Clears the holder if it is this node. Does nothing if another node holds the lock.

        The caller must have freed the port (R5). Raises LockUnavailable if the API server does not answer or refuses,
        LockHeld if another boot of this node holds the lock, and was seen to be alive or the server's answer does not
        let the lock go (R3).

        failed: whether the Allocate failed because of the device, which is recorded; None to leave the record.
        left: whether the server may still export the device to a dead connection of this node. Then the lock keeps the
            boot id, and another node takes it only when the server lists the device, as for a lock of another boot.
        """

        async def decide(lease: Lease | None, write: Write) -> Decision:
            decision = await self._decide_release(key, lease, write)
            if isinstance(decision, Denied):
                return decision
            notes: dict[str, str | None] = {}
            if failed is not None:
                notes[record.FAILED_EPOCH] = str(record.epoch_of(decision.lease)) if failed else None
            if left and protocol.is_mine(lease, self._me):
                notes[record.BOOT_ID] = self._me.boot_id
            merged = record.merged_annotations(decision.lease.annotations, notes)
            return replace(decision, lease=replace(decision.lease, annotations=merged))

        with span(self._tracer, "lock.release", device_attributes(key)):
            async with self._device_lock(key.id):
                outcome = await self._writer.drive(key, decide)
                self._tenures.pop(key.id, None)
            if isinstance(outcome, Denied) and protocol.of_another_boot(outcome.lease, self._me):
                raise _held(key, outcome.lease, self._me)

    async def _amend(self, key: DeviceKey, meta: LockMeta) -> AcknowledgedWrite:
        async def decide(lease: Lease | None, write: Write) -> Decision:
            changes = protocol.meta_notes(lease, meta) if lease is not None else {}
            return self.rules.decide_amend(lease, write, changes)

        outcome = await self._writer.drive(key, decide)
        if isinstance(outcome, Denied):
            raise LockLost(str(key), record.holder_text(outcome.lease.holder) if outcome.lease is not None else "")
        return outcome

    async def _fresh_grant(self, key: DeviceKey, outcome: AcknowledgedWrite | Denied) -> Grant:
        """Returns the grant for a write. Renews the lock first if half the import window has passed since it was sent.

        Raises LockHeld or LockUnavailable if the write was denied, LockLost if the lock was lost before the second one.
        """
        if isinstance(outcome, Denied):
            raise _held(key, outcome.lease, self._me)
        if self._clock.monotonic() - outcome.sent_at > self.settings.import_window / 2:
            outcome = await self._amend(key, LockMeta())
        return self._grant(outcome)

    def _grant(self, written: AcknowledgedWrite) -> Grant:
        lock = record.lock_of(written.lease)
        deadline = self.rules.import_deadline(written.sent_at, self.settings.import_window)
        return Grant(lock, lock.epoch, deadline)

    def _device_lock(self, device_id: str) -> asyncio.Lock:
        return self._device_locks.setdefault(device_id, asyncio.Lock())

    def _update_session(self) -> None:
        self.session.need(bool(self.mine()) or self._taking > 0)

    def _changed(self, change: LockChange) -> None:
        if change.new is not None and change.new.holder == self._me.node:
            self._mine.add(change.device_id)
            lease = self._view.lease(change.device_id)
            if lease is not None and protocol.is_mine(lease, self._me):
                self._tenures[change.device_id] = Tenure(lease.uid, record.epoch_of(lease))
            else:
                self._note_twin(change, change.new)
            self._check_orphan(change.device_id)
        else:
            self._mine.discard(change.device_id)
            self._twin_wrote.pop(change.device_id, None)
        self._update_session()
        self.expiry.lock_changed(change.device_id)
        self._notify(change)

    def _note_twin(self, change: LockChange, lock: Lock) -> None:
        if self.is_set_back(change.device_id):
            return  # an outdated event, or a restore: this boot has held the lock since
        listed = change.listed or not self.ready.is_set()  # before the first list, a lock is new to this node only
        if not listed:
            self._twin_wrote[change.device_id] = self._clock.monotonic()
        if not protocol.shows_twin(change.old, lock, self._me, listed=listed) or lock.boot_id in self._twins:
            return
        self._twins[str(lock.boot_id)] = None
        if len(self._twins) > MAX_TWINS:
            del self._twins[next(iter(self._twins))]
        extra = {"node": self._me.node, "boot": lock.boot_id, "own_boot": self._me.boot_id}
        logger.error("another machine has this node's name", extra=extra)

    def _twin_may_import(self, device_id: str) -> bool:
        wrote = self._twin_wrote.get(device_id)
        window = self.settings.import_window
        return wrote is not None and self.rules.twin_may_import(self._clock.monotonic() - wrote, window)

    def _status_changed(self, device_id: str) -> None:
        lock = self.locks.get(device_id)
        self._notify(LockChange(device_id, lock, lock))

    def _notify(self, change: LockChange) -> None:
        for callback in tuple(self._subscribers):
            callback(change)

    def _api_changed(self, state: ApiState) -> None:
        if self._reachability.call_failed:
            self._watcher.relist()
        for callback in tuple(self._api_subscribers):
            callback(state)

    async def look_up(self, device_id: str) -> None:
        """Reads a lock, and keeps it in `locks` until the next list, whatever its server. Raises KubeError."""
        async with self._device_lock(device_id):
            await self._writer.read(device_id)

    async def _settle(self, device_id: str) -> None:
        """Reads a lock of which a list and an own call, under way at the same time, have shown different records."""
        async with self._device_lock(device_id):
            if device_id in self._view.doubtful:
                await self._writer.read(device_id)

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
                    logger.info("orphaned lock found, releasing it", extra={"device": str(key)})
                    try:
                        await self._writer.drive(key, partial(self._decide_release, key))
                    except LockUnavailable as error:
                        logger.warning("orphaned lock not released", extra={"device": str(key), "cause": str(error)})
                        self._orphaned.set()
                    else:
                        del self._abandoned[device_id]
            if self._orphaned.is_set():
                await self._clock.sleep(ORPHAN_RETRY_S)

    async def _decide_release(self, key: DeviceKey, lease: Lease | None, write: Write) -> Decision:
        evident = False
        alive = lease is not None and lease.annotations.get(record.BOOT_ID) in self._twins
        if protocol.of_another_boot(lease, self._me) and not alive and self._export_state is not None:
            evident = await self._export_state(key) in (ExportState.FREE, ExportState.UNLISTED)
        return self.rules.decide_release(lease, write, evident)


def _held(key: DeviceKey, lease: Lease | None, me: NodeIdentity) -> LockError:
    if lease is None:
        return LockUnavailable(str(key), "its Lease was deleted meanwhile")
    if protocol.is_free(lease) and not protocol.is_left(lease, me):
        return LockReleased(str(key))  # nothing else forbids to take it
    if protocol.is_free(lease):
        cause = "its last holder may still have the device, and no list shows it as free"
        return LockUnavailable(str(key), cause)
    lock = record.lock_of(lease)
    since = lock.acquired_at.isoformat(timespec="seconds") if lock.acquired_at is not None else None
    pod = str(lock.pod) if lock.pod is not None else None
    other_boot = protocol.of_another_boot(lease, me)
    return LockHeld(str(key), lock.holder, pod, since, other_boot=other_boot)
