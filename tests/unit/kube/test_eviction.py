"""Evictions: by the uid of a pod, again while a disruption budget refuses, and not after the end of the pod."""

import asyncio
import random
from itertools import pairwise

import pytest

from tests.rigs.api_double import ApiDouble
from usbip_plugin.errors import KubeConflict, KubeError, KubeForbidden, KubeNotFound, KubeThrottled, KubeUnreachable
from usbip_plugin.kube.eviction import BACKOFF_MAX_S, FORBIDDEN_WAIT_S, Evictor
from usbip_plugin.model import PodRef
from usbip_sim.virtual.loop import SimClock, virtual

POD = PodRef("lab", "scanner", "uid-1")
CAUSE = "it lost its device"
PATH = "/api/v1/namespaces/lab/pods/scanner/eviction"


async def evict(api: ApiDouble, *, times: int = 1, wanted_for: float = 3600.0) -> list[tuple[PodRef, str]]:
    """Runs an Evictor for an hour and returns the pods that it reports as evicted, with the cause.

    times: how often the eviction of POD is requested at the beginning. wanted_for: seconds until nobody wants it.
    """
    loop = asyncio.get_running_loop()
    evicted: list[tuple[PodRef, str]] = []

    def on_evicted(pod: PodRef, cause: str) -> None:
        evicted.append((pod, cause))

    evictor = Evictor(api, SimClock(loop), random.Random(1), lambda _pod: loop.time() < wanted_for, on_evicted)
    for _ in range(times):
        evictor.evict(POD, CAUSE)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await evictor.run()
    return evicted


@virtual
async def test_a_pod_is_evicted_once_and_by_its_uid() -> None:
    api = ApiDouble()
    assert await evict(api, times=3) == [(POD, CAUSE)]
    (call,) = api.calls
    assert (call.verb, call.path, call.resource) == ("create", PATH, "pods/eviction")
    assert call.body == {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": "scanner", "namespace": "lab"},
        "deleteOptions": {"preconditions": {"uid": "uid-1"}},
    }


@pytest.mark.parametrize(
    "error", [KubeNotFound("create", "pods", "gone"), KubeConflict("create", "pods", "another uid")]
)
@virtual
async def test_a_pod_that_is_gone_is_not_evicted_again(error: KubeError) -> None:
    api = ApiDouble(error)
    await evict(api)
    assert len(api.calls) == 1


@virtual
async def test_a_refused_eviction_is_tried_again_until_it_is_accepted() -> None:
    refused = [KubeThrottled("create", "pods/eviction", "the disruption budget web")] * 8
    api = ApiDouble(*refused, KubeUnreachable("create", "pods/eviction", "connection refused"))
    await evict(api)
    assert len(api.calls) == 10
    assert max(b.at - a.at for a, b in pairwise(api.calls)) <= 1.2 * BACKOFF_MAX_S


@virtual
async def test_a_forbidden_eviction_is_tried_again_rarely() -> None:
    api = ApiDouble(*[KubeForbidden("create", "pods/eviction", "no")] * 1000)
    await evict(api)
    assert len(api.calls) == 3600 / FORBIDDEN_WAIT_S


@virtual
async def test_a_pod_that_has_ended_is_not_evicted() -> None:
    api = ApiDouble(*[KubeThrottled("create", "pods/eviction", "the disruption budget web")] * 1000)
    await evict(api, wanted_for=5)
    assert api.calls[-1].at < 5
