"""Waking every waiter at once without losing a change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator


class Broadcast:
    """Waiters name a condition over state kept elsewhere; whoever changes that state calls fire().

    For one event loop, without threads. No change can be missed: between looking at the condition and waiting, nothing
    else runs.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._relays: list[Broadcast] = []

    def fire(self) -> None:
        """Every waiter looks at its condition again. Synchronous, never blocks."""
        event, self._event = self._event, asyncio.Event()
        event.set()
        for other in self._relays:
            other.fire()

    @contextlib.contextmanager
    def relayed_to(self, other: Broadcast) -> Iterator[None]:
        """Within the block, fire() fires the other one too: for a condition over the state of both."""
        self._relays.append(other)
        try:
            yield
        finally:
            self._relays.remove(other)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once condition() is true, at once if it is already. Without a bound of its own; cancel-safe."""
        while not condition():
            await self._event.wait()
