"""LeaseStore in memory, with the conflicts and watches of an API server, and with injected faults."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncGenerator, Callable, Mapping
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeConflict, KubeError, KubeGone, KubeNotFound, KubeUnreachable
from usbip_plugin.locks.record import ChangeType, Lease, LeaseChange, LeaseList
from usbip_plugin.sync import Broadcast, done_within

T = TypeVar("T")

RESOURCE = "leases.coordination.k8s.io"
CALL_TIMEOUT_S = 5.0
"""Seconds that a call may take, as REQUEST_TIMEOUT_S of the real client."""
WATCH_TIMEOUT_S = 300.0
"""Seconds after which the server ends a watch, as WATCH_SERVER_TIMEOUT_S of the real client."""
WATCH_IDLE_S = 90.0
"""Seconds without an event after which the client ends a watch, as WATCH_IDLE_S of the real client."""
BOOKMARK_S = 60.0
"""Seconds without a change after which a watch gets a bookmark. An API server sends one about every minute."""


class Lost(enum.Enum):
    """Part of a call that the network loses. A client notices a loss only by its timeout."""

    NOTHING = "nothing"
    REQUEST = "request"
    RESPONSE = "response"


@dataclass(frozen=True, slots=True)
class Operation:
    """Operation on the API server that is about to happen.

    node: the client's node.
    verb: as in RBAC, or "event" for the delivery of watch events.
    name: the object's name, "" for many objects.
    """

    node: str
    verb: str
    name: str


@dataclass(frozen=True, slots=True)
class Fate:
    """Delays, losses and errors of one call.

    A request that arrives after its client's timeout or cancellation is still carried out, as in reality.

    request, response: delays in seconds of the loop.
    refused: error raised before the call is carried out.
    broken: error raised after the call is carried out.
    """

    request: float = 0.0
    response: float = 0.0
    lost: Lost = Lost.NOTHING
    refused: KubeError | None = None
    broken: KubeError | None = None


FINE = Fate()
Faults = Callable[[Operation], Fate]


@dataclass(frozen=True, slots=True)
class Backup:
    """A copy of all Leases, with the version of the store at that time."""

    leases: Mapping[str, Lease]
    version: int


@dataclass(frozen=True, slots=True)
class _Change:
    version: int
    type: ChangeType
    lease: Lease
    before: Lease | None


class MemoryBackend:
    """Leases that the MemoryLeases of all nodes share; stands for an API server with its etcd.

    history: number of changes that are kept for watches.
    """

    def __init__(self, history: int = 1000) -> None:
        self.leases: dict[str, Lease] = {}
        self._version = 1
        self._highest = 1  # of all versions so far
        self._compacted = 0
        self.restores = 0
        """Number of restores so far. Each breaks every watch and every call under way."""
        self._history: list[_Change] = []
        self._length = history
        self.changed = Broadcast()
        """Rings at each change, and when the history is dropped."""
        self._uids = 0
        self.on_write: Callable[[Lease | None, Lease | None], None] = lambda _before, _after: None
        """Called within each write with the Lease before and after it; None for no Lease."""

    @property
    def version(self) -> str:
        return str(self._version)

    def compact(self) -> None:
        """Drops the history: a watch from an older resourceVersion then raises KubeGone."""
        self._compacted = self._version
        self._history.clear()
        self.changed.fire()

    def backup(self) -> Backup:
        return Backup(dict(self.leases), self._version)

    def restore(self, backup: Backup, bump: int = 0) -> None:
        """Replaces all Leases by those of a backup, which have their old versions then. Does not call `on_write`.

        Ends every watch and call under way: the API server restarts.

        bump: as --bump-revision of `etcdutl snapshot restore`: the store's own version rises by so much. With 0 it goes
            back to that of the backup. No later write gets a version that a Lease has had before: in a cluster, other
            objects have most versions.
        """
        self.leases = dict(backup.leases)
        self._version = backup.version + bump
        self.restores += 1
        self.compact()

    def create(self, lease: Lease) -> Lease:
        if lease.name in self.leases:
            raise KubeConflict("create", RESOURCE, f'"{lease.name}" already exists')
        self._uids += 1
        return self._store(ChangeType.ADDED, replace(lease, uid=f"uid-{self._uids}"), None)

    def replace(self, lease: Lease) -> Lease:
        current = self._current("update", lease.name, lease.resource_version)
        return self._store(ChangeType.MODIFIED, replace(lease, uid=current.uid), current)

    def delete(self, name: str, resource_version: str) -> None:
        current = self._current("delete", name, resource_version)
        self._store(ChangeType.DELETED, current, current)

    def list(self, labels: Mapping[str, str]) -> LeaseList:
        matching = tuple(lease for _, lease in sorted(self.leases.items()) if _matches(lease, labels))
        return LeaseList(matching, str(self._version))

    def last(self, count: int, labels: Mapping[str, str]) -> tuple[LeaseChange, ...]:
        """Returns the last count changes for a watcher with these labels."""
        visible = (_as_watched(change, labels) for change in self._history[-count:])
        return tuple(change for change in visible if change is not None)

    def since(self, version: int, labels: Mapping[str, str]) -> tuple[tuple[LeaseChange, ...], int]:
        """Returns the changes after version for a watcher with these labels, and the current version.

        Raises KubeGone if the history does not reach back to version.
        """
        if version < self._compacted:
            raise KubeGone("watch", RESOURCE, f"too old resource version: {version} ({self._compacted})")
        count = sum(change.version > version for change in self._history)
        return self.last(count, labels) if count else (), self._version

    def _current(self, verb: str, name: str, resource_version: str) -> Lease:
        current = self.leases.get(name)
        if current is None:
            raise KubeNotFound(verb, RESOURCE, f'"{name}" not found')
        if current.resource_version != resource_version:
            raise KubeConflict(verb, RESOURCE, f'"{name}" has been modified')
        return current

    def _store(self, kind: ChangeType, lease: Lease, before: Lease | None) -> Lease:
        if kind is ChangeType.MODIFIED and before is not None and lease == before:
            return before  # as in the API server: a write that changes nothing makes no new version
        self._version = self._highest = max(self._version, self._highest) + 1
        stored = replace(
            lease,
            resource_version=str(self._version),
            annotations=dict(lease.annotations),
            labels=dict(lease.labels),
        )
        if kind is ChangeType.DELETED:
            del self.leases[lease.name]
        else:
            self.leases[lease.name] = stored
        self._history.append(_Change(self._version, kind, stored, before))
        if len(self._history) > self._length:
            self._compacted = self._history.pop(0).version
        self.on_write(before, None if kind is ChangeType.DELETED else stored)
        self.changed.fire()
        return stored


def _matches(lease: Lease, labels: Mapping[str, str]) -> bool:
    return all(lease.labels.get(key) == value for key, value in labels.items())


def _as_watched(change: _Change, labels: Mapping[str, str]) -> LeaseChange | None:
    """Returns a change as a watch with a label selector receives it, None if the watch does not receive it.

    A Lease that begins to match is ADDED; a Lease that stops matching is DELETED.
    """
    before = change.before is not None and _matches(change.before, labels)
    after = change.type is not ChangeType.DELETED and _matches(change.lease, labels)
    if not before and not after:
        return None
    kind = ChangeType.DELETED if not after else ChangeType.MODIFIED if before else ChangeType.ADDED
    version = str(change.version)
    return LeaseChange(kind, version, replace(change.lease, resource_version=version))


@dataclass(eq=False, slots=True)
class _Watcher:
    event: asyncio.Event
    unsubscribe: Callable[[], None]
    broken: bool = False
    replay: int = 0


class MemoryLeases:
    """LeaseStore of one node on a MemoryBackend. faults: returns the fate of each call."""

    def __init__(
        self, backend: MemoryBackend, clock: Clock, node: str = "", faults: Faults = lambda _operation: FINE
    ) -> None:
        self._backend, self._clock, self._node, self._faults = backend, clock, node, faults
        self._watchers: dict[_Watcher, None] = {}
        self._network = Context()  # of no process: a request arrives even if its sender is frozen or dead
        self._flowing = asyncio.Event()
        self._flowing.set()

    def cut(self) -> None:
        """Breaks every open watch of this node, as a dropped connection does. Ends a stall(), too."""
        self.resume()
        for watcher in self._watchers:
            watcher.broken = True
            watcher.event.set()

    def stall(self) -> None:
        """Withholds watch events until resume(). A watch breaks after WATCH_IDLE_S seconds without an event."""
        self._flowing.clear()

    @property
    def stalled(self) -> bool:
        return not self._flowing.is_set()

    def resume(self) -> None:
        """Delivers the events that a stall() withheld."""
        self._flowing.set()

    def replay(self, count: int) -> None:
        """Sends the last count changes once more over every open watch."""
        for watcher in self._watchers:
            watcher.replay = count
            watcher.event.set()

    def process_died(self) -> None:
        """Removes the watches of the process."""
        for watcher in self._watchers:
            watcher.unsubscribe()

    async def get(self, name: str) -> Lease | None:
        return await self._call("get", name, lambda: self._backend.leases.get(name))

    async def list(self, labels: Mapping[str, str], keep: Callable[[Lease], bool] = lambda _lease: True) -> LeaseList:
        found = await self._call("list", "", lambda: self._backend.list(labels))
        return replace(found, items=tuple(filter(keep, found.items)))

    async def create(self, lease: Lease) -> Lease:
        return await self._call("create", lease.name, lambda: self._backend.create(lease))

    async def replace(self, lease: Lease) -> Lease:
        return await self._call("update", lease.name, lambda: self._backend.replace(lease))

    async def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncGenerator[LeaseChange, None]:
        await self._call("watch", "", lambda: None)
        version, end = int(resource_version), self._clock.monotonic() + WATCH_TIMEOUT_S
        last_event = self._clock.monotonic()
        event = asyncio.Event()
        restores = self._backend.restores
        watcher = _Watcher(event, self._backend.changed.subscribe(event.set))
        self._watchers[watcher] = None
        try:
            if version > int(
                self._backend.version
            ):  # from before a restore: the server sends nothing, no bookmark either
                await self._clock.sleep(WATCH_IDLE_S)
                watcher.broken = True
            while True:
                watcher.event.clear()
                watcher.broken = watcher.broken or self._backend.restores != restores
                _intact(watcher)
                changes, version = self._backend.since(version, labels)
                if watcher.replay:
                    count, watcher.replay = watcher.replay, 0
                    changes = (*self._backend.last(count, labels), *changes)
                if changes:
                    await self._deliver(watcher, last_event)
                    last_event = self._clock.monotonic()
                for change in changes:
                    _intact(watcher)
                    yield change
                _intact(watcher)
                if not changes and not await done_within(self._clock, BOOKMARK_S, watcher.event.wait()):
                    await self._flow(watcher, last_event)
                    _intact(watcher)
                    last_event = self._clock.monotonic()
                    yield LeaseChange(ChangeType.BOOKMARK, str(version), None)
                    if self._clock.monotonic() >= end:
                        return
        finally:
            self._watchers.pop(watcher, None)
            watcher.unsubscribe()

    async def _deliver(self, watcher: _Watcher, last_event: float) -> None:
        """Applies the fate of watch events on their way to the client. After a lost event, no more events arrive.

        last_event: time on the client's monotonic clock.
        """
        fate = self._faults(Operation(self._node, "event", ""))
        if fate.response:
            await asyncio.sleep(fate.response)
        if fate.lost is not Lost.NOTHING:
            await self._clock.sleep(last_event + WATCH_IDLE_S - self._clock.monotonic())
            watcher.broken = True
        error = fate.refused or fate.broken
        if error is not None:
            raise error
        await self._flow(watcher, last_event)

    async def _flow(self, watcher: _Watcher, last_event: float) -> None:
        """Waits for the end of a stall(), or breaks the watch WATCH_IDLE_S after the last event."""
        left = last_event + WATCH_IDLE_S - self._clock.monotonic()
        if not await done_within(self._clock, left, self._flowing.wait()):
            watcher.broken = True

    async def _call(self, verb: str, name: str, act: Callable[[], T]) -> T:
        fate, restores = self._faults(Operation(self._node, verb, name)), self._backend.restores
        return await carry(
            verb, RESOURCE, act, fate, self._clock, self._network, lambda: self._backend.restores != restores
        )


async def carry(
    verb: str,
    resource: str,
    act: Callable[[], T],
    fate: Fate,
    clock: Clock,
    network: Context,
    cut: Callable[[], bool] = lambda: False,
) -> T:
    """Sends one call to a simulated API server and returns the result of act(), which runs when the call arrives.

    Raises the error in fate, the KubeError that act() raises, or KubeUnreachable after CALL_TIMEOUT_S.

    network: a context of no process: a request arrives even if its sender is frozen or dead.
    cut: whether the connection has ended, asked when the answer arrives. KubeUnreachable is raised then.
    """
    if fate.refused is not None:
        raise fate.refused
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def arrive() -> None:
        try:
            result = act()
            if fate.broken is not None:
                raise fate.broken
        except KubeError as error:
            reply(answer.set_exception, fate.broken or error)
        else:
            reply(answer.set_result, result)

    def deliver(settle: Callable[[Any], None], value: Any) -> None:
        if answer.done():
            return
        if cut():
            answer.set_exception(KubeUnreachable(verb, resource, "the connection was cut"))
        else:
            settle(value)

    def reply(settle: Callable[[Any], None], value: Any) -> None:
        if fate.lost is not Lost.RESPONSE:
            loop.call_later(fate.response, deliver, settle, value, context=network)

    # Not a task of the caller: a request arrives even if its sender has gone.
    if fate.lost is not Lost.REQUEST:
        loop.call_later(fate.request, arrive, context=network)
    try:
        async with clock.timeout(CALL_TIMEOUT_S):
            return await answer
    except TimeoutError:
        raise KubeUnreachable(verb, resource, "no answer in time") from None


def _intact(watcher: _Watcher) -> None:
    if watcher.broken:
        raise KubeUnreachable("watch", RESOURCE, "the connection was cut")
