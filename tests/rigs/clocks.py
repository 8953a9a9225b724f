"""Clocks that a test moves, or that take no time."""

from __future__ import annotations

import asyncio
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
