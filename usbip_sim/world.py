"""Several nodes in one process, for the demo and the agent-level tests.

The agents are production code. Around them are doubles: Leases in memory, a virtual USB/IP server, a simulated kernel,
and a fake kubelet behind real gRPC on unix sockets.
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
from usbip_plugin.kube.fleet import Fleet
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
"""Limit of SimNode.until, in seconds."""
STOP_TIMEOUT = 5.0
"""Limit of SimNode.stop, in seconds. The agent's contract allows 2 s."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Configuration of a World, and replacements for its doubles. Each make_... function gets the node's name.

    make_driver: also gets the node's simulated kernel.
    make_count: returns a function that returns the nodes; without it each agent counts one node.
    make_clock: replaces `clock`.
    make_kube: makes a client of an API server for everything but Leases: Node status, and pods with kube_has_pods.
    kube_has_pods: the agent gets its pods from the API server instead of the fake kubelet.
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
    make_count: Callable[[str], Callable[[], Awaitable[Fleet]]] | None = None
    make_clock: Callable[[str], Clock] | None = None
    kube_has_pods: bool = False


class SimNode:
    """Node of a World: a kernel that survives its agent, a kubelet, and at most one agent at a time."""

    def __init__(self, name: str, directory: Path, setup: Setup, backend: MemoryBackend) -> None:
        self.name = name
        self.boot = 1
        self.partitioned = False
        self._clock = setup.make_clock(name) if setup.make_clock is not None else setup.clock
        self.kernel = SimulatedKernel(self._clock)
        self.advertised = Broadcast()
        """Fires when the devices that the agent advertises, or the reasons of their health, have changed."""
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
        """Returns the full name of a resource, with the domain."""
        return f"{self._setup.domain}/{name}"

    def start(self) -> Agent:
        setup = self._setup
        rng = random.Random(f"{setup.seed}/{self.name}/{self.boot}")  # noqa: S311 - jitter, and to be repeated
        client = TcpUsbipClient(self._clock)
        driver = (setup.make_driver or self._simulated_driver)(self.name, self.kernel)
        self._leases = (setup.make_leases or self._memory_leases)(self.name)
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
    def _simulated_driver(name: str, kernel: SimulatedKernel) -> VhciDriver:
        return SimulatedVhci(kernel, name)

    def _memory_leases(self, name: str) -> LeaseStore:
        return MemoryLeases(self._backend, self._clock, name, self._fate)

    @staticmethod
    async def _run(agent: Agent, client: TcpUsbipClient, pod_resources: GrpcPodResources) -> None:
        async with pod_resources:
            with contextlib.closing(client):
                await agent.run()

    async def stop(self) -> None:
        """Ends the agent as SIGTERM does: attachments and locks stay. Raises TimeoutError, and the agent's error."""
        task, self._task, self.agent = self._task, None, None
        if task is None:
            return
        task.cancel()
        async with self._setup.clock.timeout(STOP_TIMEOUT):
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def die(self) -> None:
        """Ends the agent and reboots the kernel: all attachments are gone, and the boot id is new."""
        await self.stop()
        self.kernel.reboot()
        if isinstance(self.specs, MemorySpecs):
            self.specs.clear()
        self.boot += 1

    def partition(self, *, cut: bool) -> None:
        """Cuts this node off from the API server (cut), or connects it again."""
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
        """Waits until predicate holds for the kubelet's {ID: healthy} of a resource, and returns that mapping.

        resource: name without the domain.
        """
        async with self._setup.clock.timeout(KUBELET_TIMEOUT):
            return await self.kubelet.wait_for(self.resource(resource), predicate)

    async def admit(
        self, pod: PodRef, requests: Mapping[str, int] | Sequence[ContainerSpec]
    ) -> dict[tuple[str, str], Allocation]:
        """Admits a pod and returns {(container, resource): allocation}; see Admission.admit.

        requests: containers, with full resource names; or the limits of one container, with names without the domain.
        """
        if isinstance(requests, Mapping):
            return await self.kubelet.admit(pod, {self.resource(name): count for name, count in requests.items()})
        return await self.kubelet.admit(pod, requests)

    def end(self, pod: PodRef) -> None:
        """Ends a pod, and notifies the agent as a pod watch would."""
        self.kubelet.end(pod)
        if self.agent is not None:
            self.agent.usage.pod_may_have_ended()


class World:
    """Nodes by name, and the Leases that they share. The caller provides the USB/IP servers. Made by `running`."""

    def __init__(self, directory: Path, names: Sequence[str], setup: Setup) -> None:
        self.backend = MemoryBackend()
        self.nodes = {name: SimNode(name, directory / name, setup, self.backend) for name in names}

    def __getitem__(self, name: str) -> SimNode:
        return self.nodes[name]


@contextlib.asynccontextmanager
async def running(directory: Path, names: Sequence[str], setup: Setup) -> AsyncIterator[World]:
    """Makes a World whose kubelets and agents run within the block.

    directory: for the nodes' sockets; its path must be short, because a unix socket path has at most 107 bytes.
    """
    world = World(directory, names, setup)
    async with contextlib.AsyncExitStack() as stack:
        for node in world.nodes.values():
            await stack.enter_async_context(node.kubelet)
            stack.push_async_callback(node.stop)
            node.start()
        yield world
