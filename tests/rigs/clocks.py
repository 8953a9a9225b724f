"""Clocks that a test moves, or that take no time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from usbip_plugin.clock import SystemClock


class InstantClock(SystemClock):
    """A clock that records its sleeps, which take no time. happens: called in each sleep."""

    def __init__(self, happens: Callable[[], object] = lambda: None) -> None:
        self.slept: list[float] = []
        self._happens = happens

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._happens()
        await asyncio.sleep(0)


class SteppedClock(SystemClock):
    """A clock whose monotonic() a test moves. Timeouts and sleeps are real."""

    time = 1000.0

    def monotonic(self) -> float:
        return self.time


class HeldClock(SystemClock):
    """A clock whose timeouts end only when a test says so. timeouts: all that have begun, with their seconds."""

    def __init__(self) -> None:
        self.timeouts: list[tuple[float, asyncio.Timeout]] = []

    def timeout(self, seconds: float) -> contextlib.AbstractAsyncContextManager[object]:
        self.timeouts.append((seconds, asyncio.timeout(None)))
        return self.timeouts[-1][1]

    def expire(self, seconds: float) -> None:
        """Ends the blocks that are limited to this many seconds."""
        for limit, timeout in self.timeouts:
            if limit == seconds:
                with contextlib.suppress(RuntimeError):  # its block has ended
                    timeout.reschedule(asyncio.get_running_loop().time())
