"""Wake-ups: conditions over the state of one event loop, and calls to everybody who subscribed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from usbip_plugin.clock import Clock

T = TypeVar("T")


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


# A port that falls to null, and a socket end noticed in status 005, have no uevent: look again this often (seconds).
RECHECK_S = 0.05


class Bell:
    """Calls everyone who subscribed. Callbacks run synchronously in the loop and must not raise."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._next = 0

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Returns the unsubscribe function, which may be called any number of times."""
        number = self._next
        self._next += 1
        self._callbacks[number] = callback

        def unsubscribe() -> None:
            self._callbacks.pop(number, None)

        return unsubscribe

    def ring(self) -> None:
        for callback in tuple(self._callbacks.values()):
            callback()

    async def until(
        self, check: Callable[[], T | None], clock: Clock, *, timeout: float, recheck: float = RECHECK_S
    ) -> T:
        """The first result of check that is not None: checked at once, at each ring, and every recheck seconds.

        TimeoutError after timeout seconds. What check raises passes through. Cancel-safe.
        """
        rung = asyncio.Event()
        unsubscribe = self.subscribe(rung.set)
        try:
            async with clock.timeout(timeout):
                while True:
                    rung.clear()
                    result = check()
                    if result is not None:
                        return result
                    try:
                        async with clock.timeout(recheck):
                            await rung.wait()
                    except TimeoutError:
                        continue
        finally:
            unsubscribe()
