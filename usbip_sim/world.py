"""Several nodes in one process: the demo and the agent-level tests stand on it.

Everything of a node is the production code but what it works with: Leases in memory, a virtual USB/IP server, a
simulated kernel and a fake kubelet behind real gRPC on unix sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opentelemetry.trace import NoOpTracer, Tracer

from usbip_plugin.attach.cdi import SpecFiles
from usbip_plugin.clock import Clock
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import KubeUnreachable
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kubelet.plugins import SocketRegistrar
from usbip_plugin.kubelet.pod_resources import GrpcPodResources
from usbip_plugin.kubelet.registration import PluginDirectory
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.record import LeaseStore
from usbip_plugin.model import NodeIdentity, PodRef
from usbip_plugin.node.agent import Agent, AgentDependencies, MetricHooks
from usbip_plugin.sync import Broadcast
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.vhci.driver import VhciDriver
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kubelet.device_manager import Allocation, ContainerSpec
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.kubelet.pods import AdmittedPods
from usbip_sim.kubelet.specs import MemorySpecs
from usbip_sim.leases import FINE, Fate, MemoryBackend, MemoryLeases, Operation

KUBELET_TIMEOUT = 20.0
"""Seconds a caller of the world waits for a kubelet to see something before it is a failure."""
STOP_TIMEOUT = 5.0
"""Seconds an agent may take to end; its contract says 2."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a world is made of. make_driver(node, kernel), make_leases(node) and make_specs(node) replace doubles by the
    real thing.

    make_count(node) counts the nodes; without it there is one to each. make_clock(node) gives a node a clock of
    its own.

    make_kube(node) gives the agent an API server for what is not a Lease: Node status, and with kube_has_pods the pods,
    which are otherwise those of the fake kubelet.
    """

    config: Config
    clock: Clock
    seed: int = 0
    domain: str = "usbip.dev"
    lock_settings: LockSettings | None = None
    make_tracer: Callable[[str], Tracer] = lambda _node: NoOpTracer()
    make_observer: Callable[[str], MetricHooks] = lambda _node: MetricHooks()
    make_driver: Callable[[str, SimulatedKernel], VhciDriver] | None = None
    make_leases: Callable[[str], LeaseStore] | None = None
    make_kube: Callable[[str], KubeClient] | None = None
    make_specs: Callable[[str], SpecFiles] | None = None
    make_count: Callable[[str], Callable[[], Awaitable[int]]] | None = None
    make_clock: Callable[[str], Clock] | None = None
    kube_has_pods: bool = False


class SimNode:
    """One node: a kernel that survives its agent, a kubelet, and at most one agent at a time."""

    def __init__(self, name: str, directory: Path, setup: Setup, backend: MemoryBackend) -> None:
        self.name = name
        self.boot = 1
        self.partitioned = False
        self._clock = setup.make_clock(name) if setup.make_clock is not None else setup.clock
        self.kernel = SimulatedKernel(self._clock)
        self.advertised = Broadcast()
        """Fires whenever what the agent advertises, or why, has changed."""
        self.observer = replace(
            setup.make_observer(name), on_advertised=lambda _resource, _devices: self.advertised.fire()
        )
        self._setup = setup
        self.plugin_directory = directory / "device-plugins"
        self.plugin_directory.mkdir(parents=True)
        self._pod_resources = directory / "pod-resources.sock"
        self.kubelet = FakeKubelet(self.plugin_directory, self._pod_resources)
        self.pods = AdmittedPods(self.kubelet)
        self.specs: SpecFiles = setup.make_specs(name) if setup.make_specs is not None else MemorySpecs(setup.domain)
        self._backend = backend
        self._leases: LeaseStore | None = None
        self._task: asyncio.Task[None] | None = None
        self.agent: Agent | None = None

    def resource(self, name: str) -> str:
        """The full name of a resource of the configuration."""
        return f"{self._setup.domain}/{name}"

    def start(self) -> Agent:
        """A new agent process on this node."""
        setup = self._setup
        rng = random.Random(f"{setup.seed}/{self.name}/{self.boot}")  # noqa: S311 - jitter, and to be repeated
        client = TcpUsbipClient(self._clock)
        driver: VhciDriver = (
            setup.make_driver(self.name, self.kernel)
            if setup.make_driver is not None
            else SimulatedVhci(self.kernel, self.name)
        )
        self._leases = (
            setup.make_leases(self.name)
            if setup.make_leases is not None
            else MemoryLeases(self._backend, self._clock, self.name, self._fate)
        )
        pod_resources = GrpcPodResources(self._pod_resources, setup.domain)
        outside = AgentDependencies(
            me=NodeIdentity(self.name, f"boot-{self.name}-{self.boot}"),
            client=client,
            driver=driver,
            leases=self._leases,
            pod_resources=pod_resources,
            specs=self.specs,
            kube=setup.make_kube(self.name) if setup.make_kube is not None else None,
            registrar=SocketRegistrar(PluginDirectory(self.plugin_directory, self._clock), self._clock, rng),
            clock=self._clock,
            rng=rng,
            tracer=setup.make_tracer(self.name),
            pods=None if setup.kube_has_pods else self.pods,
            count_nodes=setup.make_count(self.name) if setup.make_count is not None else None,
        )
        agent = Agent(
            outside, setup.config, domain=setup.domain, lock_settings=setup.lock_settings, observer=self.observer
        )
        self.agent = agent
        self._task = asyncio.create_task(self._run(agent, client, pod_resources), name=f"agent {self.name}")
        return agent

    @staticmethod
    async def _run(agent: Agent, client: TcpUsbipClient, pod_resources: GrpcPodResources) -> None:
        async with pod_resources:
            with contextlib.closing(client):
                await agent.run()

    async def stop(self) -> None:
        """The agent ends as on SIGTERM: attachments and locks stay. Its errors are raised here."""
        task, self._task, self.agent = self._task, None, None
        if task is None:
            return
        task.cancel()
        async with self._setup.clock.timeout(STOP_TIMEOUT):
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def die(self) -> None:
        """The whole node goes: agent and kernel, and with the kernel every attachment."""
        await self.stop()
        self.kernel.reboot()
        if isinstance(self.specs, MemorySpecs):
            self.specs.clear()
        self.boot += 1

    def partition(self, *, cut: bool) -> None:
        """Between this node and the API server."""
        self.partitioned = cut
        if cut:
            self.pods.hold(synced=False)
        else:
            self.pods.resume()
        if cut and isinstance(self._leases, MemoryLeases):
            self._leases.cut()

    def _fate(self, operation: Operation) -> Fate:
        if self.partitioned:
            return Fate(refused=KubeUnreachable(operation.verb, "leases.coordination.k8s.io", "connection refused"))
        return FINE

    async def until(self, resource: str, predicate: Callable[[Mapping[str, bool]], bool]) -> dict[str, bool]:
        """Waits until what the kubelet knows, {ID: healthy}, is so. TimeoutError after KUBELET_TIMEOUT."""
        async with self._setup.clock.timeout(KUBELET_TIMEOUT):
            return await self.kubelet.wait_for(self.resource(resource), predicate)

    async def admit(
        self, pod: PodRef, requests: Mapping[str, int] | Sequence[ContainerSpec]
    ) -> dict[tuple[str, str], Allocation]:
        """FakeKubelet.admit, with resources by their short names."""
        if isinstance(requests, Mapping):
            return await self.kubelet.admit(pod, {self.resource(name): count for name, count in requests.items()})
        return await self.kubelet.admit(pod, requests)

    def end(self, pod: PodRef) -> None:
        """The pod ends; the pod watch, which the world has no API server for, gives its hint."""
        self.kubelet.end(pod)
        if self.agent is not None:
            self.agent.usage.pod_may_have_ended()


class World:
    """Nodes by name, their Leases, and no server: the caller brings those. Made by `running`."""

    def __init__(self, directory: Path, names: Sequence[str], setup: Setup) -> None:
        self.backend = MemoryBackend()
        self.nodes = {name: SimNode(name, directory / name, setup, self.backend) for name in names}

    def __getitem__(self, name: str) -> SimNode:
        return self.nodes[name]


@contextlib.asynccontextmanager
async def running(directory: Path, names: Sequence[str], setup: Setup) -> AsyncIterator[World]:
    """Every node's kubelet and agent run within the block. directory: short, unix socket paths end at 107 bytes."""
    world = World(directory, names, setup)
    async with contextlib.AsyncExitStack() as stack:
        for node in world.nodes.values():
            await stack.enter_async_context(node.kubelet)
            stack.push_async_callback(node.stop)
            node.start()
        yield world
