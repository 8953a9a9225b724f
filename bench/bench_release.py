"""Time from a pod's end until its device's lock is free, on a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import time

from bench.bench_nodes import NAMESPACE, Place, TimedLeases, connected, keys_of, nodes, virtual_server
from bench.bench_rows import Row, p50_p99
from tests.rigs.agents_rig import RESOURCE
from tests.rigs.api_process import Cluster
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import PodRef

TARGET_MS = 3000.0
NODE = "releasing"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
ACCOUNTS = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
PATIENCE_S = 30.0


class Releases(TimedLeases):
    """A lease store that records when the API server has accepted a release."""

    def __init__(self, client: KubeClient) -> None:
        super().__init__(client, NAMESPACE, NODE)
        self.noted = asyncio.Event()
        self.released = asyncio.Event()
        self.released_at = 0.0

    async def replace(self, lease: Lease) -> Lease:
        written = await super().replace(lease)
        if not written.holder:
            self.released_at = time.perf_counter()
            self.released.set()
        elif record.pod_of(written.annotations.get(record.POD)) is not None:
            self.noted.set()
        return written


async def release(cluster: Cluster, token: str, count: int) -> list[Row]:
    """Measures releases after a pod has left the kubelet's list and is deleted. The agent sees both."""
    times = []
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(cluster.kubeconfig(token)))
        store = Releases(client)
        await client.request("create", "/api/v1/nodes", resource="nodes", body=_object("Node", NODE))
        account = _object("ServiceAccount", "default")  # no controller makes it here
        await client.request("create", ACCOUNTS, resource="serviceaccounts", body=account)
        server = await stack.enter_async_context(virtual_server())
        place = Place(
            (NODE,), (server.key,), keys_of(server), lambda _node: store, kube=lambda _node: client, pods=True
        )
        found = await stack.enter_async_context(nodes(place))
        (node,) = found.nodes
        for number in range(count):
            store.noted.clear()
            store.released.clear()
            pod = await _made(client, f"pod-{number}", node.resource(RESOURCE))
            await node.admit(pod, {RESOURCE: 1})
            async with asyncio.timeout(PATIENCE_S):
                await store.noted.wait()
            began = time.perf_counter()
            node.kubelet.end(pod)
            await _deleted(client, pod)
            async with asyncio.timeout(PATIENCE_S):
                await store.released.wait()
            times.append((store.released_at - began) * 1e3)
            await node.until(RESOURCE, lambda devices: all(devices.values()))
    return p50_p99("lock free after the pod's end (API server, simulated kernel)", times, TARGET_MS)


async def _made(client: KubeClient, name: str, resource: str) -> PodRef:
    container = {"name": "user", "image": "user", "resources": {"limits": {resource: "1"}}}
    body = _object("Pod", name) | {"spec": {"nodeName": NODE, "containers": [container]}}
    made = await client.request("create", PODS, resource="pods", body=body)
    return PodRef(NAMESPACE, name, made["metadata"]["uid"])


async def _deleted(client: KubeClient, pod: PodRef) -> None:
    body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
    await client.request("delete", f"{PODS}/{pod.name}", resource="pods", body=body)


def _object(kind: str, name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
