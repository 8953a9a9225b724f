"""This node's session Lease: a heartbeat while it holds a lock, and not one write otherwise."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from usbip_plugin import clock as usbip_plugin_clock
from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeConflict, KubeError, KubeNotFound
from usbip_plugin.locks import record
from usbip_plugin.locks.protocol import Create, Denied, Rules, Write
from usbip_plugin.locks.store import Lease, LeaseStore

logger = logging.getLogger(__name__)

RETRY_FIRST_S = 0.5
# Of the duration: how often the session is written, and the longest wait after a failed write.
BEAT_FRACTION = 1 / 4
RETRY_FRACTION = 1 / 8


class Session:
    """need() while a lock is held or about to be; run() writes."""

    def __init__(
        self,
        store: LeaseStore,
        new_write: Callable[[], Write],
        clock: Clock,
        rng: random.Random,
        duration: float,
        rules: Rules,
    ) -> None:
        self._store, self._new_write, self._clock, self._rng = store, new_write, clock, rng
        self._duration, self._rules = duration, rules
        self._needed = asyncio.Event()
        self._known: Lease | None = None
        self._failing = False
        self.written_at: float | None = None  # monotonic; None before the first heartbeat of this process

    def need(self, needed: bool) -> None:
        """Takes effect at once: the first heartbeat of a first hold goes out with the lock write, not after it."""
        if needed:
            self._needed.set()
        else:
            self._needed.clear()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._needed.wait()
            await self._beat()
            await self._clock.sleep(self._duration * BEAT_FRACTION)

    async def _beat(self) -> None:
        """One heartbeat, tried until it is written or no longer needed."""
        waits = usbip_plugin_clock.backoff(self._rng, RETRY_FIRST_S, self._duration * RETRY_FRACTION)
        while self._needed.is_set():
            try:
                if await self._write():
                    self._failing = False
                    return
            except KubeError as error:
                if not self._failing:
                    logger.warning("session heartbeat failed", extra={"cause": str(error)})
                self._failing = True
                self._known = None
            await self._clock.sleep(next(waits))

    async def _write(self) -> bool:
        write = self._new_write()
        if self._known is None:
            self._known = await self._store.get(record.session_name(write.me.node))
        decision = self._rules.decide_session(self._known, write)
        sent_at = self._clock.monotonic()
        try:
            match decision:
                case Create(lease):
                    self._known = await self._store.create(lease)
                case Denied():
                    return False
                case _:
                    self._known = await self._store.replace(decision.lease)
        except (KubeConflict, KubeNotFound):
            self._known = None  # written by somebody else, or one's own write of unknown outcome: read and write anew
            return False
        self.written_at = sent_at
        return True
