"""Evictions on a real API server, with the right of deploy/components/evict and without it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE
from tests.rigs.plugin_rights import collection
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeNotFound
from usbip_plugin.kube import eviction
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kube.eviction import Evictor
from usbip_plugin.model import PodRef

pytestmark = pytest.mark.short

COMPONENT = Path(__file__).parents[2] / "deploy/components/evict/rbac.yaml"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
PATIENCE_S = 30.0
POLL_S = 0.05


async def make_pod(admin: KubeClient) -> PodRef:
    """Pending, without a kubelet: an eviction deletes it at once."""
    body: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "held-"},
        # the account that is there: no controller makes "default"
        "spec": {"serviceAccountName": ACCOUNT, "containers": [{"name": "c", "image": "i"}]},
    }
    made = (await admin.request("create", PODS, resource="pods", body=body))["metadata"]
    return PodRef(made["namespace"], made["name"], made["uid"])


async def exists(admin: KubeClient, pod: PodRef) -> bool:
    try:
        await admin.request("get", f"{PODS}/{pod.name}", resource="pods")
    except KubeNotFound:
        return False
    return True


@pytest.fixture
async def granted(admin: KubeClient) -> AsyncIterator[None]:
    """The component is installed for the length of a test."""
    documents = list(yaml.safe_load_all(COMPONENT.read_text(encoding="utf-8")))
    for document in documents:
        await admin.request("create", collection(document), resource=document["kind"], body=document)
    yield
    for document in documents:
        await admin.request("delete", f"{collection(document)}/{document['metadata']['name']}", resource="rbac")


async def ask(account: KubeClient, pod: PodRef) -> None:
    path = f"{PODS}/{pod.name}/eviction"
    await account.request(
        "create", path, resource=eviction.EVICTIONS, body=eviction.eviction(pod), timeout=eviction.REQUEST_TIMEOUT_S
    )


@pytest.mark.usefixtures("granted")
async def test_the_plugin_evicts_a_pod_and_no_other_of_its_name(admin: KubeClient, account: KubeClient) -> None:
    pod = await make_pod(admin)
    with pytest.raises(KubeConflict):
        await ask(account, PodRef(pod.namespace, pod.name, "5c0e4aee-0000-4000-8000-000000000000"))
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


async def test_without_the_component_it_may_not(admin: KubeClient, account: KubeClient) -> None:
    pod = await make_pod(admin)
    with pytest.raises(KubeForbidden):
        await ask(account, pod)
    assert await exists(admin, pod)
