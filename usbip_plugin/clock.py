"""Time comes in through a parameter, so that the simulation can turn it."""

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
    """What the plugin knows of time. Durations are seconds."""

    def monotonic(self) -> float:
        """Seconds on this node's own monotonic clock. All decisions are made on it."""
        ...

    def now(self) -> datetime:
        """Wall clock in UTC, only for what people read."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Cancel-safe."""
        ...

    def timeout(self, seconds: float) -> contextlib.AbstractAsyncContextManager[object]:
        """Like asyncio.timeout: raises TimeoutError inside the block's owner when the time is up."""
        ...


class SystemClock:
    """The real one."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> contextlib.AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds)


class Jitter(wait_base):
    """Up to so many seconds more, from this rng: tenacity's own jitter comes from the module random."""

    def __init__(self, rng: random.Random, most: float) -> None:
        self._rng, self._most = rng, most

    def __call__(self, retry_state: RetryCallState) -> float:  # noqa: ARG002 (tenacity's interface)
        return self._rng.uniform(0, self._most)


def backoff(rng: random.Random, first: float, maximum: float, factor: float = 2.0) -> Iterator[float]:
    """Endless waits (seconds) for loops that never give up: exponential up to maximum, each with +-20 % jitter."""
    wait = first
    while True:
        yield wait * rng.uniform(0.8, 1.2)
        wait = min(wait * factor, maximum)
