"""Every kind of Event, as it arrives at a real API server under the shipped rights and admission policy."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE, NodeTokens
from tests.rigs.agents_rig import PATIENCE_S, RESOURCE, Rig, agents
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_rights import collection
from usbip_plugin.attach.events import DeviceEvent, EventKind, events_of
from usbip_plugin.config.schema import OnLoss
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kube.events import CONTROLLER
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.model import DeviceKey, PodRef
from usbip_sim.world import SimNode

pytestmark = pytest.mark.short

ROOT = Path(__file__).parents[2]
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_POLL_S = 0.05


async def make_pod(admin: KubeClient, node: SimNode) -> PodRef:
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "uses-"},
        "spec": {
            "nodeName": node.name,
            "serviceAccountName": ACCOUNT,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "i", "resources": {"limits": {node.resource(RESOURCE): "1"}}}],
        },
    }
    made = (await admin.request("create", PODS, resource="pods", body=body))["metadata"]
    return PodRef(made["namespace"], made["name"], made["uid"])


async def make_node(admin: KubeClient, name: str) -> None:
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
    await admin.request("create", "/api/v1/nodes", resource="nodes", body=body)


async def event(admin: KubeClient, node: SimNode, reason: str, kind: str) -> dict[str, Any]:
    """Waits for the node's plugin to say so about a Pod or its Node; exactly one such Event is there then."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            events = (await admin.list("/apis/events.k8s.io/v1/events", resource="events"))["items"]
            found = [
                found
                for found in events
                if (found.get("reportingInstance"), found["reason"], found["regarding"]["kind"])
                == (node.name, reason, kind)
            ]
            if found:
                assert len(found) == 1, found
                assert found[0]["reportingController"] == CONTROLLER
                assert found[0]["regarding"].get("namespace") in (None, found[0]["metadata"]["namespace"])
                return dict(found[0])
            await asyncio.sleep(_POLL_S)


def about_pod(found: dict[str, Any], pod: PodRef) -> bool:
    """As `kubectl describe pod` looks for it: by name, namespace and uid."""
    regarding = found["regarding"]
    return (regarding["namespace"], regarding["name"], regarding["uid"]) == (pod.namespace, pod.name, pod.uid)


async def holding(rig: Rig, admin: KubeClient, node: SimNode) -> tuple[DeviceKey, PodRef]:
    """A pod that is in the API, and whose device its plugin knows."""
    pod = await make_pod(admin, node)
    await node.admit(pod, {RESOURCE: 1})
    await event(admin, node, "DeviceAttached", "Pod")
    await rig.until(lambda: all((lock := rig.lock(n, rig.keys[0])) and lock.pod == pod for n in rig.nodes))
    return rig.keys[0], pod


@pytest.fixture
async def may_evict(admin: KubeClient) -> AsyncIterator[None]:
    """deploy/components/evict is installed for the length of a test."""
    text = (ROOT / "deploy/components/evict/rbac.yaml").read_text(encoding="utf-8")
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        await admin.request("create", collection(document), resource=document["kind"], body=document)
    yield
    for document in documents:
        await admin.request("delete", f"{collection(document)}/{document['metadata']['name']}", resource="rbac")


async def test_attached_denied_lost_and_evicted(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, may_evict: None
) -> None:
    async with agents(cluster, tokens, node_api=True, pods=True, events=True, on_loss=OnLoss.EVICT) as rig:
        a, b = rig.nodes
        for node in rig.nodes:
            await make_node(admin, node.name)
        key, pod = await holding(rig, admin, a)
        attached = await event(admin, a, "DeviceAttached", "Pod")
        assert (attached["type"], attached["action"]) == ("Normal", "Attach")
        assert about_pod(attached, pod)
        assert re.fullmatch(rf"{re.escape(str(key))}: attached on vhci port \d+ as /dev/bus/usb/\S+", attached["note"])

        refused = await rig.allocate(b, key)
        assert refused.response is None
        denied = await event(admin, b, "DeviceDenied", "Node")
        assert (denied["type"], denied["action"]) == ("Warning", "Allocate")
        assert (denied["regarding"]["name"], denied["regarding"]["uid"]) == (b.name, b.name)
        assert denied["note"].startswith(f"{b.resource(RESOURCE)}: {key} is held by node {a.name} for pod {pod} since ")

        rig.server.drop(key.busid)
        lost = await event(admin, a, "DeviceLost", "Pod")
        assert about_pod(lost, pod)
        assert "became free; re-attaching" in lost["note"]
        changed = await event(admin, a, "DeviceNodesChanged", "Pod")
        assert (changed["type"], changed["action"]) == ("Warning", "Reattach")
        assert changed["note"] == f"{key}: re-attached with other device nodes; evicting the pod"
        evicted = await event(admin, a, "DevicePodEvicted", "Pod")
        assert (evicted["type"], evicted["action"]) == ("Warning", "Evict")
        assert about_pod(evicted, pod)
        assert evicted["note"] == f"evicted because {key} was re-attached with other device nodes"


async def test_taken_over_is_said_to_the_pod_that_had_it_and_on_the_node_that_took_it(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with agents(cluster, tokens, node_api=True, pods=True, events=True) as rig:
        a, b = rig.nodes
        key, pod = await holding(rig, admin, a)
        await a.die()
        with rig.clock(b).hurried():
            await b.until(RESOURCE, lambda devices: devices == {key.id: True})
        assert (await rig.allocate(b, key)).response is not None
        words = f"{key}: node {b.name} took over the device from node {a.name}, whose lock had expired"
        said = await event(admin, b, "DeviceTakenOver", "Pod")
        assert about_pod(said, pod)
        assert (said["note"], said["action"]) == (words, "TakeOver")
        on_node = await event(admin, b, "DeviceTakenOver", "Node")
        assert on_node["note"] == f"{words} (pod {pod})"


async def test_a_lock_that_was_lost_is_said_to_the_pod_and_on_the_node(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with agents(cluster, tokens, node_api=True, pods=True, events=True) as rig:
        a, _b = rig.nodes
        key, pod = await holding(rig, admin, a)
        leases = KubernetesLeases(admin, NAMESPACE)
        lease = await leases.get(key.id)
        assert lease is not None
        await leases.replace(replace(lease, holder="somebody-else", transitions=lease.transitions + 1))
        words = f"{key}: node somebody-else holds the device now; detaching the device here"
        said = await event(admin, a, "DeviceLockLost", "Pod")
        assert about_pod(said, pod)
        assert (said["type"], said["action"], said["note"]) == ("Warning", "Withdraw", words)
        assert (await event(admin, a, "DeviceLockLost", "Node"))["note"] == f"{words} (pod {pod})"


async def test_an_allocate_that_fails_otherwise_is_said_on_the_node(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with agents(cluster, tokens, node_api=True, events=True) as rig:
        a, _b = rig.nodes
        (key,) = rig.keys
        await rig.server.stop()
        answer = await rig.allocate(a, key)
        failed = await event(admin, a, "DeviceAllocateFailed", "Node")
        assert failed["type"] == "Warning"
        assert failed["note"].startswith(f"{a.resource(RESOURCE)}: USB/IP server {key.server}")
        assert failed["note"].partition(": ")[2] in answer.error


@pytest.mark.parametrize("what", EventKind, ids=lambda what: what.name)
async def test_the_api_takes_every_kind_under_the_shipped_policy(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, what: EventKind
) -> None:
    """Those whose happening is hard to bring about here have at least a form that is accepted."""
    async with agents(cluster, tokens, events=True) as rig:
        (node, _other), (key,) = rig.nodes, rig.keys
        pod = await make_pod(admin, node)
        notice = DeviceEvent(what, key, "words", pod)
        node.observer.on_notice(notice)
        for text, whom in events_of(notice):
            found = await event(admin, node, text.reason, "Pod" if whom is not None else "Node")
            assert (found["type"], found["action"], found["note"]) == (text.type, text.action, text.note)
        # as docs/reference/events.md says to look for them
        query = {"fieldSelector": f"reportingComponent={CONTROLLER}"}
        listed = (await admin.list("/api/v1/events", resource="events", params=query))["items"]
        assert what.value[1] in {found["reason"] for found in listed}
        assert {found["reportingComponent"] for found in listed} == {CONTROLLER}
