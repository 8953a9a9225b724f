"""Asks every server again and again what it lists, side by side: a dead one delays no other.

All nodes ask the same servers, and a small server must bear them all: each node keeps to its share of MAX_RATE. The
more nodes there are the more seldom each of them asks, and the sooner some node sees what is new.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import UsbipError
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.usbip.client import UsbipClient

log = logging.getLogger(__name__)


# Seconds.
POLL_INTERVAL = 3.0
POLL_TIMEOUT = 3.0
FIRST_RETRY = 1.0
MAX_RETRY = 30.0
# A device that was let go stays hidden while its server resets it, about 0.3 s.
SECOND_LOOK = 0.5
JITTER = (0.8, 1.2)
# DEVLIST requests per second to one server, of all nodes together.
MAX_RATE = 20.0


class ServerState(enum.Enum):
    PENDING = "not asked yet"
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class ServerView:
    """What is known of one server. devices: the last good list by busid, kept while the server is unreachable.

    error: why the last poll failed, None if it did not. failures: polls failed in a row. by_busid: the devices.
    """

    server: ServerKey
    state: ServerState = ServerState.PENDING
    devices: tuple[Descriptor, ...] = ()
    error: str | None = None
    failures: int = 0
    by_busid: Mapping[str, Descriptor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_busid", {device.busid: device for device in self.devices})


def listed(view: ServerView, devices: Iterable[Descriptor]) -> ServerView:
    """The view after a good poll."""
    return ServerView(view.server, ServerState.REACHABLE, tuple(sorted(devices, key=lambda device: device.busid)))


def failed(view: ServerView, error: str) -> ServerView:
    """The view after a failed poll. One failure is enough: a pod admitted on a stale view fails for good, a pod kept
    waiting for the next good poll does not."""
    return replace(view, state=ServerState.UNREACHABLE, error=error, failures=view.failures + 1)


def differs(old: ServerView, new: ServerView) -> bool:
    """Whether there is something to tell: everything but the count of failures."""
    return replace(old, failures=0) != replace(new, failures=0)


def share(nodes: int) -> float:
    """Seconds between two polls of one server by one node, so that all nodes together keep to MAX_RATE."""
    return max(1, nodes) / MAX_RATE


class NodeCount(Protocol):
    """All nodes that ask the same servers. nodes: how many there are, this one included, or are taken to be."""

    @property
    def nodes(self) -> int: ...

    async def known(self) -> None:
        """Returns when they have been counted, or that could not be done. Bounded in time; cancel-safe."""
        ...


class SingleNode:
    """A Fleet of one node."""

    nodes = 1

    async def known(self) -> None:
        """At once."""


class ServerPoller:
    """Asks servers, again and again, what they list. All methods belong to one event loop; `run` must be running.

    No server is polled more often than once in share(fleet.nodes) seconds, for whatever reason, but those that hurry()
    names. That bounds the polls of a server by MAX_RATE and the number of its devices that pods have lost.
    """

    def __init__(
        self,
        client: UsbipClient,
        clock: Clock,
        rng: random.Random,
        *,
        fleet: NodeCount | None = None,
        interval: float = POLL_INTERVAL,
        timeout: float = POLL_TIMEOUT,
    ) -> None:
        self._client, self._clock, self._rng = client, clock, rng
        self._subscribers: list[Callable[[ServerView], None]] = []
        self._fleet = fleet or SingleNode()
        self._interval, self._timeout = interval, timeout
        self._views: dict[ServerKey, ServerView] = {}
        self._answered: dict[ServerKey, float] = {}
        self._asked: dict[ServerKey, float] = {}
        self._polled = asyncio.Event()
        self._pokes: dict[ServerKey, asyncio.Event] = {}
        self._hurried: frozenset[ServerKey] = frozenset()
        self._servers_changed = asyncio.Event()

    @property
    def views(self) -> Mapping[ServerKey, ServerView]:
        """A live read-only view: one entry for each server set."""
        return MappingProxyType(self._views)

    @property
    def answered(self) -> Mapping[ServerKey, float]:
        """When each server last answered a poll (monotonic); those that have not are not in it."""
        return MappingProxyType(self._answered)

    def subscribe(self, callback: Callable[[ServerView], None]) -> Callable[[], None]:
        """Calls callback, synchronously, with each view that differs from the one before; it may call back in here.

        Returns the way to unsubscribe.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def set_servers(self, servers: frozenset[ServerKey]) -> None:
        """Poll exactly these from now on; may be called at any time. Views of those that stay are kept."""
        self._views = {server: self._views.get(server, ServerView(server)) for server in sorted(servers)}
        self._answered = {server: at for server, at in self._answered.items() if server in servers}
        self._asked = {server: at for server, at in self._asked.items() if server in servers}
        self._servers_changed.set()
        self._end_of_poll()

    def poll_eagerly(self, servers: frozenset[ServerKey]) -> None:
        """Poll exactly these at the interval of a small fleet from now on: a pod waits for a device of theirs."""
        new, self._hurried = servers - self._hurried, servers
        for server in sorted(new):
            self.poll_soon(server)

    def poll_soon(self, server: ServerKey) -> None:
        """Poll as soon as this node's share allows, or again if a poll is under way. Unknown servers are ignored.

        If that is at once, then once more half a second later: a device may be hidden until then.
        """
        event = self._pokes.get(server)
        if event is not None:
            event.set()

    async def polled_since(self, server: ServerKey, moment: float) -> None:
        """Returns when a poll that was sent at this moment (monotonic) or later is over, whatever it came to.

        Also when the server is not polled any more. Unbounded while run() does not run; cancel-safe.
        """
        while server in self._views and self._asked.get(server, moment - 1) < moment:
            await self._polled.wait()

    async def is_exported(self, key: DeviceKey) -> bool:
        """Asks the server at once, besides all polls, whether it lists this device. False if it does not answer.

        Cancel-safe. What views says stays as it is.
        """
        try:
            return await self.fetch(key) is not None
        except UsbipError as error:
            log.debug("not known whether a device is free", extra={"device": str(key), "cause": str(error)})
            return False

    async def fetch(self, key: DeviceKey) -> Descriptor | None:
        """The same, and as what it lists the device. UsbipError if it does not answer."""
        devices = await self._client.devlist(key.server, timeout=self._timeout)
        return next((device for device in devices if device.busid == key.busid), None)

    async def run(self) -> None:
        """Poll until cancelled."""
        await self._fleet.known()
        tasks: dict[ServerKey, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                self._servers_changed.clear()
                for gone in sorted(tasks.keys() - self._views.keys()):
                    tasks.pop(gone).cancel()
                    del self._pokes[gone]
                for new in sorted(self._views.keys() - tasks.keys()):
                    self._pokes[new] = asyncio.Event()
                    tasks[new] = group.create_task(self._poll(new, self._pokes[new]), name=f"poll {new}")
                await self._servers_changed.wait()

    async def _poll(self, server: ServerKey, poke: asyncio.Event) -> None:
        waits = backoff(self._rng, FIRST_RETRY, MAX_RETRY)
        poked_at = await self._next(server, poke, -math.inf, self._spread(server))
        while True:
            poke.clear()  # before asking: what happens from here on may not be in the answer
            asked_at = self._clock.monotonic()
            try:
                devices = await self._client.devlist(server, timeout=self._timeout)
            except UsbipError as error:
                self._update(server, partial(failed, error=str(error)))
                wait = next(waits)
            else:
                self._update(server, partial(listed, devices=devices))
                waits = backoff(self._rng, FIRST_RETRY, MAX_RETRY)
                wait = self._interval * self._rng.uniform(*JITTER)
            self._asked[server] = asked_at
            self._end_of_poll()
            if poked_at is not None and asked_at - poked_at < SECOND_LOOK:
                wait = min(wait, SECOND_LOOK)
            poked_at = await self._next(server, poke, asked_at, wait)

    async def _next(self, server: ServerKey, poke: asyncio.Event, asked_at: float, wait: float) -> float | None:
        """Until the next poll is due; when it was asked for, if it was."""
        poked_at = None
        due = self._clock.monotonic() + wait
        while (left := max(due - self._clock.monotonic(), self._left(server, asked_at))) > 0:
            if not await self._poked(poke, left):
                break
            poke.clear()
            poked_at = self._clock.monotonic()
            due = min(due, poked_at + self._spread(server))
        return poked_at

    def _left(self, server: ServerKey, asked_at: float) -> float:
        """Seconds until this node may ask again."""
        return self._share(server) - (self._clock.monotonic() - asked_at)

    def _spread(self, server: ServerKey) -> float:
        """Seconds, somewhere in this node's share: what all nodes hear of at once they do not ask at once."""
        return self._share(server) * self._rng.random()

    def _share(self, server: ServerKey) -> float:
        return 0.0 if server in self._hurried else share(self._fleet.nodes)

    def _end_of_poll(self) -> None:
        event, self._polled = self._polled, asyncio.Event()
        event.set()

    def _update(self, server: ServerKey, change: Callable[[ServerView], ServerView]) -> None:
        old = self._views.get(server)
        if old is None:
            return  # taken out while it was asked
        new = self._views[server] = change(old)
        if new.state is ServerState.REACHABLE:
            self._answered[server] = self._clock.monotonic()
        if not differs(old, new):
            return
        if new.state is not old.state:
            if new.error is None:
                log.info("server answers", extra={"server": str(server), "devices": len(new.devices)})
            else:
                log.warning("server does not answer", extra={"server": str(server), "cause": new.error})
        for callback in tuple(self._subscribers):
            callback(new)

    async def _poked(self, poke: asyncio.Event, wait: float) -> bool:
        try:
            async with self._clock.timeout(wait):
                await poke.wait()
        except TimeoutError:
            return False
        return True
