"""Eviction of pods whose device came back as another: the API's eviction subresource (policy/v1) heeds budgets."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any, Protocol
from urllib.parse import quote

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeConflict, KubeError, KubeForbidden, KubeNotFound
from usbip_plugin.model import PodRef

log = logging.getLogger(__name__)


# The API server itself tries for 10 s before it says that the uid is another.
REQUEST_TIMEOUT_S = 15.0
BACKOFF_FIRST_S = 1.0
# A PodDisruptionBudget may refuse for as long as another pod takes to become ready.
BACKOFF_MAX_S = 30.0
# RBAC does not change often: the wait (seconds) after a 403.
FORBIDDEN_WAIT_S = 60.0
EVICTIONS = "pods/eviction"


class EvictionApi(Protocol):
    """What is used of the API client. Raises the KubeError family."""

    async def request(
        self, verb: str, path: str, *, resource: str, body: Any = None, timeout: float
    ) -> dict[str, Any]: ...


def eviction(pod: PodRef) -> dict[str, Any]:
    """The Eviction object. With a uid it holds for this very pod and for no other of its name."""
    body: dict[str, Any] = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod.name, "namespace": pod.namespace},
    }
    if pod.uid is not None:
        body["deleteOptions"] = {"preconditions": {"uid": pod.uid}}
    return body


class Evictor:
    """Evicts the pods it is told of, each until it is accepted, the pod is gone, or it is not wanted any more.

    wanted(pod) is asked before each try; on_evicted(pod) is told when one was accepted. Errors are logged and tried
    again, never raised.
    """

    def __init__(
        self,
        api: EvictionApi,
        clock: Clock,
        rng: random.Random,
        wanted: Callable[[PodRef], bool],
        on_evicted: Callable[[PodRef], None],
    ) -> None:
        self._api, self._clock, self._rng, self._wanted, self._on_evicted = api, clock, rng, wanted, on_evicted
        self._asked: asyncio.Queue[tuple[PodRef, Context]] = asyncio.Queue()
        self._under_way: set[PodRef] = set()

    def evict(self, pod: PodRef) -> None:
        """Asks for it, without waiting. Again while it is under way: nothing. What is logged of it is the caller's."""
        if pod not in self._under_way:
            self._under_way.add(pod)
            self._asked.put_nowait((pod, copy_context()))

    async def run(self) -> None:
        """Until cancelled; what is under way is forgotten then."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                pod, context = await self._asked.get()
                tasks.create_task(self._evict(pod), name=f"evict {pod}", context=context)

    async def _evict(self, pod: PodRef) -> None:
        waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
        try:
            while self._wanted(pod):
                wait = next(waits)
                try:
                    await self._request(pod)
                except KubeForbidden as error:
                    log.warning("not allowed to evict", extra={"pod": str(pod), "cause": str(error)})
                    wait = FORBIDDEN_WAIT_S
                except KubeError as error:
                    # 429 is what a PodDisruptionBudget answers
                    log.warning("not evicted yet", extra={"pod": str(pod), "cause": str(error)})
                else:
                    return
                await self._clock.sleep(wait)
        finally:
            self._under_way.discard(pod)

    async def _request(self, pod: PodRef) -> None:
        path = f"/api/v1/namespaces/{quote(pod.namespace, safe='')}/pods/{quote(pod.name, safe='')}/eviction"
        try:
            await self._api.request("create", path, resource=EVICTIONS, body=eviction(pod), timeout=REQUEST_TIMEOUT_S)
        except (KubeNotFound, KubeConflict):
            log.info("gone before it was evicted", extra={"pod": str(pod)})
        else:
            log.info("evicted", extra={"pod": str(pod)})
            self._on_evicted(pod)
