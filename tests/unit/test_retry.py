"""Retry policies draw on nothing but what they are given."""

import asyncio
import contextlib
import random
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

import pytest

from usbip_plugin.attach import pipeline
from usbip_plugin.errors import DeviceBusy, KubeThrottled, KubeUnreachable
from usbip_plugin.kube import client
from usbip_plugin.model import DeviceKey, ServerKey


class NotedClock:
    """Sleeps are noted and over at once."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds)


async def waits_of_a_write(seed: int) -> list[float]:
    clock = NotedClock()
    with contextlib.suppress(KubeUnreachable):
        async for attempt in client.api_write(clock, random.Random(seed)):
            with attempt:
                raise KubeUnreachable("update", "leases", "gone")
    return clock.slept


@pytest.mark.parametrize(("asked", "least"), [(None, 0.0), (0.5, 0.5), (1000.0, client.API_WRITE_MAX_WAIT)])
async def test_a_throttled_write_waits_as_long_as_asked_within_its_limit(asked: float | None, least: float) -> None:
    clock = NotedClock()
    with contextlib.suppress(KubeThrottled):
        async for attempt in client.api_write(clock, random.Random(1)):
            with attempt:
                raise KubeThrottled("update", "leases", "later", asked)
    assert len(clock.slept) == client.API_WRITE_ATTEMPTS - 1
    assert all(least <= wait <= client.API_WRITE_MAX_WAIT + client.API_WRITE_FIRST_WAIT for wait in clock.slept)


async def waits_of_an_import(seed: int) -> list[float]:
    clock = NotedClock()
    with contextlib.suppress(DeviceBusy):
        async for attempt in pipeline.import_busy(clock, random.Random(seed)):
            with attempt:
                raise DeviceBusy(DeviceKey(ServerKey("lab"), "1-1"))
    return clock.slept


@pytest.mark.parametrize(
    ("waits_of", "tries"),
    [(waits_of_a_write, client.API_WRITE_ATTEMPTS), (waits_of_an_import, pipeline.BUSY_ATTEMPTS)],
)
async def test_the_same_seed_waits_the_same(waits_of: object, tries: int) -> None:
    assert callable(waits_of)
    first = await waits_of(7)
    random.seed(3)  # what anybody else does with the module's generator counts for nothing
    assert await waits_of(7) == first
    assert len(first) == tries - 1
    assert await waits_of(8) != first
