"""Ends connections of this node that are half-open at a server, so that the server lists their devices again.

A re-attach does so by itself, because it imports from the same port (usbip/connect.py). This module is for devices that
this node does not use any more, and for those that it had before a reboot: a server hides them, so nobody imports them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim
from usbip_plugin.clock import backoff
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import SourceNotLocal, UsbipError
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Endpoint, Lock, NodeIdentity
from usbip_plugin.sync import done_within
from usbip_plugin.usbip.client import UsbipClient
from usbip_plugin.usbip.poller import ServerPoller, ServerState, ServerView

log = logging.getLogger(__name__)

FIRST_WAIT = 2.0
"""Seconds for which a device must be missing from its server's list, and the first wait after a failed connect.

The server of a released device resets it for 0.3 s, and is polled again 0.5 s after the release.
"""
MAX_WAIT = 60.0
"""Longest wait in seconds, without jitter (20 %), between two connects for one device. The wait doubles with each."""
CONNECT_TIMEOUT = 3.0
"""Longest time in seconds to connect. The connect takes two round trips, and a second if a SYN is lost."""


def half_open_source(
    lock: Lock, me: NodeIdentity, claim: Claim | None, view: ServerView, live: Iterable[Endpoint | None]
) -> Endpoint | None:
    """Returns from where this node last imported a device, if its server may still export it to that dead connection.

    That is if the server answers without listing the device as free, and nobody or an earlier boot of this node has the
    lock.
    None while this boot holds the lock: it imports the device itself. None if a live attachment uses the port.

    claim: the claim that this device, or another from its bus ID, has here.
    live: from where the devices that are attached to this node were imported.
    """
    free = not lock.holder or (lock.holder == me.node and lock.boot_id != me.boot_id)
    attached = claim is not None and claim.port is not None
    if not free or attached or lock.key is None or lock.import_from is None:
        return None
    listed = view.find(lock.key.busid) is not None and not view.lists_in_use
    if view.state is not ServerState.REACHABLE or listed:
        return None
    return None if lock.import_from in live else lock.import_from


@dataclass(frozen=True, slots=True)
class _Tries:
    """The connects to end a connection. next_at: when the next may come (seconds, monotonic); infinite for never."""

    source: Endpoint
    next_at: float
    waits: Iterator[float]


class HalfOpenConnections:
    """Ends this node's half-open connections at servers, while `run()` runs.

    A connect that succeeds shows that the server has no connection from that port any more, so one is enough.
    """

    def __init__(
        self, context: NodeContext, *, client: UsbipClient, locks: LockManager, poller: ServerPoller, tasks: DeviceTasks
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._rng = context.rng
        self._client = client
        self._locks = locks
        self._poller = poller
        self._tasks = tasks
        self._due: dict[str, float] = {}
        """By device ID: when a connection that may be half-open is to be ended, in seconds on the monotonic clock."""
        self._tries: dict[str, _Tries] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Runs until cancelled."""
        unsubscribe = [self._locks.subscribe(self._lock_changed), self._poller.subscribe(self._server_changed)]
        for device_id in tuple(self._locks.locks):
            self._look(device_id)
        try:
            while True:
                self._changed.clear()
                if not self._due:
                    await self._changed.wait()
                    continue
                device_id = min(self._due, key=self._due.__getitem__)
                wait = self._due[device_id] - self._clock.monotonic()
                if wait > 0:
                    await done_within(self._clock, wait, self._changed.wait())
                    continue
                mutex = self._tasks.mutex(device_id)
                if mutex.locked():  # another task works on the device
                    self._due[device_id] = self._clock.monotonic() + FIRST_WAIT
                    continue
                async with mutex:
                    if self._look(device_id):
                        await self._end(self._locks.locks[device_id])
        finally:
            for undo in unsubscribe:
                undo()

    def _lock_changed(self, change: LockChange) -> None:
        self._look(change.device_id)

    def _server_changed(self, view: ServerView) -> None:
        for device_id, lock in tuple(self._locks.locks.items()):
            if lock.key is not None and lock.key.server == view.server:
                self._look(device_id)

    def _look(self, device_id: str) -> bool:
        """Notes whether this node may have a half-open connection for a device, and returns that."""
        lock = self._locks.locks.get(device_id)
        if lock is not None and lock.names(self._me):
            self._tries.pop(device_id, None)  # there may be a new connection from the same port soon
        source, tries = self._source(device_id), self._tries.get(device_id)
        next_at = tries.next_at if tries is not None and tries.source == source else 0.0
        if source is None or math.isinf(next_at):
            self._due.pop(device_id, None)
            return False
        if device_id not in self._due:
            self._due[device_id] = max(self._clock.monotonic() + FIRST_WAIT, next_at)
            self._changed.set()
        return True

    def _source(self, device_id: str) -> Endpoint | None:
        lock, book = self._locks.locks.get(device_id), self._tasks.book
        if lock is None or lock.key is None:
            return None
        claim = book.get(device_id) or book.moved_here(device_id)
        live = (one.import_from for one in book.view.values() if one.port is not None)
        return half_open_source(lock, self._me, claim, self._poller.view(lock.key.server), live)

    async def _end(self, lock: Lock) -> None:
        key, source = lock.key, lock.import_from
        if key is None or source is None:
            return
        tries, next_at = self._tries.get(key.id), math.inf
        known = tries is not None and tries.source == source
        waits = tries.waits if tries is not None and known else backoff(self._rng, FIRST_WAIT, MAX_WAIT)
        try:
            if await self._client.end_half_open(key.server, source, timeout=CONNECT_TIMEOUT):
                log.info("old connection to the server ended", extra={"device": str(key), "source": str(source)})
                self._poller.poll_soon(key.server)
        except SourceNotLocal as error:
            if lock.holder:  # otherwise another node may have had the device
                extra = {"device": str(key), "source": str(source), "cause": str(error)}
                log.warning("old connection to the server cannot be ended", extra=extra)
        except UsbipError as error:
            extra = {"device": str(key), "source": str(source), "cause": str(error)}
            log.debug("old connection to the server not ended yet", extra=extra)
            next_at = self._clock.monotonic() + next(waits)
        self._tries = {device_id: one for device_id, one in self._tries.items() if device_id in self._locks.locks}
        self._tries[key.id] = _Tries(source, next_at, waits)
        self._due.pop(key.id, None)
        self._look(key.id)
