"""Evicts pods that can no longer use their device, by the eviction subresource, which respects PodDisruptionBudgets."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any
from urllib.parse import quote

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeConflict, KubeError, KubeForbidden, KubeNotFound
from usbip_plugin.kube.client import Api
from usbip_plugin.model import PodRef

log = logging.getLogger(__name__)

# Seconds for one eviction. The API server itself retries for 10 s before it refuses a uid that differs.
REQUEST_TIMEOUT_S = 15.0
# Seconds before the second try.
BACKOFF_FIRST_S = 1.0
# Seconds between later tries, at most. A PodDisruptionBudget may refuse until another pod has become ready.
BACKOFF_MAX_S = 30.0
# Seconds to wait after a 403: RBAC does not change often.
FORBIDDEN_WAIT_S = 60.0
EVICTIONS = "pods/eviction"


def eviction(pod: PodRef) -> dict[str, Any]:
    """Returns the Eviction object. With a uid it applies to this pod only, not to a successor of the same name."""
    body: dict[str, Any] = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod.name, "namespace": pod.namespace},
    }
    if pod.uid is not None:
        body["deleteOptions"] = {"preconditions": {"uid": pod.uid}}
    return body


class Evictor:
    """Worker that evicts pods. Works only while run() runs. Logs errors and never raises them.

    Tries each pod until the API server accepts, the pod is gone, or wanted(pod) is False before a try. Calls
    on_evicted(pod, cause) when an eviction was accepted.
    """

    def __init__(
        self,
        api: Api,
        clock: Clock,
        rng: random.Random,
        wanted: Callable[[PodRef], bool],
        on_evicted: Callable[[PodRef, str], None],
    ) -> None:
        self._api, self._clock, self._rng, self._wanted, self._on_evicted = api, clock, rng, wanted, on_evicted
        self._queue: asyncio.Queue[tuple[PodRef, str, Context]] = asyncio.Queue()
        self._under_way: set[PodRef] = set()

    def evict(self, pod: PodRef, cause: str) -> None:
        """Starts the eviction of a pod, in the caller's trace. Does nothing while one of the same pod is under way.

        cause: words for on_evicted.
        """
        if pod not in self._under_way:
            self._under_way.add(pod)
            self._queue.put_nowait((pod, cause, copy_context()))

    async def run(self) -> None:
        """Runs until cancelled. Evictions under way are then given up."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                pod, cause, context = await self._queue.get()
                tasks.create_task(self._evict(pod, cause), name=f"evict {pod}", context=context)

    async def _evict(self, pod: PodRef, cause: str) -> None:
        waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
        try:
            while self._wanted(pod):
                wait = next(waits)
                try:
                    await self._request(pod, cause)
                except KubeForbidden as error:
                    log.warning("eviction forbidden", extra={"pod": str(pod), "cause": str(error)})
                    wait = FORBIDDEN_WAIT_S
                except KubeError as error:
                    # a PodDisruptionBudget that does not allow the eviction answers 429
                    log.warning("eviction failed, will retry", extra={"pod": str(pod), "cause": str(error)})
                else:
                    return
                await self._clock.sleep(wait)
        finally:
            self._under_way.discard(pod)

    async def _request(self, pod: PodRef, cause: str) -> None:
        path = f"/api/v1/namespaces/{quote(pod.namespace, safe='')}/pods/{quote(pod.name, safe='')}/eviction"
        try:
            await self._api.request("create", path, resource=EVICTIONS, body=eviction(pod), timeout=REQUEST_TIMEOUT_S)
        except (KubeNotFound, KubeConflict):  # a conflict: a pod of this name has another uid
            log.info("pod ended before its eviction", extra={"pod": str(pod)})
        else:
            log.info("pod evicted", extra={"pod": str(pod)})
            self._on_evicted(pod, cause)
