"""The waits of retry policies depend only on the generator that they are given."""

import contextlib
import random
from collections.abc import Callable

import pytest
from tenacity import AsyncRetrying

from tests.rigs.clocks import InstantClock
from tests.rigs.vocabulary import KEY
from usbip_plugin.attach import pipeline
from usbip_plugin.errors import DeviceBusy, KubeThrottled, KubeUnreachable
from usbip_plugin.kube import retry

POLICIES: dict[str, tuple[Callable[..., AsyncRetrying], Exception, int]] = {
    "write": (retry.api_write, KubeUnreachable("update", "leases", "gone"), retry.API_WRITE_ATTEMPTS),
    "import": (pipeline.import_busy, DeviceBusy(KEY), pipeline.BUSY_ATTEMPTS),
}


@pytest.mark.parametrize(("policy", "error", "attempts"), POLICIES.values(), ids=POLICIES)
async def test_a_seed_decides_the_waits(policy: Callable[..., AsyncRetrying], error: Exception, attempts: int) -> None:
    async def waits(seed: int) -> list[float]:
        clock = InstantClock()
        with contextlib.suppress(type(error)):
            async for attempt in policy(clock, random.Random(seed)):
                with attempt:
                    raise error
        return clock.slept

    first = await waits(7)
    random.seed(3)  # the module's generator is not used
    assert await waits(7) == first
    assert len(first) == attempts - 1
    assert await waits(8) != first


@pytest.mark.parametrize(("asked", "least"), [(None, 0.0), (0.5, 0.5), (1000.0, retry.API_WRITE_MAX_WAIT)])
async def test_a_throttled_write_waits_as_long_as_the_api_server_asks_within_its_limit(
    asked: float | None, least: float
) -> None:
    clock = InstantClock()
    with contextlib.suppress(KubeThrottled):
        async for attempt in retry.api_write(clock, random.Random(1)):
            with attempt:
                raise KubeThrottled("update", "leases", "later", asked)
    assert len(clock.slept) == retry.API_WRITE_ATTEMPTS - 1
    assert all(least <= wait <= retry.API_WRITE_MAX_WAIT + retry.API_WRITE_FIRST_WAIT for wait in clock.slept)
