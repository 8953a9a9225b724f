"""Polls the device lists of all servers, side by side, so that a dead server delays no other.

All nodes poll the same servers and could overload a small one, so together they send at most MAX_RATE polls a second.
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
from usbip_plugin.sync import Broadcast, done_within
from usbip_plugin.usbip.client import UsbipClient

log = logging.getLogger(__name__)

# Default time from a good poll to the next (seconds), before JITTER.
POLL_INTERVAL = 3.0
# Default limit of one poll, connecting included (seconds).
POLL_TIMEOUT = 3.0
# First and longest wait after failed polls (seconds).
FIRST_RETRY = 1.0
MAX_RETRY = 30.0
# Wait before a requested poll is repeated (seconds). A released device stays hidden while its server resets it, for
# about 0.3 s.
SECOND_LOOK = 0.5
# Range of the random factor on the poll interval, so that nodes do not poll in step.
JITTER = (0.8, 1.2)
# Most problems of one server's list that one log line shows.
PROBLEMS_SHOWN = 5
# Most DEVLIST requests per second to one server, from all nodes together.
MAX_RATE = 20.0


class ServerState(enum.Enum):
    """What the last poll of a server showed."""

    PENDING = "not asked yet"
    """No poll has ended yet."""
    REACHABLE = "reachable"
    """The last poll returned a list."""
    UNREACHABLE = "unreachable"
    """The last poll failed."""


class ServerFlaw(enum.Enum):
    """A way in which a server does not keep a device to one client. The value is for people."""

    LISTS_IN_USE = "it lists devices in use, so no lock is taken over by its list"
    """It has listed a device that a living node had attached."""
    EXPORTS_TWICE = "it exports a device to two clients at once, so only the locks keep nodes apart"
    """It has exported a device to another node while this node had it attached."""


class ExportState(enum.Enum):
    """What a server, asked about one device, answers."""

    FREE = enum.auto()
    """It lists the device, and was not seen to list devices in use: nobody has the device."""
    LISTED = enum.auto()
    """It lists the device, but it was seen to list devices in use, too."""
    UNLISTED = enum.auto()
    """It does not list the device, which is unplugged, not bound, or in use."""
    UNKNOWN = enum.auto()
    """It does not answer."""


ABSENCE = 10.0
"""Seconds after which a device that is listed again counts as replugged.

A server does not list a device that is in use, and reading a serial number takes less than this.
"""


@dataclass(frozen=True, slots=True)
class Stay:
    """A time for which a server has listed one device under one bus ID. Times are seconds on the monotonic clock.

    devid: the Descriptor.devid of the device.
    since: when it was first listed. It may have been missing from the list for less than ABSENCE.
    until: when it was first missing from the list; infinite while it is listed.
    """

    devid: int
    since: float
    until: float = math.inf


@dataclass(frozen=True, slots=True)
class ServerView:
    """What the polls of one server have shown. Two views are equal unless subscribers must learn of the difference.

    devices, by_busid: the last good list, sorted by bus ID, kept while the server is unreachable.
    error: why the last poll failed, None if it did not.
    failures: number of failed polls in a row.
    answered: when the server last answered (monotonic seconds), None if it never did.
    removed: the bus IDs of the good list before that are missing from `devices`.
    stays: by bus ID, for the devices listed now and those missing for less than ABSENCE at the last change.
    flaws: what this process has seen the server do wrong.
    problems: the entries of the last good list that were skipped or cut, see DevlistReply.
    """

    server: ServerKey
    state: ServerState = ServerState.PENDING
    devices: tuple[Descriptor, ...] = ()
    error: str | None = None
    failures: int = field(default=0, compare=False)
    answered: float | None = field(default=None, compare=False)
    removed: frozenset[str] = field(default=frozenset(), compare=False)
    stays: Mapping[str, Stay] = field(default_factory=dict, repr=False, compare=False)
    problems: tuple[str, ...] = ()
    by_busid: Mapping[str, Descriptor] = field(init=False, repr=False, compare=False)
    flaws: frozenset[ServerFlaw] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_busid", {device.busid: device for device in self.devices})

    @property
    def lists_in_use(self) -> bool:
        """Returns whether the server's list does not show that a device is free."""
        return ServerFlaw.LISTS_IN_USE in self.flaws

    @property
    def exported(self) -> Mapping[DeviceKey, Descriptor]:
        """The devices that the server lists now; none unless it is reachable. usbipd does not list devices in use."""
        if self.state is not ServerState.REACHABLE:
            return {}
        return {DeviceKey(self.server, device.busid): device for device in self.devices}

    def find(self, busid: str) -> Descriptor | None:
        """Returns the device that the server lists now under this bus ID, None if there is none in `exported`."""
        return self.by_busid.get(busid) if self.state is ServerState.REACHABLE else None


def listed(view: ServerView, devices: Iterable[Descriptor], now: float, problems: tuple[str, ...] = ()) -> ServerView:
    """Returns the view of a server after a good poll. now: monotonic seconds."""
    found = tuple(sorted(devices, key=lambda device: device.busid))
    if view.state is ServerState.REACHABLE and view.devices == found:
        return replace(view, answered=now, problems=problems)
    stays = _ended(view.stays, now)
    for device in found:
        stay = stays.get(device.busid)
        known = stay is not None and stay.devid == device.devid
        stays[device.busid] = Stay(device.devid, stay.since if stay is not None and known else now)
    removed = view.by_busid.keys() - {device.busid for device in found}
    return replace(
        ServerView(view.server, ServerState.REACHABLE, found, answered=now, removed=frozenset(removed), stays=stays),
        flaws=view.flaws,
        problems=problems,
    )


def failed(view: ServerView, error: str, now: float) -> ServerView:
    """Returns the view of a server after a failed poll: UNREACHABLE after the first failure. now: monotonic seconds.

    One failure is enough. A pod admitted on a stale view fails for good; a pod that waits for the next good poll does
    not.
    """
    stays = _ended(view.stays, now)
    return replace(view, state=ServerState.UNREACHABLE, error=error, failures=view.failures + 1, stays=stays)


def _ended(stays: Mapping[str, Stay], now: float) -> dict[str, Stay]:
    """Returns these stays, all of them ended by now, without those that ended ABSENCE ago or earlier."""
    return {
        busid: replace(stay, until=min(stay.until, now)) for busid, stay in stays.items() if now - stay.until < ABSENCE
    }


def share(nodes: int) -> float:
    """Returns the least seconds between two polls of one server by one node: all nodes together keep to MAX_RATE."""
    return max(1, nodes) / MAX_RATE


class NodeCount(Protocol):
    """The number of nodes that poll the same servers."""

    @property
    def nodes(self) -> int:
        """Their number, this node included; an assumed number if they could not be counted."""

    async def known(self) -> None:
        """Waits until a first try to count the nodes has ended, in success or failure. Bounded; cancel-safe."""


class SingleNode:
    """The NodeCount of a single node."""

    nodes = 1

    async def known(self) -> None:
        pass


class ServerPoller:
    """A poller of the device lists of servers. All methods belong to one event loop; `run()` must be running.

    No server is polled more than once in share(fleet.nodes) seconds, except those that poll_eagerly() names: at most
    MAX_RATE polls per second, and those for devices that pods have lost.

    interval: from a good poll to the next (seconds). timeout: limit of one poll (seconds).
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
        self._flaws: dict[ServerKey, frozenset[ServerFlaw]] = {}  # at most of the servers that were ever configured
        self._asked: dict[ServerKey, float] = {}
        self._polled = Broadcast()
        self._requests: dict[ServerKey, asyncio.Event] = {}
        self._eager: frozenset[ServerKey] = frozenset()
        self._servers_changed = asyncio.Event()

    @property
    def views(self) -> Mapping[ServerKey, ServerView]:
        """The newest view of each server that set_servers() named. A live read-only mapping."""
        return MappingProxyType(self._views)

    @property
    def polled_at(self) -> Mapping[ServerKey, float]:
        """When the last poll of each server that has ended was sent (monotonic seconds)."""
        return self._asked

    def view(self, server: ServerKey) -> ServerView:
        """Returns the newest view of a server; PENDING if the server is not polled."""
        return self._views.get(server) or ServerView(server, flaws=self._flaws.get(server, frozenset()))

    def subscribe(self, callback: Callable[[ServerView], None]) -> Callable[[], None]:
        """Calls callback synchronously with each view that differs from the server's view before.

        The callback may call this poller's methods. Returns a function that unsubscribes.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def set_servers(self, servers: frozenset[ServerKey]) -> None:
        """Sets the servers to poll from now on. May be called at any time. Keeps the views of servers that stay."""
        self._views = {server: self.view(server) for server in sorted(servers)}
        self._asked = {server: at for server, at in self._asked.items() if server in servers}
        self._servers_changed.set()
        self._polled.fire()

    def poll_eagerly(self, servers: frozenset[ServerKey]) -> None:
        """Sets the servers that are polled from now on as if this were the only node, with MAX_RATE for it alone.

        These are the servers with a device that a pod has lost. Polls a server that is new to the set at once.
        """
        new, self._eager = servers - self._eager, servers
        for server in sorted(new):
            self.poll_soon(server)

    def poll_soon(self, server: ServerKey) -> None:
        """Polls the server as soon as this node's share allows, or again if a poll is under way.

        If that is at once, polls once more SECOND_LOOK later. Ignores a server that is not polled.
        """
        if (request := self._requests.get(server)) is not None:
            request.set()

    async def polled_since(self, server: ServerKey, moment: float) -> None:
        """Waits until a poll sent at this moment (monotonic seconds) or later has ended, in success or failure.

        Also returns when the server is not polled any more. Unbounded while run() does not run; cancel-safe.
        """
        await self._polled.until(lambda: server not in self._views or self._asked.get(server, -math.inf) >= moment)

    async def export_state(self, key: DeviceKey) -> ExportState:
        """Asks the server at once, besides all polls, whether it lists this device. Cancel-safe. Changes no views."""
        try:
            found = await self._client.devlist(key.server, timeout=self._timeout)
        except UsbipError as error:
            log.debug("cannot ask server for device", extra={"device": str(key), "cause": str(error)})
            return ExportState.UNKNOWN
        if not any(device.busid == key.busid for device in found.devices):
            return ExportState.UNLISTED
        return ExportState.LISTED if self.view(key.server).lists_in_use else ExportState.FREE

    def note_flaw(self, server: ServerKey, flaw: ServerFlaw) -> None:
        """Records what a polled server does wrong. Counts for as long as this process lives."""
        view = self._views.get(server)
        if view is not None and flaw not in view.flaws:
            self._flaws[server] = view.flaws | {flaw}
            log.warning(
                "server does not keep a device to one client", extra={"server": str(server), "cause": flaw.value}
            )
            self._update(server, partial(replace, flaws=self._flaws[server]))

    async def run(self) -> None:
        """Runs until cancelled. Waits for the number of nodes, then polls every server in a task of its own."""
        await self._fleet.known()
        tasks: dict[ServerKey, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                self._servers_changed.clear()
                for gone in sorted(tasks.keys() - self._views.keys()):
                    tasks.pop(gone).cancel()
                    del self._requests[gone]
                for new in sorted(self._views.keys() - tasks.keys()):
                    self._requests[new] = asyncio.Event()
                    tasks[new] = group.create_task(self._poll(new, self._requests[new]), name=f"poll {new}")
                await self._servers_changed.wait()

    async def _poll(self, server: ServerKey, request: asyncio.Event) -> None:
        waits = backoff(self._rng, FIRST_RETRY, MAX_RETRY)
        requested_at = await self._next(server, request, -math.inf, self._spread(server))
        while True:
            request.clear()  # before asking: the answer may not show a change that happens from here on
            asked_at = self._clock.monotonic()
            try:
                found = await self._client.devlist(server, timeout=self._timeout)
            except UsbipError as error:
                self._update(server, partial(failed, error=str(error), now=self._clock.monotonic()))
                wait = next(waits)
            else:
                now = self._clock.monotonic()
                self._update(server, partial(listed, devices=found.devices, now=now, problems=found.problems))
                waits = backoff(self._rng, FIRST_RETRY, MAX_RETRY)
                wait = self._interval * self._rng.uniform(*JITTER)
            self._asked[server] = asked_at
            self._polled.fire()
            if requested_at is not None and asked_at - requested_at < SECOND_LOOK:
                wait = min(wait, SECOND_LOOK)
            requested_at = await self._next(server, request, asked_at, wait)

    async def _next(self, server: ServerKey, request: asyncio.Event, asked_at: float, wait: float) -> float | None:
        """Waits until the next poll is due. Returns when it was last requested (monotonic seconds), None if it was not.

        asked_at: when the last poll was sent. wait: seconds to the next poll if none is requested.
        """
        requested_at = None
        due = self._clock.monotonic() + wait
        earliest = asked_at + share(1)  # also for a server that is polled eagerly
        while (left := max(due, earliest, asked_at + self._share(server)) - self._clock.monotonic()) > 0:
            if not await done_within(self._clock, left, request.wait()):
                break
            request.clear()
            requested_at = self._clock.monotonic()
            due = min(due, requested_at + self._spread(server))
        return requested_at

    def _spread(self, server: ServerKey) -> float:
        """Returns random seconds within this node's share: spreads the polls of nodes that see one change together."""
        return self._share(server) * self._rng.random()

    def _share(self, server: ServerKey) -> float:
        return 0.0 if server in self._eager else share(self._fleet.nodes)

    def _update(self, server: ServerKey, change: Callable[[ServerView], ServerView]) -> None:
        old = self._views.get(server)
        if old is None:
            return  # set_servers() removed the server during the poll
        new = self._views[server] = change(old)
        if new == old:
            return
        if new.state is not old.state:
            if new.error is None:
                log.info("server answers", extra={"server": str(server), "devices": len(new.devices)})
            else:
                log.warning("server does not answer", extra={"server": str(server), "cause": new.error})
        if new.problems and new.problems != old.problems:
            extra = {"server": str(server), "problems": new.problems[:PROBLEMS_SHOWN], "count": len(new.problems)}
            log.warning("server lists devices that cannot be used", extra=extra)
        for callback in tuple(self._subscribers):
            callback(new)
