"""Settings of Hypothesis: always the same examples, few enough for every `make test`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from hypothesis import HealthCheck, settings

# Seconds after which a decoder counts as hanging. The slowest one takes a fraction of a second.
HANG_S = 60


def brief(examples: int = 60) -> settings:
    """Returns settings for use above @given: derandomised, without a database and without deadlines."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Raises AssertionError in a block that runs longer than HANG_S, also within a regular expression."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"no end within {HANG_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
