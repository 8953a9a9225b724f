"""Many complete agents in one process, each with its own connections to a real API server.

Kubelets, kernels and USB/IP servers are doubles behind real gRPC and real TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE, NodeTokens
from tests.rigs.agents_rig import DONGLE, RESOURCE, recording
from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.kube.client import KubeClient, connect
from usbip_plugin.kube.fleet import count_pods
from usbip_plugin.locks import record
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, PodRef
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.world import Setup, SimNode, World, running

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
EACH = 100
"""Limits the devices of one server."""
AT_ONCE = 16
"""Limits the concurrent requests that prepare the cluster."""
PATIENCE_S = 600.0
LOOK_S = 0.05


class ScaleRig:
    """The nodes in order, the servers and the devices."""

    def __init__(
        self, world: World, admin: KubeClient, servers: Sequence[VirtualServer], keys: Sequence[DeviceKey]
    ) -> None:
        self.nodes: tuple[SimNode, ...] = tuple(world.nodes.values())
        self._admin = admin
        self.servers, self.keys = servers, keys
        self._pods = 0

    def polls(self) -> int:
        """Returns the number of connections to the servers, which are all polls while no device is allocated."""
        return sum(server.connections for server in self.servers)

    async def polled(self, count: int) -> None:
        """Waits for so many more polls by all nodes together."""
        before = self.polls()
        await self.until(lambda: self.polls() - before >= count, f"{count} polls")

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for a condition on all nodes, which is checked at intervals. Raises RuntimeError after PATIENCE_S."""
        ends = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > ends:
                raise RuntimeError(f"not within {PATIENCE_S:g} s: {what}")
            await asyncio.sleep(LOOK_S)

    async def offered(self) -> None:
        """Waits until every kubelet and every Node has all devices."""
        for node in self.nodes:
            async with asyncio.timeout(PATIENCE_S):
                await node.kubelet.wait_for(node.resource(RESOURCE), self._all_healthy)
        await self.published()

    def _all_healthy(self, devices: object) -> bool:
        return isinstance(devices, dict) and len(devices) == len(self.keys) and all(devices.values())

    async def published(self) -> None:
        """Waits until no node has anything left to write into its status."""

        def pending(node: SimNode) -> bool:
            assert node.agent is not None
            assert node.agent.node_status is not None
            return bool(node.agent.node_status._pending())

        await self.until(lambda: not any(map(pending, self.nodes)), "Node status written")

    async def take(self, node: SimNode) -> PodRef:
        """Creates a pod with a device on the node, and waits until every node sees the pod on the lock."""
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
        """Waits until all other kubelets and Nodes have one device less."""

        def healthy(node: SimNode) -> int:
            return sum(node.kubelet.health(node.resource(RESOURCE)).values())

        others = [node for node in self.nodes if node is not holder]
        await self.until(lambda: all(healthy(node) == len(self.keys) - 1 for node in others), "withdrawn")
        await self.published()

    @staticmethod
    def _sees(node: SimNode, pod: PodRef) -> bool:
        assert node.agent is not None
        return any(lock.pod is not None and lock.pod.name == pod.name for lock in node.agent.locks.locks.values())

    async def end(self, node: SimNode, pod: PodRef) -> None:
        """Ends the pod, and waits until every node sees the lock free."""
        node.kubelet.end(pod)
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        await self._admin.request("delete", f"{PODS}/{pod.name}", resource="pods", body=body, timeout=PATIENCE_S)
        await self.until(lambda: not any(self._sees(other, pod) for other in self.nodes), f"{pod} gone everywhere")


async def _prepare(admin: KubeClient, names: Sequence[str], keys: Sequence[DeviceKey]) -> None:
    """Creates the Nodes and a free lock for each device, as in a cluster in which each device was used once."""
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
    """Prepares servers, Nodes, tokens and locks, and yields a function that starts the agents."""
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
        for name, config in configs.items():
            clients[name] = await connect(config)
            stack.push_async_callback(clients[name].close)
        selectors = tuple(
            DeviceSelector(s.key, Selector(vendor=DONGLE.vendor, product=DONGLE.product)) for s in servers
        )
        setup = Setup(
            config=Config((ResourceConfig(RESOURCE, selectors),)),
            clock=SystemClock(),
            make_leases=lambda node: KubernetesLeases(clients[node], NAMESPACE),
            make_kube=lambda node: clients[node],
            make_observer=await recording(stack, clients),
            make_count=lambda node: partial(count_pods, clients[node], NAMESPACE),
            kube_has_pods=True,
        )
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        world = await stack.enter_async_context(running(directory, list(configs), setup))
        rig = ScaleRig(world, admin, servers, keys)
        await rig.offered()
        yield rig
