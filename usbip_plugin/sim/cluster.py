"""A whole cluster in virtual time: many nodes, servers and pods in one process, without a socket.

Production code for everything but clock, network, kernel and kubelet. What the invariants of the simulation need to see
is kept here: who is attached to what, who imports what, what the locks say.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from opentelemetry.trace import NoOpTracer

from usbip_plugin.agent import Agent, Observer, Outside
from usbip_plugin.claims import State
from usbip_plugin.config import Config
from usbip_plugin.errors import KubeUnreachable, PodResourcesUnavailable
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.pod_resources import ContainerDevices
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.memory import FINE, Fate, MemoryBackend, MemoryLeases, Operation
from usbip_plugin.locks.protocol import Rules
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import DeviceKey, NodeIdentity, PodRef, ServerKey
from usbip_plugin.resources import Plugin
from usbip_plugin.sim.client import MemoryUsbipClient
from usbip_plugin.sim.device_manager import AdmissionError
from usbip_plugin.sim.kernel import SimulatedVhci
from usbip_plugin.sim.local_kubelet import LocalKubelet
from usbip_plugin.sim.loop import SimClock
from usbip_plugin.sim.pods import AdmittedPods
from usbip_plugin.sim.ports import SimulatedKernel
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.socket import SocketTable
from usbip_plugin.vhci.sysfs import PortStatus

ENUMERATION_DELAY = 0.3
KUBELET_BLIND_S = 3.0
"""How long a kubelet that has started answers pod-resources without knowing its pods: a real one for about a second."""
LEASES = "leases.coordination.k8s.io"

FaultPlan = Callable[[str, Operation], Fate]
"""(node, operation) -> what happens to it."""


class _LocalPlugin:
    """A resource plugged straight into the kubelet of the same process."""

    def __init__(self, node: ClusterNode, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> None:
        self._node, self._server, self._on_state = node, server, on_state
        self.error: str | None = None
        self.registrations = 0
        self.registered = False

    @property
    def resource(self) -> str:
        return self._server.resource

    async def run(self) -> None:
        while True:
            await self._node.kubelet_up.wait()
            self.registrations += 1
            self.registered = True
            self._on_state(self)
            plugged = asyncio.create_task(self._node.kubelet.plug_in(self._server))
            down = asyncio.create_task(self._node.kubelet_down.wait())
            try:
                await asyncio.wait({plugged, down}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.registered = False
                for task in (plugged, down):
                    task.cancel()
                await asyncio.gather(plugged, down, return_exceptions=True)
            self._on_state(self)


class _LocalRegistrar:
    def __init__(self, node: ClusterNode) -> None:
        self._node = node

    async def run(self) -> None:
        """Nothing to follow: the kubelet is in this process."""

    def plugin(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> Plugin:
        return _LocalPlugin(self._node, server, on_state)


class ClusterNode:
    """One node: its kernel and kubelet outlive its agent."""

    def __init__(self, name: str, cluster: Cluster, rate: float) -> None:
        self.name = name
        self.boot = 1
        self.partitioned = False
        self.clock = SimClock(asyncio.get_running_loop(), rate)
        self.sockets = SocketTable()
        self.kernel = SimulatedKernel(
            self.clock, enumeration_delay=ENUMERATION_DELAY, resolve=self.sockets.resolve, ports_per_hub=8
        )
        self.kubelet = LocalKubelet()
        self.pods = AdmittedPods(self.kubelet)
        self.evicted: list[PodRef] = []
        """The pods that were to be evicted, in order; ending them is up to the caller."""
        self.kubelet_up, self.kubelet_down = asyncio.Event(), asyncio.Event()
        self.kubelet_up.set()
        self._cluster = cluster
        self.client = MemoryUsbipClient(cluster.servers.get, self.sockets, self.clock, cluster.latency)
        self.leases = MemoryLeases(cluster.backend, self.clock, name, self._fate)
        self.agent: Agent | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """A new agent process."""
        cluster = self._cluster
        rng = random.Random(f"{cluster.seed}/{self.name}/{self.boot}/{cluster.starts}")  # noqa: S311 - to be repeated
        cluster.starts += 1
        self.agent = Agent(
            Outside(
                me=NodeIdentity(self.name, f"{self.name}-boot-{self.boot}"),
                client=self.client,
                driver=SimulatedVhci(self.kernel, self.name),
                leases=self.leases,
                pod_resources=self,
                kube=None,
                registrar=_LocalRegistrar(self),
                clock=self.clock,
                rng=rng,
                tracer=NoOpTracer(),
                pods=self.pods,
                evict=self.evicted.append,
            ),
            cluster.config,
            domain=cluster.domain,
            lock_settings=cluster.lock_settings,
            lock_rules=cluster.rules,
            observer=Observer(),
        )
        self._task = asyncio.create_task(self.agent.run(), name=f"agent {self.name}")

    async def list(self) -> tuple[ContainerDevices, ...]:
        """See PodResources.list."""
        if self.kubelet_down.is_set():
            raise PodResourcesUnavailable("the kubelet is down")
        return await self.kubelet.list()

    async def stop(self) -> None:
        """The agent process ends, whatever it is doing; attachments, locks and pods stay. Raises what it died of."""
        task, self._task, self.agent = self._task, None, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def alive(self) -> None:
        """Raises what the agent died of, if it did."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def reboot(self) -> None:
        """Agent, kernel and pods are gone; the boot id is a new one."""
        await self.stop()
        self.kernel.reboot()
        self.boot += 1

    def kubelet_restart(self, *, down: bool) -> None:
        """While it is down nothing is registered and pod-resources does not answer; then it knows no pods at first."""
        if down:
            self.kubelet_up.clear()
            self.kubelet_down.set()
            self.kubelet.manager.restart()
            self.kubelet.blind = True
        else:
            self.kubelet_down.clear()
            self.kubelet_up.set()
            asyncio.get_running_loop().call_later(KUBELET_BLIND_S, self._kubelet_sees)

    def _kubelet_sees(self) -> None:
        if self.kubelet_up.is_set():
            self.kubelet.blind = False

    def partition(self, *, cut: bool) -> None:
        """Between this node and the API server."""
        self.partitioned = cut
        self.pods.synced = not cut
        if cut:
            self.leases.cut()

    def attached(self) -> frozenset[DeviceKey]:
        """The devices this node's kernel has now, whatever the agent thinks."""
        driver = SimulatedVhci(self.kernel, self.name)
        return frozenset(
            port.record for port in driver.ports_now() if port.record is not None and port.status is not PortStatus.NULL
        )

    def held_in(self, *states: State) -> frozenset[DeviceKey]:
        """Devices with a claim in one of these states."""
        if self.agent is None:
            return frozenset()
        return frozenset(claim.key for claim in self.agent.attacher.claims.values() if claim.state in states)

    async def admit(self, pod: PodRef, resource: str, count: int = 1) -> str | None:
        """Admits a pod; None if it runs, the kubelet's words if it failed."""
        try:
            await self.kubelet.admit(pod, {self._cluster.full(resource): count})
        except AdmissionError as error:
            return str(error)
        return None

    def end(self, pod: PodRef) -> None:
        """The pod ends; the pod watch gives its hint."""
        self.kubelet.end(pod)
        if self.agent is not None:
            self.agent.usage.hint()

    def _fate(self, operation: Operation) -> Fate:
        if self.partitioned:
            return Fate(refused=KubeUnreachable(operation.verb, LEASES, "connection refused"))
        return self._cluster.faults(self.name, operation)


@dataclass(slots=True)
class ClusterSpec:
    """What a cluster is made of. rates: each node's clock against the loop's, 1.0 where not given."""

    names: Sequence[str]
    servers: Sequence[VirtualServer]
    config: Config
    seed: int = 0
    lock_settings: LockSettings | None = None
    rules: Rules | None = None
    rates: Sequence[float] = ()
    faults: FaultPlan = lambda _node, _operation: FINE
    latency: Callable[[], float] = lambda: 0.001


class Cluster:
    """The nodes by name. Made by `cluster`."""

    domain = "usbip.dev"

    def __init__(self, spec: ClusterSpec) -> None:
        self.seed = spec.seed
        self.starts = 0
        self.config = spec.config
        self.lock_settings = spec.lock_settings
        self.rules = spec.rules
        self.faults = spec.faults
        self.latency = spec.latency
        self.backend = MemoryBackend()
        self.servers: dict[ServerKey, VirtualServer] = {server.key: server for server in spec.servers}
        rates = [*spec.rates, *[1.0] * len(spec.names)]
        self.nodes = {name: ClusterNode(name, self, rates[i]) for i, name in enumerate(spec.names)}

    def full(self, resource: str) -> str:
        return f"{self.domain}/{resource}"

    def __getitem__(self, name: str) -> ClusterNode:
        return self.nodes[name]

    def holder(self, key: DeviceKey) -> str:
        """Whom the lock names in the store itself, "" for nobody."""
        lease = self.backend.leases.get(key.id)
        return lease.holder if lease is not None else ""

    def pod_of(self, key: DeviceKey) -> PodRef | None:
        """Which pod the lock names in the store itself."""
        lease = self.backend.leases.get(key.id)
        return lock_of(lease).pod if lease is not None else None

    async def settle(self, condition: Callable[[], bool], seconds: float) -> bool:
        """True as soon as the condition holds, looked at every 20 ms of virtual time; False after so many seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not condition():
            if loop.time() >= end:
                return False
            await asyncio.sleep(0.02)
        return True


@contextlib.asynccontextmanager
async def cluster(spec: ClusterSpec) -> AsyncIterator[Cluster]:
    """Servers and agents run within the block."""
    for server in spec.servers:
        await server.start()
    made = Cluster(spec)
    try:
        for node in made.nodes.values():
            node.start()
        yield made
    finally:
        for node in made.nodes.values():
            await node.stop()
        for server in spec.servers:
            await server.stop()
