"""Publishes status.allocatable of this plugin's resources on its own Node, before the kubelet's next sync.

The kubelet writes the same number up to 10 s later. Until then the scheduler would keep sending pods that fail here.
A device that changes its holder changes the count of every node. The nodes therefore take turns, and leave to the
kubelets each write that would not come sooner than the kubelet's own.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeError, KubeForbidden
from usbip_plugin.kube.client import Api
from usbip_plugin.sync import Broadcast, done_within

log = logging.getLogger(__name__)

# Seconds for one PATCH, and before the first and, at most, before a later retry.
PATCH_TIMEOUT_S = 5.0
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
# Seconds to wait after a 403: RBAC does not change often.
FORBIDDEN_WAIT_S = 60.0
NODES_STATUS = "nodes/status"
# Writes per second of all nodes together after one change. A count that is too high makes pods fail, so lower counts
# are written faster. Of the higher counts, a waiting pod needs only the first node's.
LOWER_RATE, RAISE_RATE = 500.0, 20.0
# Seconds after which the kubelet itself has written a count.
KUBELET_SYNC_S = 10.0

WriteCounts = Callable[[Mapping[str, int]], Awaitable[None]]
"""Writes counts, by full resource name, on this plugin's own Node. Raises the KubeError family."""


async def patch_status(api: Api, node: str, counts: Mapping[str, int]) -> None:
    """Writes the counts of these resources (full names) on the Node, and no others. Raises the KubeError family."""
    body = {"status": {"allocatable": {name: str(count) for name, count in sorted(counts.items())}}}
    path = f"/api/v1/nodes/{quote(node, safe='')}/status"
    await api.request("patch", path, resource=NODES_STATUS, body=body, timeout=PATCH_TIMEOUT_S)


def spread(nodes: int, *, lower: bool) -> float:
    """Returns the seconds over which nodes spread the writes of one change; at KUBELET_SYNC_S, only kubelets write."""
    return min(KUBELET_SYNC_S, nodes / (LOWER_RATE if lower else RAISE_RATE))


class NodeStatusPublisher:
    """Writer of changed allocatable counts on the Node: only the latest counts, one write at a time.

    Works only while run() runs. nodes() returns how many nodes run the plugin. Errors are logged, never raised.
    Publish a resource only after the kubelet has received its list (DevicePluginServer.announced). Before that the
    kubelet would refuse the pods that the scheduler sends.
    """

    def __init__(
        self, write: WriteCounts, clock: Clock, rng: random.Random, nodes: Callable[[], int] = lambda: 1
    ) -> None:
        self._write = write
        self._nodes = nodes
        self._clock = clock
        self._rng = rng
        self._wanted: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._may_be_written: dict[str, int] = {}
        """By resource: the highest count since the Node last had the latest one. The kubelet may have written it."""
        self._changed = Broadcast()
        self._urgent = False
        self.forbidden = False
        self.last_error: str | None = None

    def publish(self, counts: Mapping[str, int]) -> None:
        """Queues counts (by full resource name) for writing. Other resources keep their counts. Does not block."""
        if all(self._wanted.get(name) == count for name, count in counts.items()):
            return
        self._wanted.update(counts)
        self._may_be_written.update(
            {name: max(count, self._may_be_written.get(name, count)) for name, count in counts.items()}
        )
        self._changed.fire()

    def forget(self, resource: str) -> None:
        """Stops writing a resource until it is published again. The next published count is written in any case.

        For a kubelet that has restarted and set the count to 0 itself, and for a resource that is offered no longer.
        """
        for counts in (self._wanted, self._written, self._may_be_written):
            counts.pop(resource, None)

    async def publish_now(self, counts: Mapping[str, int], timeout: float) -> bool:
        """Publishes counts and waits until they or later ones are written, for at most timeout seconds.

        Returns whether the Node has them now; False at once while writing is forbidden. Does not wait for this node's
        turn, and cuts a backoff short. Cancel-safe: the write goes on.
        """
        self.publish(counts)
        self._urgent = self._urgent or not self._is_written(counts)
        self._changed.fire()
        over = await self._changes_within(timeout, lambda: self.forbidden or self._is_written(counts))
        return over and self._is_written(counts)

    async def run(self) -> None:
        """Writes published counts until cancelled."""
        waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
        while True:
            await self._changed.until(lambda: bool(self._pending()))
            if not await self._turn():
                continue
            pending = self._pending()
            self._urgent = False
            try:
                await self._write(pending)
            except KubeError as error:
                self.forbidden = isinstance(error, KubeForbidden)
                if str(error) != self.last_error:
                    log.warning(
                        "allocatable not published on the node; the kubelet publishes it with its next sync",
                        extra={"cause": str(error)},
                    )
                self.last_error = str(error)
                self._changed.fire()
                pause = FORBIDDEN_WAIT_S if self.forbidden else next(waits)
                await self._changes_within(pause, lambda: self._urgent and not self.forbidden)
            else:
                self._known(pending)
                self.last_error, self.forbidden = None, False
                waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)

    async def _turn(self) -> bool:
        """Waits for this node's turn, unless a write is urgent. Returns False if nothing is left to write then."""
        began, part, was_lower = self._clock.monotonic(), self._rng.random(), False
        while pending := self._pending():
            if self._urgent:
                return True
            lower = self._lowers(pending)
            if lower and not was_lower:
                began = self._clock.monotonic()
            was_lower = lower
            within = spread(self._nodes(), lower=lower)
            left_to_kubelet = within >= KUBELET_SYNC_S
            left = began + (within if left_to_kubelet else part * within) - self._clock.monotonic()
            if left > 0 and await self._changes_within(left, lambda: self._urgent or self._pending() != pending):
                continue
            if not left_to_kubelet:
                return True
            self._known(pending)
        return False

    def _lowers(self, pending: Mapping[str, int]) -> bool:
        """Returns whether the Node may have a higher count than one of these."""
        return any(
            count < max(self._written.get(name, 0), self._may_be_written[name]) for name, count in pending.items()
        )

    def _known(self, counts: Mapping[str, int]) -> None:
        """Records that the Node has these counts now."""
        self._written.update({name: count for name, count in counts.items() if name in self._wanted})
        self._may_be_written.update({name: count for name, count in counts.items() if self._wanted.get(name) == count})
        self._changed.fire()

    async def _changes_within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        return await done_within(self._clock, seconds, self._changed.until(condition))

    def _pending(self) -> dict[str, int]:
        """Returns the counts to write: the Node lacks them, or the kubelet may have written an older, higher count."""
        return {
            name: count
            for name, count in self._wanted.items()
            if self._written.get(name) != count or self._may_be_written[name] > count
        }

    def _is_written(self, counts: Mapping[str, int]) -> bool:
        return not counts.keys() & self._pending().keys()
