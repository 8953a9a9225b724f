"""A clock of one node that can run fast, so that a deadline of the product passes soon at its ordinary length."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator

from usbip_plugin.clock import SystemClock

FAST = 13.0
"""40 s, the duration of a lock, take 3.1 s, and a poll's 5 s still leave 0.4 s for an answer from this machine."""


class ScaledClock(SystemClock):
    """A clock of real time, except within hurried(). Sleeps and timeouts follow each change of the rate.

    Safe for a node that only waits for something to expire. Rule R4 counts a lock's duration on the monotonic clock
    of the node that watches the lock, so this clock decides when it expires. Rule R1 counts the import window on the
    clock of the node that imports, and that clock is not this one, or runs at real time by then. So a test keeps the
    ordinary 40 s and 10 s, and a stalled event loop has all of the 10 s to catch up. A fast watcher breaks the rule
    that clocks differ by less than a factor of two: while one is hurried, the holder that it watches must be dead or
    cut off, or its heartbeats come too late.
    """

    def __init__(self) -> None:
        self._rate = 1.0
        self._real = self._own = time.monotonic()
        self._ends: dict[asyncio.Timeout, float] = {}

    def monotonic(self) -> float:
        return self._own + (time.monotonic() - self._real) * self._rate

    @contextlib.contextmanager
    def hurried(self, rate: float = FAST) -> Iterator[None]:
        """Lets `rate` seconds of this clock pass in each real second of the block."""
        self._run_at(rate)
        try:
            yield
        finally:
            self._run_at(1.0)

    async def sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with self.timeout(seconds):
                await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncGenerator[None]:
        ends = self.monotonic() + seconds
        async with asyncio.timeout_at(self._at(ends)) as scope:
            self._ends[scope] = ends
            try:
                yield
            finally:
                del self._ends[scope]

    def _run_at(self, rate: float) -> None:
        self._own, self._real, self._rate = self.monotonic(), time.monotonic(), rate
        for scope, ends in self._ends.items():
            if not scope.expired():
                scope.reschedule(self._at(ends))

    def _at(self, own: float) -> float:
        """Returns the event loop's time at which this clock reads `own`."""
        return asyncio.get_running_loop().time() + (own - self.monotonic()) / self._rate
