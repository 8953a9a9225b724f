"""How many nodes run the plugin: what each of them takes as its share of a server depends on it.

Nothing is written for that and no right is needed that the plugin has not: the pods of its own namespace are counted,
by a list of one pod, whose metadata say how many are left. Others in that namespace make every node a little slower.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeError

log = logging.getLogger(__name__)


COUNT_INTERVAL_S = 1800.0
COUNT_TIMEOUT_S = 2.0
"""Also what the first poll of the servers waits for it at most."""
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 60.0
JITTER = (0.8, 1.2)
UNCOUNTED = 600
"""What the fleet is taken to be while it could not be counted: with that no server is flooded."""


class ListApi(Protocol):
    """What is used of the API client. Raises the KubeError family."""

    async def request(
        self, verb: str, path: str, *, resource: str, params: Mapping[str, str], timeout: float
    ) -> dict[str, Any]: ...


async def count_pods(api: ListApi, namespace: str) -> int:
    """How many pods there are in a namespace, in one small request. KubeError."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    answer = await api.request("list", path, resource="pods", params={"limit": "1"}, timeout=COUNT_TIMEOUT_S)
    items, metadata = answer.get("items"), answer.get("metadata")
    left = metadata.get("remainingItemCount") if isinstance(metadata, dict) else None
    return (len(items) if isinstance(items, list) else 0) + (left if isinstance(left, int) and left > 0 else 0)


class FleetCount:
    """A usbip.poller.Fleet that counts now and then. run() must be running for known() to return.

    count() says how many there are, or raises KubeError; a fleet of none is taken for one of this node.
    """

    def __init__(self, count: Callable[[], Awaitable[int]], clock: Clock, rng: random.Random) -> None:
        self._count, self._clock, self._rng = count, clock, rng
        self._tried = asyncio.Event()
        self._nodes: int | None = None

    @property
    def nodes(self) -> int:
        """As last counted, or UNCOUNTED."""
        return UNCOUNTED if self._nodes is None else self._nodes

    async def known(self) -> None:
        """Returns after the first try to count, good or not."""
        await self._tried.wait()

    async def run(self) -> None:
        """Until cancelled."""
        waits = backoff(self._rng, RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            try:
                async with self._clock.timeout(COUNT_TIMEOUT_S):
                    self._nodes = max(1, await self._count())
            except (KubeError, TimeoutError) as error:
                wait = next(waits)
                if not self._tried.is_set():  # later on the last count will do
                    cause = str(error) or f"no answer within {COUNT_TIMEOUT_S:g} s"
                    log.warning("nodes not counted", extra={"cause": cause, "nodes": self.nodes})
            else:
                waits = backoff(self._rng, RETRY_FIRST_S, RETRY_MAX_S)
                wait = COUNT_INTERVAL_S * self._rng.uniform(*JITTER)
            self._tried.set()
            await self._clock.sleep(wait)
