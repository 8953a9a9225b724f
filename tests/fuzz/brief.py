"""How Hypothesis runs here: the same examples each time, few enough for every `make test`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from hypothesis import HealthCheck, settings

# Seconds after which a decoder hangs. No measure of speed: the slowest takes a fraction of one.
HANG_S = 60


def brief(examples: int = 60) -> settings:
    """For @brief() above @given: derandomised, without a database and without deadlines."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """AssertionError out of whatever still runs after HANG_S, also out of a regular expression."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"no end within {HANG_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
