"""Evictions on a real API server, with the right of deploy/components/evict and without it."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.apiserver.objects import PODS, POLL_S, make_pod
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeNotFound
from usbip_plugin.kube import eviction
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kube.eviction import Evictor
from usbip_plugin.model import PodRef

pytestmark = pytest.mark.short

PATIENCE_S = 30.0


async def exists(admin: KubeClient, pod: PodRef) -> bool:
    try:
        await admin.request("get", f"{PODS}/{pod.name}", resource="pods")
    except KubeNotFound:
        return False
    return True


async def evict(account: KubeClient, pod: PodRef) -> None:
    path = f"{PODS}/{pod.name}/eviction"
    await account.request(
        "create", path, resource=eviction.EVICTIONS, body=eviction.eviction(pod), timeout=eviction.REQUEST_TIMEOUT_S
    )


@pytest.mark.usefixtures("may_evict")
async def test_the_plugin_evicts_a_pod_and_no_other_of_its_name(admin: KubeClient, account: KubeClient) -> None:
    pod = await make_pod(admin)
    with pytest.raises(KubeConflict):
        await evict(account, PodRef(pod.namespace, pod.name, "5c0e4aee-0000-4000-8000-000000000000"))
    assert await exists(admin, pod)

    evictor = Evictor(account, SystemClock(), random.Random(1), lambda _pod: True, lambda _pod, _cause: None)
    task = asyncio.create_task(evictor.run())
    try:
        evictor.evict(pod, "a test")
        async with asyncio.timeout(PATIENCE_S):
            while await exists(admin, pod):  # noqa: ASYNC110 - the API server has the event
                await asyncio.sleep(POLL_S)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_without_the_component_the_plugin_may_not_evict(admin: KubeClient, account: KubeClient) -> None:
    pod = await make_pod(admin)
    with pytest.raises(KubeForbidden):
        await evict(account, pod)
    assert await exists(admin, pod)
