"""Publishes status.allocatable of our own resources on our own Node, without waiting for the kubelet's next sync.

The kubelet writes the same number up to 10 s later; until then the scheduler would keep sending pods to fail here.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import quote

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeError, KubeForbidden
from usbip_plugin.kubelet.broadcast import Broadcast
from usbip_plugin.model import Advertised
from usbip_plugin.retry import backoff

PATCH_TIMEOUT_S = 5.0
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
# RBAC does not change often: the wait (seconds) after a 403.
FORBIDDEN_WAIT_S = 60.0
NODES_STATUS = "nodes/status"

log = logging.getLogger(__name__)


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


def allocatable(devices: Iterable[Advertised]) -> int:
    """How many devices the kubelet will count as allocatable: the healthy ones, in use or not."""
    return sum(device.health.healthy for device in devices)


def status_patch(counts: Mapping[str, int]) -> dict[str, Any]:
    """The JSON merge patch for nodes/<node>/status that sets these resources (full names) and touches nothing else."""
    return {"status": {"allocatable": {name: str(count) for name, count in sorted(counts.items())}}}


class NodeStatusPublisher:
    """Writes counts that changed, the latest only, one PATCH at a time.

    Give it a resource only when the kubelet has been sent that resource's list (DevicePluginServer.announced): before
    that the kubelet would refuse the pods the scheduler sends. Errors are logged and counted, never raised.
    """

    def __init__(self, api: PatchApi, node: str, clock: Clock, rng: random.Random) -> None:
        self._api = api
        self._path = f"/api/v1/nodes/{quote(node, safe='')}/status"
        self._clock = clock
        self._rng = rng
        self._wanted: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._changed = Broadcast()
        self._urgent = False
        self.errors = 0
        self.forbidden = False
        self.last_error: str | None = None

    def publish(self, counts: Mapping[str, int]) -> None:
        """The counts (by full resource name) to be written soon; resources not named keep what they had."""
        self._wanted.update(counts)
        self._changed.fire()

    def forget(self, resource: str) -> None:
        """Nothing is written for this resource until it is published again, and then in any case.

        For a kubelet that restarted and put 0 there itself, and for a resource that is no longer ours.
        """
        self._wanted.pop(resource, None)
        self._written.pop(resource, None)

    async def publish_now(self, counts: Mapping[str, int], timeout: float) -> bool:
        """publish(), then waits until these counts or later ones are written, at most timeout seconds.

        True if the Node says so now; False at once while writing is forbidden. Cuts a backoff short. Needs run() to be
        running. Cancel-safe: the write goes on.
        """
        self._urgent = True
        self.publish(counts)
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
                self._written.update({name: count for name, count in pending.items() if name in self._wanted})
                self.last_error, self.forbidden = None, False
                waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
                self._changed.fire()

    async def _pause(self, seconds: float) -> None:
        try:
            async with self._clock.timeout(seconds):
                await self._changed.until(lambda: self._urgent and not self.forbidden)
        except TimeoutError:
            return

    def _pending(self) -> dict[str, int]:
        return {name: count for name, count in self._wanted.items() if self._written.get(name) != count}

    def _is_written(self, counts: Mapping[str, int]) -> bool:
        return all(self._written.get(name) == self._wanted.get(name) for name in counts)

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
