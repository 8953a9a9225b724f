"""The fence: exports a device only to where the holder of its lock says it connects from.

A lock alone cannot stop a node that was frozen between its write and its import. The exporter can: it reads the lock
when the import arrives. Then no two nodes have the device, however long a node was frozen.
"""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from collections.abc import Awaitable, Callable, Sequence

from usbip_plugin.clock import Clock
from usbip_plugin.config.export import ExportConfig, WhenApiIsAway
from usbip_plugin.errors import KubeError, KubeUnreachable
from usbip_plugin.exporter.gate import Refusal
from usbip_plugin.exporter.names import HostNames, find_names
from usbip_plugin.kube.client import connect
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import ChangeType, Lease, LeaseChange, LeaseStore, lock_of
from usbip_plugin.locks.watch import (
    ApiReachability,
    ApiState,
    LockCache,
    LockChange,
    LockWatcher,
    WatchedStore,
    read_lock,
)
from usbip_plugin.model import DeviceKey, Endpoint, Lock, ServerKey
from usbip_plugin.sync import Broadcast, done_within

log = logging.getLogger(__name__)

READ_S = 2.0
"""Seconds in which an import must be decided. Its client waits a few seconds; a read takes milliseconds."""
NEW_LOCK_S = 1.0
"""Seconds that an import waits for the watch to bring the first lock of its device. The watch takes milliseconds."""
MAX_READS = 16
"""Locks of one device that are read for an import, one for each name that plugins have for this server."""


def decide_import(locks: Sequence[Lock], peer: Endpoint) -> Refusal | None:
    """Decides whether the exporter gives a device to the connection from peer. Returns None if it does.

    locks: the locks of the device, one for each name of the server, read after the import had arrived.
    """
    held = [lock for lock in locks if lock.holder]
    if any(lock.import_from == peer for lock in held):
        return None
    if not locks:
        return Refusal("no lock names it; add this host to names as the plugins' configuration names it")
    if not held:
        return Refusal("nobody holds its lock")
    holders = [
        f"{lock.holder} ({lock.import_from or 'its plugin does not write from where it connects'})" for lock in held
    ]
    return Refusal(f"its lock is held by {', '.join(holders)}")


def may_keep(locks: Sequence[Lock], peer: Endpoint) -> bool:
    """Decides whether the connection from peer may keep a device.

    It may not if a holder connects from elsewhere, or if a person has released the lock: the plugin would detach the
    device, too. Any other lock that nobody holds ends nothing, because its holder takes it again (R6). Nor does a lock
    whose holder has not written from where it connects.
    """
    if any(lock.by_hand and lock.import_from == peer for lock in locks):
        return False
    origins = [lock.import_from for lock in locks if lock.holder and lock.import_from is not None]
    return not origins or peer in origins


async def make_gate(
    config: ExportConfig, *, port: int, kubeconfig: str | None, namespace: str, clock: Clock
) -> LeaseGate:
    """Returns the gate for the Leases of a cluster. Sends nothing to the API server yet.

    port: where the exporter listens. Raises ConfigError if there is no usable access to a cluster.
    """
    client = await connect(kubeconfig, clock=clock)
    names = HostNames(config.names, () if config.names else await asyncio.to_thread(find_names))

    def is_own(server: ServerKey) -> bool:
        return server.port == port and names.includes(server.host)

    leases = KubernetesLeases(client, namespace)
    return LeaseGate(leases, is_own, config.when_api_is_away, clock, random.Random(), client.close)  # noqa: S311 - jitter


class LeaseGate:
    """The Gate that knows the locks: decide_import() and may_keep() on Leases that are watched, and read for an import.

    is_own: whether a server is this exporter, by the name that the plugins' configuration has for it.
    close: called when run() ends.
    """

    def __init__(
        self,
        store: LeaseStore,
        is_own: Callable[[ServerKey], bool],
        when_away: WhenApiIsAway,
        clock: Clock,
        rng: random.Random,
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._when_away, self._clock, self._close = when_away, clock, close
        self._reachability = ApiReachability(clock, self._api_changed)
        self._store = WatchedStore(store, self._reachability)
        self._cache = _OwnLocks(is_own, self._lock_changed)
        self._ready = asyncio.Event()
        self._watcher = LockWatcher(
            self._store, self._cache, self._reachability, clock, rng, self._ready, self._read_lock
        )
        self._reading: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._changed = Broadcast()
        self._subscribers: list[Callable[[str], None]] = []
        self._newest: dict[str, tuple[str, Lock]] = {}
        """By device ID, the uid of its Lease, and the lock as it was last written: a restore of etcd writes nothing."""
        self._unverified: dict[str, Endpoint] = {}
        """By bus ID, the last import that was granted without the locks, until they can be read again."""
        self._is_away = False

    async def run(self) -> None:
        """Watches the locks until cancelled."""
        try:
            await self._watcher.run()
        finally:
            if self._close is not None:
                await self._close()

    async def admits(self, busid: str, peer: Endpoint) -> Refusal | None:
        try:
            async with self._clock.timeout(READ_S):
                await self._read(busid, peer)
        except TimeoutError:
            return self._without_locks(busid, peer, KubeUnreachable("get", "leases", f"no answer within {READ_S:g} s"))
        except KubeError as error:
            return self._without_locks(busid, peer, error)
        return decide_import(self._locks(busid), peer)

    def may_stay(self, busid: str, peer: Endpoint | None) -> bool:
        if peer is None or self._unverified.get(busid) == peer:
            return True
        locks = self._locks(busid)
        return may_keep(locks, peer) or any(self._was_set_back(lock, peer) for lock in locks)

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def problem(self) -> str | None:
        state = self._reachability.state
        if state.reachable:
            return None
        return f"locks cannot be read ({state.error or 'not read yet'}); {_CONSEQUENCE[self._when_away]}"

    def _locks(self, busid: str) -> list[Lock]:
        return [lock for lock in self._cache.locks.values() if lock.key is not None and lock.key.busid == busid]

    async def _read(self, busid: str, peer: Endpoint) -> None:
        """Reads the locks of a device from the API server until one of them admits peer. Raises KubeError."""
        await self._ready.wait()
        if not self._locks(busid):
            await done_within(self._clock, NEW_LOCK_S, self._changed.until(lambda: self._locks(busid)))
        servers = {lock.key.server for lock in self._cache.locks.values() if lock.key is not None}
        names = [DeviceKey(server, busid).id for server in sorted(servers)]
        names.sort(key=lambda name: not self._is_from(name, peer))  # usually the only read
        for name in names[:MAX_READS]:
            await self._read_lock(name)
            if self._is_from(name, peer):
                return

    async def _read_lock(self, name: str) -> None:
        async with self._reading.setdefault(name, asyncio.Lock()):
            await read_lock(self._store, self._cache, name)

    def _is_from(self, name: str, peer: Endpoint) -> bool:
        lock = self._cache.locks.get(name)
        return lock is not None and decide_import([lock], peer) is None

    def _without_locks(self, busid: str, peer: Endpoint, error: KubeError) -> Refusal | None:
        self._reachability.call_down(error)
        if self._when_away is WhenApiIsAway.REFUSE:
            return Refusal(f"its lock cannot be read: {error}")
        self._unverified[busid] = peer
        return None

    def _was_set_back(self, lock: Lock, peer: Endpoint) -> bool:
        """Returns whether a restore of etcd has set back a lock whose holder connects from peer.

        Its holder takes the lock again, because it has the device (R6).
        """
        _uid, newest = self._newest.get(lock.device_id, ("", lock))
        return newest != lock and newest.holder != "" and newest.import_from == peer

    def _note_newest(self, change: LockChange) -> None:
        lease = self._cache.lease(change.device_id)
        if lease is None or change.new is None:
            self._newest.pop(change.device_id, None)
            return
        uid, newest = self._newest.get(change.device_id, ("", None))
        # each new holder begins an epoch, so that one of whom a list tells has a later one
        if newest is None or not change.listed or lease.uid != uid or change.new.epoch > newest.epoch:
            self._newest[change.device_id] = (lease.uid, change.new)

    def _lock_changed(self, change: LockChange) -> None:
        self._note_newest(change)
        lock = change.new or change.old
        if lock is not None and lock.key is not None:
            self._notify(lock.key.busid)
        self._changed.fire()

    def _notify(self, busid: str) -> None:
        for callback in tuple(self._subscribers):
            callback(busid)

    def _api_changed(self, state: ApiState) -> None:
        if self._reachability.call_failed:
            self._watcher.relist()
        if state.reachable:
            unverified, self._unverified = self._unverified, {}
            for busid in unverified:
                self._notify(busid)
        if state.reachable == self._is_away:
            self._is_away = not state.reachable
            if self._is_away:
                extra = {"cause": state.error, "imports": self._when_away.value}
                log.warning("locks cannot be read", extra=extra)
            else:
                log.info("locks can be read again")


_CONSEQUENCE = {
    WhenApiIsAway.REFUSE: "imports are refused",
    WhenApiIsAway.SERVE: "imports are granted to everybody",
}


class _OwnLocks(LockCache):
    """The cache of the locks of this exporter's devices. Leaves out those of other servers."""

    def __init__(self, is_own: Callable[[ServerKey], bool], on_change: Callable[[LockChange], None]) -> None:
        super().__init__(on_change)
        self._is_own_server = is_own

    def apply(self, change: LeaseChange) -> None:
        own = change.lease is not None and self._is_own(change.lease)
        super().apply(change if own else LeaseChange(ChangeType.BOOKMARK, change.resource_version, None))

    def begin_list(self) -> Callable[[Lease], bool]:
        keep = super().begin_list()
        return lambda lease: self._is_own(lease) and keep(lease)

    def _is_own(self, lease: Lease) -> bool:
        key = lock_of(lease).key
        return lease.name in self.locks or (key is not None and self._is_own_server(key.server))
