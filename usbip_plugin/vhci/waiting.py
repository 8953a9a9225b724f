"""Waiting for a condition that events announce, without trusting that every change has an event."""

from __future__ import annotations

import asyncio

from usbip_plugin.clock import Clock
from usbip_plugin.sync import Bell

SETTLE_S = (0.05, 0.2, 0.75)  # a port becomes null a little after the last uevent of its device
RESYNC_S = 15.0  # a connection that ends before its device had an address has no uevent at all


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
