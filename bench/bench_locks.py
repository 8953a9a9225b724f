"""Time to acquire a lock on a real API server, and until other nodes publish it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

from opentelemetry.trace import NoOpTracer

from bench.bench_nodes import NAMESPACE, Place, TimedLeases, connected, keys_of, nodes, timed_allocate, virtual_server
from bench.bench_rows import Row, p50_p99
from tests.rigs.agents_rig import RESOURCE
from tests.rigs.api_process import Cluster
from tests.rigs.tcp_proxy import proxy_to
from usbip_plugin.clock import SystemClock
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.model import DeviceKey, NodeIdentity, ServerKey
from usbip_sim.world import SimNode

READY_TIMEOUT_S = 30.0
TIMEOUT_S = 2.0
"""allocateTimeout while the API server does not answer."""
WITHDRAWAL_TARGET_MS = 50.0
WITHDRAWING = 10
"""Nodes, of which one takes a device and the others withdraw it."""


async def make_namespace(kubeconfig: str) -> None:
    """Creates the namespace of the Leases. kubeconfig: of an administrator."""
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    async with connected(kubeconfig) as client:
        await client.request("create", "/api/v1/namespaces", resource="namespaces", body=body)


async def acquisition(kubeconfig: str, count: int) -> list[Row]:
    """Measures LockManager.acquire of a free lock."""
    times = []
    async with connected(kubeconfig) as client:
        store, me = KubernetesLeases(client, NAMESPACE), NodeIdentity("bench-locks", "boot")
        manager = LockManager(store, me, SystemClock(), random.Random(0), LockSettings(), NoOpTracer())
        running = asyncio.create_task(manager.run())
        key = DeviceKey(ServerKey("bench.invalid"), "1-1")
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await manager.ready.wait()
            for _ in range(count):
                began = time.perf_counter()
                await manager.acquire(key)
                times.append((time.perf_counter() - began) * 1e3)
                await manager.release(key)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
    return p50_p99("lock acquired (API server)", times)


async def _unhealthy(node: SimNode, key: DeviceKey) -> float:
    """Returns the time.perf_counter() at which the node's kubelet has the device as unhealthy."""
    await node.until(RESOURCE, lambda devices: devices == {key.id: False})
    return time.perf_counter()


async def withdrawal(kubeconfig: str, count: int) -> list[Row]:
    """Measures from one node's lock write until each other node's kubelet has the device as unhealthy.

    All nodes and kubelets share one process, so each also waits for the others and for the Allocate.
    """
    names = ("taker", *(f"other{number}" for number in range(1, WITHDRAWING)))
    times = []
    async with contextlib.AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(connected(kubeconfig)) for name in names}
        stores = {name: TimedLeases(client, NAMESPACE, name) for name, client in clients.items()}
        server = await stack.enter_async_context(virtual_server())
        place = Place(names, (server.key,), keys_of(server), leases=lambda node: stores[node])
        (key,) = place.keys
        found = await stack.enter_async_context(nodes(place))
        taker, *others = found.nodes
        for _ in range(count):
            stores[taker.name].taking_sent.clear()
            gone = [asyncio.create_task(_unhealthy(other, key)) for other in others]
            await timed_allocate(found, taker, key)
            sent = stores[taker.name].taking_sent[key.id]
            times += [(at - sent) * 1e3 for at in await asyncio.gather(*gone)]
            await found.end_pod(taker, key)
            for other in others:
                await other.until(RESOURCE, lambda devices: devices == {key.id: True})
    name = f"Unhealthy at another node's kubelet after the lock write (API server, {WITHDRAWING} nodes)"
    return p50_p99(name, times, WITHDRAWAL_TARGET_MS)


async def unanswered(cluster: Cluster, token: str) -> list[Row]:
    """Measures an Allocate, with the report of its failure to kubelet and Node, without answers of the API server."""
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "deaf"}}
    async with contextlib.AsyncExitStack() as stack:
        admin = await stack.enter_async_context(connected(cluster.kubeconfig(token)))
        await admin.request("create", "/api/v1/nodes", resource="nodes", body=body)
        proxy = await stack.enter_async_context(proxy_to(cluster.port))
        server = await stack.enter_async_context(virtual_server())
        through = cluster.kubeconfig(token, f"https://127.0.0.1:{proxy.port}")
        client = await stack.enter_async_context(connected(through))
        store = KubernetesLeases(client, NAMESPACE)
        place = Place(
            ("deaf",),
            (server.key,),
            keys_of(server),
            leases=lambda _node: store,
            kube=lambda _node: client,
            allocate_timeout=TIMEOUT_S,
        )
        async with nodes(place) as found:
            proxy.flowing.clear()
            began = time.perf_counter()
            answer = await found.allocate(found.nodes[0], place.keys[0])
            took = (time.perf_counter() - began) * 1e3
            proxy.flowing.set()
    if answer.response is not None:
        raise RuntimeError("a device was given away without a lock")
    return [Row("Allocate without an answer of the API server ends within", took, "ms", TIMEOUT_S * 1e3)]
