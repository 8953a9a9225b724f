"""Counts the nodes that run the plugin, and learns their names if they are few.

Each node's share of the polls of a server depends on the number, and its turn to offer a released device on the names.
The count needs no right of its own: it lists some pods of the plugin's namespace and reads how many are left
(metadata.remainingItemCount). Other pods in that namespace make every node poll a little less often.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

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
MAX_NAMED = 32
"""Maximum number of pods in one answer, of about 8 KB each: the largest fleet whose names are known."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The nodes that run the plugin, as last counted.

    names: the names of all of them; empty if there are too many, or none was counted.
    addresses: the addresses of those that have one, by name.
    """

    nodes: int
    names: frozenset[str] = frozenset()
    addresses: Mapping[str, str] = field(default_factory=dict, hash=False)


async def count_pods(api: Api, namespace: str) -> Fleet:
    """Returns the number of pods in a namespace and the names of their nodes, by one request. Raises KubeError."""
    path, params = f"/api/v1/namespaces/{namespace}/pods", {"limit": str(MAX_NAMED)}
    answer = await api.request("list", path, resource="pods", params=params, timeout=COUNT_TIMEOUT_S)
    items, left = answer.get("items"), mapping(answer.get("metadata")).get("remainingItemCount")
    pods = items if isinstance(items, list) else []
    if isinstance(left, int) and left > 0:
        return Fleet(len(pods) + left)
    addresses: dict[str, str] = {}
    for pod in map(mapping, pods):
        name, address = mapping(pod.get("spec")).get("nodeName"), mapping(pod.get("status")).get("hostIP")
        if isinstance(name, str):
            addresses.setdefault(name, "")
            if isinstance(address, str):
                addresses[name] = address
    return Fleet(len(pods), frozenset(addresses), {name: at for name, at in addresses.items() if at})


class FleetCount:
    """Number and names of the nodes that run the plugin, counted about twice an hour. A usbip.poller.NodeCount.

    known() returns only if run() runs. count: returns the nodes or raises KubeError; 0 counts as 1, this node.
    """

    def __init__(self, count: Callable[[], Awaitable[Fleet]], clock: Clock, rng: random.Random) -> None:
        self._count, self._clock, self._rng = count, clock, rng
        self._tried = asyncio.Event()
        self.fleet = Fleet(UNCOUNTED)
        """The nodes at the last count; UNCOUNTED without names before the first one."""

    @property
    def nodes(self) -> int:
        return self.fleet.nodes

    async def known(self) -> None:
        await self._tried.wait()

    async def run(self) -> None:
        """Counts the nodes until cancelled. Retries API errors."""
        waits = backoff(self._rng, RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            try:
                async with self._clock.timeout(COUNT_TIMEOUT_S):
                    counted = await self._count()
                self.fleet = replace(counted, nodes=max(1, counted.nodes))
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
