"""Publishes status.allocatable of our own resources on our own Node, without waiting for the kubelet's next sync.

The kubelet writes the same number up to 10 s later; until then the scheduler would keep sending pods to fail here.

One device that changes hands changes the count of every node. So the nodes take turns, and what cannot be written any
sooner than the kubelets do it is left to them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import quote

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeError, KubeForbidden
from usbip_plugin.sync import Broadcast

log = logging.getLogger(__name__)


PATCH_TIMEOUT_S = 5.0
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
# RBAC does not change often: the wait (seconds) after a 403.
FORBIDDEN_WAIT_S = 60.0
NODES_STATUS = "nodes/status"
# Writes per second of all nodes together after one change. A count that is too high costs failed pods, so lower ones go
# first; of higher ones a waiting pod needs only the first node's.
LOWER_RATE, RAISE_RATE = 500.0, 20.0
# By then a kubelet has written it by itself.
KUBELET_SYNC_S = 10.0


class PatchApi(Protocol):
    """What is used of the API client. Raises the KubeError family."""

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        body: Any = None,
        content_type: str = "application/json",
        timeout: float,
    ) -> dict[str, Any]: ...


def status_patch(counts: Mapping[str, int]) -> dict[str, Any]:
    """The JSON merge patch for nodes/<node>/status that sets these resources (full names) and touches nothing else."""
    return {"status": {"allocatable": {name: str(count) for name, count in sorted(counts.items())}}}


def spread(nodes: int, *, lower: bool) -> float:
    """Seconds within which so many nodes write a change, each at a moment of its own; KUBELET_SYNC_S: none of them."""
    return min(KUBELET_SYNC_S, nodes / (LOWER_RATE if lower else RAISE_RATE))


class NodeStatusPublisher:
    """Writes counts that changed, the latest only, one PATCH at a time. nodes() says how many nodes do so.

    Give it a resource only when the kubelet has been sent that resource's list (DevicePluginServer.announced): before
    that the kubelet would refuse the pods the scheduler sends. Errors are logged and counted, never raised.
    """

    def __init__(
        self, api: PatchApi, node: str, clock: Clock, rng: random.Random, nodes: Callable[[], int] = lambda: 1
    ) -> None:
        self._api = api
        self._nodes = nodes
        self._path = f"/api/v1/nodes/{quote(node, safe='')}/status"
        self._clock = clock
        self._rng = rng
        self._wanted: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._told: dict[str, int] = {}
        """The most that the kubelet was told of each resource since the Node last said the latest count.

        It may have written that.
        """
        self._changed = Broadcast()
        self._urgent = False
        self.errors = 0
        self.forbidden = False
        self.last_error: str | None = None

    def publish(self, counts: Mapping[str, int]) -> None:
        """The counts (by full resource name) to be written soon; resources not named keep what they had."""
        if all(self._wanted.get(name) == count for name, count in counts.items()):
            return
        self._wanted.update(counts)
        self._told.update({name: max(count, self._told.get(name, count)) for name, count in counts.items()})
        self._changed.fire()

    def forget(self, resource: str) -> None:
        """Nothing is written for this resource until it is published again, and then in any case.

        For a kubelet that restarted and put 0 there itself, and for a resource that is no longer ours.
        """
        self._wanted.pop(resource, None)
        self._written.pop(resource, None)
        self._told.pop(resource, None)

    async def publish_now(self, counts: Mapping[str, int], timeout: float) -> bool:
        """publish(), then waits until these counts or later ones are written, at most timeout seconds.

        True if the Node says so now; False at once while writing is forbidden. Waits for no turn, and cuts a backoff
        short. Needs run() to be running. Cancel-safe: the write goes on.
        """
        self.publish(counts)
        self._urgent = self._urgent or not self._is_written(counts)
        self._changed.fire()
        try:
            async with self._clock.timeout(timeout):
                await self._changed.until(lambda: self.forbidden or self._is_written(counts))
        except TimeoutError:
            return False
        return self._is_written(counts)

    async def run(self) -> None:
        """The writer, until cancelled."""
        waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
        while True:
            await self._changed.until(lambda: bool(self._pending()))
            if not await self._turn():
                continue
            pending = self._pending()
            self._urgent = False
            try:
                await self._api.request(
                    "patch",
                    self._path,
                    resource=NODES_STATUS,
                    body=status_patch(pending),
                    content_type="application/merge-patch+json",
                    timeout=PATCH_TIMEOUT_S,
                )
            except KubeError as error:
                self._failed(error)
                await self._pause(FORBIDDEN_WAIT_S if self.forbidden else next(waits))
            else:
                self._known(pending)
                self.last_error, self.forbidden = None, False
                waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)

    async def _turn(self) -> bool:
        """Waits for this node's turn, if it is not urgent. False if then there is nothing to write for it."""
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
            if left > 0 and await self._anything_new(pending, left):
                continue
            if not left_to_kubelet:
                return True
            self._known(pending)
        return False

    async def _anything_new(self, pending: Mapping[str, int], seconds: float) -> bool:
        """Waits so long for another count, or for one that is urgent."""
        try:
            async with self._clock.timeout(seconds):
                await self._changed.until(lambda: self._urgent or self._pending() != pending)
        except TimeoutError:
            return False
        return True

    def _lowers(self, pending: Mapping[str, int]) -> bool:
        """Whether the Node may say more than one of these counts."""
        return any(count < max(self._written.get(name, 0), self._told[name]) for name, count in pending.items())

    def _known(self, counts: Mapping[str, int]) -> None:
        """The Node says so now."""
        self._written.update({name: count for name, count in counts.items() if name in self._wanted})
        self._told.update({name: count for name, count in counts.items() if self._wanted.get(name) == count})
        self._changed.fire()

    async def _pause(self, seconds: float) -> None:
        try:
            async with self._clock.timeout(seconds):
                await self._changed.until(lambda: self._urgent and not self.forbidden)
        except TimeoutError:
            return

    def _pending(self) -> dict[str, int]:
        """What is not written, or was taken back while the kubelet may have written it."""
        return {
            name: count
            for name, count in self._wanted.items()
            if self._written.get(name) != count or self._told[name] > count
        }

    def _is_written(self, counts: Mapping[str, int]) -> bool:
        return not counts.keys() & self._pending().keys()

    def _failed(self, error: KubeError) -> None:
        self.errors += 1
        self.forbidden = isinstance(error, KubeForbidden)
        if str(error) != self.last_error:
            log.warning(
                "cannot publish allocatable on the node; the scheduler learns of it with the kubelet's next sync",
                extra={"cause": str(error)},
            )
        self.last_error = str(error)
        self._changed.fire()
