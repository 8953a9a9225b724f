"""Asks every server again and again what it lists, side by side: a dead one delays no other."""

from __future__ import annotations

import asyncio
import enum
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from usbip_plugin.clock import Clock
from usbip_plugin.errors import UsbipError
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.retry import backoff
from usbip_plugin.usbip.client import UsbipClient

# Seconds.
POLL_INTERVAL = 3.0
POLL_TIMEOUT = 3.0
FIRST_RETRY = 1.0
MAX_RETRY = 30.0
# A device that was let go stays hidden while its server resets it, about 0.3 s.
SECOND_LOOK = 0.5
JITTER = (0.8, 1.2)

log = logging.getLogger(__name__)


class ServerState(enum.Enum):
    PENDING = "not asked yet"
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class ServerView:
    """What is known of one server. devices: the last good list by busid, kept while the server is unreachable.

    error: why the last poll failed, None if it did not. failures: polls failed in a row.
    """

    server: ServerKey
    state: ServerState = ServerState.PENDING
    devices: tuple[Descriptor, ...] = ()
    error: str | None = None
    failures: int = 0


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


class ServerPoller:
    """on_change is called, synchronously, with each view that differs from the one before; it may call back in here."""

    def __init__(
        self,
        client: UsbipClient,
        clock: Clock,
        rng: random.Random,
        on_change: Callable[[ServerView], None],
        *,
        interval: float = POLL_INTERVAL,
        timeout: float = POLL_TIMEOUT,
    ) -> None:
        self._client, self._clock, self._rng, self._on_change = client, clock, rng, on_change
        self._interval, self._timeout = interval, timeout
        self._views: dict[ServerKey, ServerView] = {}
        self._answered: dict[ServerKey, float] = {}
        self._pokes: dict[ServerKey, asyncio.Event] = {}
        self._servers_changed = asyncio.Event()

    @property
    def views(self) -> Mapping[ServerKey, ServerView]:
        """A live read-only view: one entry for each server set."""
        return MappingProxyType(self._views)

    @property
    def answered(self) -> Mapping[ServerKey, float]:
        """When each server last answered a poll (monotonic); those that have not are not in it."""
        return MappingProxyType(self._answered)

    def set_servers(self, servers: frozenset[ServerKey]) -> None:
        """Poll exactly these from now on; may be called at any time. Views of those that stay are kept."""
        self._views = {server: self._views.get(server, ServerView(server)) for server in sorted(servers)}
        self._answered = {server: at for server, at in self._answered.items() if server in servers}
        self._servers_changed.set()

    def poke(self, server: ServerKey) -> None:
        """Poll now, or again if a poll is under way, and once more half a second later. Unknown servers are ignored."""
        event = self._pokes.get(server)
        if event is not None:
            event.set()

    async def lists(self, key: DeviceKey) -> bool:
        """Asks the server at once, besides all polls, whether it lists this device. False if it does not answer.

        Cancel-safe. What views says stays as it is.
        """
        try:
            devices = await self._client.devlist(key.server, timeout=self._timeout)
        except UsbipError as error:
            log.debug("not known whether a device is free", extra={"device": str(key), "cause": str(error)})
            return False
        return any(device.busid == key.busid for device in devices)

    async def run(self) -> None:
        """Poll until cancelled."""
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
        poked = False
        while True:
            poke.clear()  # before asking: what happens from here on may not be in the answer
            try:
                devices = await self._client.devlist(server, timeout=self._timeout)
            except UsbipError as error:
                self._update(server, partial(failed, error=str(error)))
                wait = next(waits)
            else:
                self._update(server, partial(listed, devices=devices))
                waits = backoff(self._rng, FIRST_RETRY, MAX_RETRY)
                wait = self._interval * self._rng.uniform(*JITTER)
            poked = await self._poked(poke, min(wait, SECOND_LOOK) if poked else wait)

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
        self._on_change(new)

    async def _poked(self, poke: asyncio.Event, wait: float) -> bool:
        try:
            async with self._clock.timeout(wait):
                await poke.wait()
        except TimeoutError:
            return False
        return True
