"""Waiting for a condition that events announce, without trusting that every change has an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from usbip_plugin.clock import Clock

T = TypeVar("T")

# A port that falls to null, and a socket end noticed in status 005, have no uevent: look again this often (seconds).
RECHECK_S = 0.05
SETTLE_S = (0.05, 0.2, 0.75)  # a port becomes null a little after the last uevent of its device
RESYNC_S = 15.0  # a connection that ends before its device had an address has no uevent at all


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


async def settle(bell: Bell, stirred: asyncio.Event, clock: Clock) -> None:
    """Until cancelled: ring again SETTLE_S after the last time that stirred was set, and every RESYNC_S."""
    waits = [RESYNC_S]
    while True:
        stirred.clear()
        try:
            async with clock.timeout(waits[0]):
                await stirred.wait()
            waits = [*SETTLE_S, RESYNC_S]
        except TimeoutError:
            bell.ring()
            waits = waits[1:] or [RESYNC_S]
