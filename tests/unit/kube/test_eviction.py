"""Evictions: by uid, again while a budget refuses, never beyond the pod's end."""

import asyncio
import random
from typing import Any

import pytest

from usbip_plugin.errors import (
    KubeConflict,
    KubeError,
    KubeForbidden,
    KubeNotFound,
    KubeThrottled,
    KubeUnreachable,
)
from usbip_plugin.kube.eviction import BACKOFF_MAX_S, FORBIDDEN_WAIT_S, Evictor
from usbip_plugin.model import PodRef
from usbip_sim.virtual.loop import SimClock, virtual

POD = PodRef("lab", "scanner", "uid-1")
PATH = "/api/v1/namespaces/lab/pods/scanner/eviction"


class Api:
    """Raises what is in `errors` first. `at`: when it was asked, in virtual seconds."""

    def __init__(self, *errors: KubeError) -> None:
        self.errors = list(errors)
        self.at: list[float] = []
        self.bodies: list[Any] = []

    async def request(self, verb: str, path: str, *, resource: str, body: Any = None, timeout: float) -> dict[str, Any]:
        assert (verb, path, resource) == ("create", PATH, "pods/eviction")
        self.at.append(asyncio.get_running_loop().time())
        self.bodies.append(body)
        if self.errors:
            raise self.errors.pop(0)
        return {}


async def evict(api: Api, *, times: int = 1, wanted_for: float = 3600.0) -> list[PodRef]:
    """Runs an Evictor for an hour, which is told of the pod at its beginning. What it says was evicted."""
    loop = asyncio.get_running_loop()
    told: list[PodRef] = []
    evictor = Evictor(api, SimClock(loop), random.Random(1), lambda _pod: loop.time() < wanted_for, told.append)
    for _ in range(times):
        evictor.evict(POD)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await evictor.run()
    return told


@virtual
async def test_a_pod_is_evicted_once_and_by_its_uid() -> None:
    api = Api()
    assert await evict(api, times=3) == [POD]
    assert api.bodies == [
        {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": "scanner", "namespace": "lab"},
            "deleteOptions": {"preconditions": {"uid": "uid-1"}},
        }
    ]


@pytest.mark.parametrize(
    "error", [KubeNotFound("create", "pods", "gone"), KubeConflict("create", "pods", "another uid")]
)
def test_a_pod_that_is_gone_is_not_asked_for_again(error: KubeError) -> None:
    @virtual
    async def play() -> None:
        api = Api(error)
        await evict(api)
        assert len(api.at) == 1

    play()


@virtual
async def test_a_refusal_is_tried_again_until_it_is_accepted() -> None:
    refused = [KubeThrottled("create", "pods/eviction", None)] * 8
    api = Api(*refused, KubeUnreachable("create", "pods/eviction", "connection refused"))
    await evict(api)
    assert len(api.at) == 10
    assert max(b - a for a, b in zip(api.at, api.at[1:], strict=False)) <= 1.2 * BACKOFF_MAX_S


@virtual
async def test_a_right_that_is_missing_is_asked_for_rarely() -> None:
    api = Api(*[KubeForbidden("create", "pods/eviction", "no")] * 1000)
    await evict(api)
    assert len(api.at) == 3600 / FORBIDDEN_WAIT_S


@virtual
async def test_who_has_ended_meanwhile_is_left_alone() -> None:
    api = Api(*[KubeThrottled("create", "pods/eviction", None)] * 1000)
    await evict(api, wanted_for=5)
    assert max(api.at) < 5
