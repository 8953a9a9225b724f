"""The clock, passed as a parameter so that the simulation can move time, and the waits between retries."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Protocol

from tenacity import RetryCallState
from tenacity.wait import wait_base


class Clock(Protocol):
    """The source of time for all parts of the plugin. Durations are seconds."""

    def monotonic(self) -> float:
        """Returns the seconds of this node's own monotonic clock, which goes on in suspend. All decisions use it."""

    def now(self) -> datetime:
        """Returns the wall clock in UTC, only for what people read."""

    async def sleep(self, seconds: float) -> None:
        """Waits. Cancel-safe."""

    def timeout(self, seconds: float) -> contextlib.AbstractAsyncContextManager[object]:
        """Limits the block like asyncio.timeout: raises TimeoutError out of it after that many seconds."""


# Linux's CLOCK_MONOTONIC stands still while the machine is suspended, and an import window must not (R1).
_MONOTONIC = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SystemClock:
    """The clock of the operating system and the event loop. Sleeps and timeouts do not count time in suspend."""

    def monotonic(self) -> float:
        return time.clock_gettime(_MONOTONIC)

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> contextlib.AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds)


class Jitter(wait_base):
    """A tenacity wait of 0 to `most` seconds, drawn from rng. tenacity's own jitter uses the module random."""

    def __init__(self, rng: random.Random, most: float) -> None:
        self._rng, self._most = rng, most

    def __call__(self, retry_state: RetryCallState) -> float:  # noqa: ARG002 (tenacity's interface)
        return self._rng.uniform(0, self._most)


def backoff(rng: random.Random, first: float, maximum: float) -> Iterator[float]:
    """Yields endless waits (seconds): exponential up to maximum, each with +-20 % jitter, also beyond maximum."""
    wait = first
    while True:
        yield wait * rng.uniform(0.8, 1.2)
        wait = min(wait * 2, maximum)
