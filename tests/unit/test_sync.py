"""Waits with a limit."""

from __future__ import annotations

import asyncio

import pytest

from usbip_plugin.sync import done_within
from usbip_sim.virtual.loop import SimClock, virtual


@virtual
async def test_a_wait_that_is_over_in_time_is_done() -> None:
    clock, event = SimClock(asyncio.get_running_loop()), asyncio.Event()
    began = clock.monotonic()
    asyncio.get_running_loop().call_later(4.9, event.set)
    assert await done_within(clock, 5, event.wait())
    assert clock.monotonic() - began == pytest.approx(4.9)


@virtual
async def test_a_wait_that_takes_too_long_is_cancelled() -> None:
    clock, ended = SimClock(asyncio.get_running_loop()), asyncio.Event()
    began = clock.monotonic()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert not await done_within(clock, 5, wait())
    assert ended.is_set()
    assert clock.monotonic() - began == pytest.approx(5)


@virtual
async def test_what_a_wait_raises_passes_on() -> None:
    async def wait() -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - its words do not matter
        await done_within(SimClock(asyncio.get_running_loop()), 5, wait())
