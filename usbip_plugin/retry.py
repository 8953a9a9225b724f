"""Every retry policy of the project, as tenacity objects, in one place.

A policy is made anew for each use, takes its sleep from the Clock and its jitter from the node's rng, and never
retries what cannot get better by itself (403, bad configuration, a device held by another node).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from usbip_plugin.clock import Clock, Jitter
from usbip_plugin.errors import AttachStuck, DeviceBusy

ATTACH_ATTEMPTS = 2
BUSY_ATTEMPTS = 4
BUSY_FIRST_WAIT = 0.1
BUSY_MAX_WAIT = 0.4


def import_busy(clock: Clock, rng: random.Random) -> AsyncRetrying:
    """Import of a device whose lock is ours: a stub resetting after its last client answers busy for about 0.3 s."""
    return AsyncRetrying(
        retry=retry_if_exception_type(DeviceBusy),
        stop=stop_after_attempt(BUSY_ATTEMPTS),
        wait=wait_exponential(BUSY_FIRST_WAIT, BUSY_MAX_WAIT) + Jitter(rng, BUSY_FIRST_WAIT),
        sleep=clock.sleep,
        reraise=True,
    )


def attach_stuck(clock: Clock) -> AsyncRetrying:
    """Import and attach once more after a port that stuck in status 005."""
    return AsyncRetrying(
        retry=retry_if_exception_type(AttachStuck),
        stop=stop_after_attempt(ATTACH_ATTEMPTS),
        sleep=clock.sleep,
        reraise=True,
    )


def backoff(rng: random.Random, first: float, maximum: float, factor: float = 2.0) -> Iterator[float]:
    """Endless waits (seconds) for loops that never give up: exponential up to maximum, each with +-20 % jitter."""
    wait = first
    while True:
        yield wait * rng.uniform(0.8, 1.2)
        wait = min(wait * factor, maximum)
