"""Tests of the clock that a test can hurry."""

from __future__ import annotations

import asyncio

import pytest

from tests.apiserver.scaled_clock import ScaledClock

pytestmark = pytest.mark.short

HOUR_S = 3600.0
AT_ONCE = 1e6


async def test_a_sleep_and_a_timeout_end_early_once_the_clock_is_hurried() -> None:
    clock = ScaledClock()
    began = clock.monotonic()

    async def limited() -> None:
        async with clock.timeout(HOUR_S):
            await asyncio.Event().wait()

    under_way = [asyncio.create_task(clock.sleep(HOUR_S)), asyncio.create_task(limited())]
    await asyncio.sleep(0)
    with clock.hurried(AT_ONCE):
        await asyncio.wait(under_way)
        await clock.sleep(HOUR_S)
    assert clock.monotonic() - began >= 2 * HOUR_S
    assert under_way[0].exception() is None
    assert isinstance(under_way[1].exception(), TimeoutError)
