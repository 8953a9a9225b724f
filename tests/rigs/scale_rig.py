"""Many whole agents in one process, each with its own connections to a real API server, as its node's plugin has them.

Kubelets, kernels and USB/IP servers are doubles behind real gRPC and real TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE, NodeTokens
from tests.rigs.agents_rig import DONGLE, RESOURCE
from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from usbip_plugin.attach.events import DeviceEvent, events_of
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.kube.client import KubeClient, connect
from usbip_plugin.kube.events import EventRecorder
from usbip_plugin.kube.fleet import count_pods
from usbip_plugin.locks import record
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, NodeIdentity, PodRef
from usbip_plugin.node.agent import MetricHooks
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.world import Setup, SimNode, World, running

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
EACH = 100
"""Devices of one server, at most."""
AT_ONCE = 16
PATIENCE_S = 600.0
LOOK_S = 0.05


class ScaleRig:
    """The nodes in order, the servers, the devices."""

    def __init__(
        self, world: World, admin: KubeClient, servers: Sequence[VirtualServer], keys: Sequence[DeviceKey]
    ) -> None:
        self.nodes: tuple[SimNode, ...] = tuple(world.nodes.values())
        self._admin = admin
        self.servers, self.keys = servers, keys
        self._pods = 0

    def polls(self) -> int:
        """Connections that the servers have had: polls, while nobody allocates."""
        return sum(server.connections for server in self.servers)

    async def polled(self, count: int) -> None:
        """Waits for so many more polls of all nodes together."""
        before = self.polls()
        await self.until(lambda: self.polls() - before >= count, f"{count} polls")

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Looked at again and again: it is about all nodes at once."""
        ends = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > ends:
                raise RuntimeError(f"not so within {PATIENCE_S:g} s: {what}")
            await asyncio.sleep(LOOK_S)

    async def offered(self) -> None:
        """Every kubelet has every device Healthy, and every Node says so."""
        for node in self.nodes:
            async with asyncio.timeout(PATIENCE_S):
                await node.kubelet.wait_for(node.resource(RESOURCE), self._all_healthy)
        await self.published()

    def _all_healthy(self, devices: object) -> bool:
        return isinstance(devices, dict) and len(devices) == len(self.keys) and all(devices.values())

    async def published(self) -> None:
        """No node has anything left to write into its status."""
        await self.until(lambda: not any(self._pending(node) for node in self.nodes), "Node status written")

    @staticmethod
    def _pending(node: SimNode) -> bool:
        assert node.agent is not None
        assert node.agent.node_status is not None
        return bool(node.agent.node_status._pending())

    async def take(self, node: SimNode) -> PodRef:
        """A pod gets a device there; returns when every node has seen that its lock says so."""
        self._pods += 1
        name = f"pod-{self._pods}"
        container = {"name": "user", "image": "user", "resources": {"limits": {node.resource(RESOURCE): "1"}}}
        spec = {"nodeName": node.name, "serviceAccountName": ACCOUNT, "containers": [container]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        made = await self._admin.request("create", PODS, resource="pods", body=body, timeout=PATIENCE_S)
        pod = PodRef(NAMESPACE, name, made["metadata"]["uid"])
        await node.admit(pod, {RESOURCE: 1})
        await self.until(lambda: all(self._sees(other, pod) for other in self.nodes), f"{pod} seen everywhere")
        return pod

    async def withdrawn(self, holder: SimNode) -> None:
        """All kubelets but the holder's have a device less, and all Nodes say so."""
        fewer = len(self.keys) - 1
        others = [node for node in self.nodes if node is not holder]
        await self.until(lambda: all(self._healthy(node) == fewer for node in others), "withdrawn")
        await self.published()

    @staticmethod
    def _healthy(node: SimNode) -> int:
        return sum(node.kubelet.health(node.resource(RESOURCE)).values())

    @staticmethod
    def _sees(node: SimNode, pod: PodRef) -> bool:
        assert node.agent is not None
        return any(lock.pod is not None and lock.pod.name == pod.name for lock in node.agent.locks.locks.values())

    async def end(self, node: SimNode, pod: PodRef) -> None:
        """The pod ends; returns when every node has seen the lock free."""
        node.kubelet.end(pod)
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        await self._admin.request("delete", f"{PODS}/{pod.name}", resource="pods", body=body, timeout=PATIENCE_S)
        await self.until(lambda: not any(self._sees(other, pod) for other in self.nodes), f"{pod} gone everywhere")


async def _prepare(admin: KubeClient, names: Sequence[str], keys: Sequence[DeviceKey]) -> None:
    """Node objects, and a free lock for each device: what a cluster has in which each was used once."""
    room = asyncio.Semaphore(AT_ONCE)
    store = KubernetesLeases(admin, NAMESPACE)

    async def node(name: str) -> None:
        async with room:
            body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
            await admin.request("create", "/api/v1/nodes", resource="nodes", body=body)

    async def lock(key: DeviceKey) -> None:
        notes = {record.SERVER: str(key.server), record.BUSID: key.busid, record.USB_ID: str(DONGLE)}
        async with room:
            await store.create(Lease(key.id, annotations=notes, labels=record.LOCK_LABELS))

    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(node(name))
        for key in keys:
            group.create_task(lock(key))


@contextlib.asynccontextmanager
async def prepared(
    cluster: Cluster, agents: int, devices: int
) -> AsyncIterator[Callable[[], contextlib.AbstractAsyncContextManager[ScaleRig]]]:
    """Everything but the agents: servers, Nodes, tokens, locks. What it gives starts the agents."""
    names = [f"node-{number:03}" for number in range(agents)]
    tokens = NodeTokens(cluster)
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for first in range(0, devices, EACH):
            here = range(first, min(devices, first + EACH))
            server = VirtualServer([VirtualDevice(f"1-{n + 1}", DONGLE, configured=True) for n in here], reset_time=0)
            await server.start()
            stack.push_async_callback(server.stop)
            servers.append(server)
        keys = [DeviceKey(servers[n // EACH].key, f"1-{n + 1}") for n in range(devices)]
        admin = await connect(cluster.kubeconfig(ADMIN_TOKEN))
        stack.push_async_callback(admin.close)
        await _prepare(admin, names, keys)
        configs = {name: cluster.kubeconfig(await tokens.of(name)) for name in names}
        yield partial(_fleet, admin, configs, servers, keys)


@contextlib.asynccontextmanager
async def _fleet(
    admin: KubeClient, configs: dict[str, str], servers: Sequence[VirtualServer], keys: Sequence[DeviceKey]
) -> AsyncIterator[ScaleRig]:
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        recorders = {}
        for name, config in configs.items():
            clients[name] = await connect(config)
            stack.push_async_callback(clients[name].close)
            me = NodeIdentity(name, "boot")
            recorders[name] = EventRecorder(clients[name], me, SystemClock(), random.Random(name))
            stack.push_async_callback(_ended, asyncio.create_task(recorders[name].run()))

        def observer(node: str) -> MetricHooks:
            def noticed(notice: DeviceEvent) -> None:
                for text, pod in events_of(notice):
                    recorders[node].record(text, pod)

            return MetricHooks(on_notice=noticed)

        selectors = tuple(
            DeviceSelector(s.key, Selector(vendor=DONGLE.vendor, product=DONGLE.product)) for s in servers
        )
        setup = Setup(
            config=Config((ResourceConfig(RESOURCE, selectors),)),
            clock=SystemClock(),
            make_leases=lambda node: KubernetesLeases(clients[node], NAMESPACE),
            make_kube=lambda node: clients[node],
            make_observer=observer,
            make_count=lambda node: partial(count_pods, clients[node], NAMESPACE),
            kube_has_pods=True,
        )
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        world = await stack.enter_async_context(running(directory, list(configs), setup))
        rig = ScaleRig(world, admin, servers, keys)
        await rig.offered()
        yield rig


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
