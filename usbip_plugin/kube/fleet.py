"""Counts the nodes that run the plugin. Each node's share of the polls of a server depends on that number.

The count needs no right of its own: it lists one pod of the plugin's namespace and reads how many are left
(metadata.remainingItemCount). Other pods in that namespace make every node poll a little less often.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeError
from usbip_plugin.kube.client import Api
from usbip_plugin.kube.responses import mapping

log = logging.getLogger(__name__)

COUNT_INTERVAL_S = 1800.0
"""Seconds between two counts."""
COUNT_TIMEOUT_S = 2.0
"""Seconds for one count. The first poll of the servers waits at most this long for the count."""
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 60.0
"""Seconds before the first and, at most, before a later retry of a count that failed."""
JITTER = (0.8, 1.2)
"""Limits of the random factor on COUNT_INTERVAL_S."""
UNCOUNTED = 600
"""Nodes that are assumed until the first count succeeds, many enough that they do not overload a server."""


async def count_pods(api: Api, namespace: str) -> int:
    """Returns the number of pods in a namespace, by one small request. Raises the KubeError family."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    answer = await api.request("list", path, resource="pods", params={"limit": "1"}, timeout=COUNT_TIMEOUT_S)
    items, left = answer.get("items"), mapping(answer.get("metadata")).get("remainingItemCount")
    return (len(items) if isinstance(items, list) else 0) + (left if isinstance(left, int) and left > 0 else 0)


class FleetCount:
    """Number of nodes that run the plugin, counted about twice an hour. A usbip.poller.NodeCount.

    known() returns only if run() runs. count: returns the number or raises KubeError; 0 counts as 1, this node.
    """

    def __init__(self, count: Callable[[], Awaitable[int]], clock: Clock, rng: random.Random) -> None:
        self._count, self._clock, self._rng = count, clock, rng
        self._tried = asyncio.Event()
        self._nodes: int | None = None

    @property
    def nodes(self) -> int:
        """Number of nodes at the last count, or UNCOUNTED before the first one."""
        return UNCOUNTED if self._nodes is None else self._nodes

    async def known(self) -> None:
        await self._tried.wait()

    async def run(self) -> None:
        """Counts the nodes until cancelled. Retries API errors."""
        waits = backoff(self._rng, RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            try:
                async with self._clock.timeout(COUNT_TIMEOUT_S):
                    self._nodes = max(1, await self._count())
            except (KubeError, TimeoutError) as error:
                wait = next(waits)
                if not self._tried.is_set():  # a later failure is not logged: the last count stays in use
                    cause = str(error) or f"no answer within {COUNT_TIMEOUT_S:g} s"
                    log.warning("node count unknown", extra={"cause": cause, "nodes": self.nodes})
            else:
                waits = backoff(self._rng, RETRY_FIRST_S, RETRY_MAX_S)
                wait = COUNT_INTERVAL_S * self._rng.uniform(*JITTER)
            self._tried.set()
            await self._clock.sleep(wait)
