"""Wake-ups within one event loop: waiting for a condition, and callbacks for subscribers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from usbip_plugin.clock import Clock

T = TypeVar("T")


async def done_within(clock: Clock, seconds: float, wait: Awaitable[object]) -> bool:
    """Returns whether a wait, such as event.wait(), is over within so many seconds. Cancels it otherwise.

    Cancel-safe. Passes on what the wait raises, but for TimeoutError.
    """
    try:
        async with clock.timeout(seconds):
            await wait
    except TimeoutError:
        return False
    return True


class Broadcast:
    """A wake-up for tasks that wait for a condition over state kept elsewhere.

    Whoever changes that state must call fire(). All methods belong to one event loop and one thread. No change is
    missed: nothing else runs between a check of the condition and the wait.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._relays: list[Broadcast] = []

    def fire(self) -> None:
        """Makes every waiter check its condition again. Synchronous, never blocks."""
        event, self._event = self._event, asyncio.Event()
        event.set()
        for other in self._relays:
            other.fire()

    @contextlib.contextmanager
    def relayed_to(self, other: Broadcast) -> Iterator[None]:
        """Makes fire() fire the other Broadcast too, within the block: for a condition over the state of both."""
        self._relays.append(other)
        try:
            yield
        finally:
            self._relays.remove(other)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until condition() is true; returns at once if it already is. Has no timeout of its own. Cancel-safe."""
        while not condition():
            await self._event.wait()


RECHECK_S = 0.05
"""Seconds between two checks without a ring.

The kernel sends no uevent when a port becomes free (null), nor when it notices the end of a socket in status 005.
"""


class Bell:
    """A list of callbacks that ring() calls. They run synchronously in the event loop and must not raise."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._next = 0

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a callback. Returns the function that removes it, which may be called any number of times."""
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
        """Waits until check() returns something other than None, and returns it.

        Calls check() at once, at each ring, and every recheck seconds. Raises TimeoutError after timeout seconds.
        Passes on what check() raises. Cancel-safe.
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
                    await done_within(clock, recheck, rung.wait())
        finally:
            unsubscribe()
