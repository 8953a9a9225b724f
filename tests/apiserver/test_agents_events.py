"""Every kind of Event, as it arrives at a real API server under the shipped rights and admission policy."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.apiserver.objects import POLL_S, make_node, make_pod
from tests.rigs.agents_rig import PATIENCE_S, RESOURCE, Rig, agents
from tests.rigs.api_process import Cluster
from usbip_plugin.attach.events import DeviceEvent, EventKind, events_of
from usbip_plugin.config.schema import OnLoss
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kube.events import CONTROLLER
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.model import DeviceKey, PodRef
from usbip_sim.world import SimNode

pytestmark = pytest.mark.short


async def event(admin: KubeClient, node: SimNode, reason: str, kind: str) -> dict[str, Any]:
    """Waits for the Event of a node's plugin about a Pod or its Node, and returns it. There must be one only."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            events = (await admin.list("/apis/events.k8s.io/v1/events", resource="events"))["items"]
            found = [
                one
                for one in events
                # other tests leave Events, some without a kind
                if one.get("reportingInstance") == node.name
                and (one["reason"], one["regarding"]["kind"]) == (reason, kind)
            ]
            if found:
                assert len(found) == 1, found
                assert found[0]["reportingController"] == CONTROLLER
                assert found[0]["regarding"].get("namespace") in (None, found[0]["metadata"]["namespace"])
                return dict(found[0])
            await asyncio.sleep(POLL_S)


def about_pod(found: dict[str, Any], pod: PodRef) -> bool:
    """Returns whether `kubectl describe pod` shows the Event, by namespace, name and uid."""
    regarding = found["regarding"]
    return (regarding["namespace"], regarding["name"], regarding["uid"]) == (pod.namespace, pod.name, pod.uid)


async def holding(rig: Rig, admin: KubeClient, node: SimNode) -> tuple[DeviceKey, PodRef]:
    """Returns a device and the pod that has it, once every plugin knows both."""
    pod = await make_pod(admin, node.name, limits={node.resource(RESOURCE): "1"})
    await node.admit(pod, {RESOURCE: 1})
    await event(admin, node, "DeviceAttached", "Pod")
    await rig.until(lambda: all((lock := rig.lock(n, rig.keys[0])) and lock.pod == pod for n in rig.nodes))
    return rig.keys[0], pod


async def test_attach_denial_loss_and_eviction_are_events(
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


async def test_a_takeover_is_an_event_about_the_former_pod_and_the_new_node(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with agents(cluster, tokens, node_api=True, pods=True, events=True) as rig:
        a, b = rig.nodes
        key, pod = await holding(rig, admin, a)
        await a.die()
        with rig.clock(b).hurried():
            await b.until(RESOURCE, lambda devices: devices == {key.id: True})
        assert (await rig.allocate(b, key)).response is not None
        note = f"{key}: node {b.name} took over the device from node {a.name}, whose lock had expired"
        taken_over = await event(admin, b, "DeviceTakenOver", "Pod")
        assert about_pod(taken_over, pod)
        assert (taken_over["note"], taken_over["action"]) == (note, "TakeOver")
        on_node = await event(admin, b, "DeviceTakenOver", "Node")
        assert on_node["note"] == f"{note} (pod {pod})"


async def test_a_lost_lock_is_an_event_about_the_pod_and_the_node(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with agents(cluster, tokens, node_api=True, pods=True, events=True) as rig:
        a, _b = rig.nodes
        key, pod = await holding(rig, admin, a)
        leases = KubernetesLeases(admin, NAMESPACE)
        lease = await leases.get(key.id)
        assert lease is not None
        await leases.replace(replace(lease, holder="somebody-else", transitions=lease.transitions + 1))
        note = f"{key}: node somebody-else holds the device now; detaching the device here"
        lost = await event(admin, a, "DeviceLockLost", "Pod")
        assert about_pod(lost, pod)
        assert (lost["type"], lost["action"], lost["note"]) == ("Warning", "Withdraw", note)
        assert (await event(admin, a, "DeviceLockLost", "Node"))["note"] == f"{note} (pod {pod})"


async def test_a_failed_allocate_is_an_event_about_the_node(
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


@pytest.mark.parametrize("kind", EventKind, ids=lambda kind: kind.name)
async def test_the_api_server_accepts_every_kind_under_the_shipped_policy(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, kind: EventKind
) -> None:
    """Records each kind directly, as some are hard to cause here."""
    async with agents(cluster, tokens, events=True) as rig:
        (node, _other), (key,) = rig.nodes, rig.keys
        pod = await make_pod(admin, node.name, limits={node.resource(RESOURCE): "1"})
        device_event = DeviceEvent(kind, key, "words", pod)
        node.observer.on_notice(device_event)
        for text, about in events_of(device_event):
            found = await event(admin, node, text.reason, "Pod" if about is not None else "Node")
            assert (found["type"], found["action"], found["note"]) == (text.type, text.action, text.note)
        # the query of docs/reference/events.md
        query = {"fieldSelector": f"reportingComponent={CONTROLLER}"}
        listed = (await admin.list("/api/v1/events", resource="events", params=query))["items"]
        assert kind.value[1] in {found["reason"] for found in listed}
        assert {found["reportingComponent"] for found in listed} == {CONTROLLER}
