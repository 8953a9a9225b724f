"""The retries of writes to the API server."""

from __future__ import annotations

import random

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential

from usbip_plugin.clock import Clock, Jitter
from usbip_plugin.errors import KubeServerError, KubeThrottled, KubeUnreachable

# Requests for one write at most, and the seconds before the second and, at most, before a later one, without jitter.
API_WRITE_ATTEMPTS = 4
API_WRITE_FIRST_WAIT = 0.05
API_WRITE_MAX_WAIT = 1.0


class _ApiWriteWait(wait_exponential):
    """The tenacity wait of api_write(): exponential, and not shorter than the API server asks (Retry-After)."""

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome is not None else None
        asked = error.retry_after or 0.0 if isinstance(error, KubeThrottled) else 0.0
        return max(super().__call__(retry_state), min(asked, API_WRITE_MAX_WAIT))


def api_write(clock: Clock, rng: random.Random) -> AsyncRetrying:
    """Returns the retries of one write to the API server: again if it is unreachable or answers 429 or 5xx.

    The caller must bound the time of all requests together.
    """
    return AsyncRetrying(
        retry=retry_if_exception_type((KubeUnreachable, KubeThrottled, KubeServerError)),
        stop=stop_after_attempt(API_WRITE_ATTEMPTS),
        wait=_ApiWriteWait(API_WRITE_FIRST_WAIT, API_WRITE_MAX_WAIT) + Jitter(rng, API_WRITE_FIRST_WAIT),
        sleep=clock.sleep,
        reraise=True,
    )
