"""A node of a simulated cluster: a kernel and a kubelet, which outlive its agents, and at most one agent at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

from usbip_plugin.claims import ClaimState
from usbip_plugin.errors import DetachFailed, KubeUnreachable
from usbip_plugin.kube.fleet import Fleet
from usbip_plugin.kube.node_status import KUBELET_SYNC_S
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.plugins import Plugin
from usbip_plugin.model import Descriptor, DeviceKey, Hold, NodeIdentity, PodRef
from usbip_plugin.node.agent import Agent, AgentDependencies
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kubelet.device_manager import Allocation, ContainerSpec
from usbip_sim.kubelet.pods import AdmittedPods
from usbip_sim.kubelet.specs import MemorySpecs, Resolved, resolve
from usbip_sim.leases import RESOURCE, Fate, Lost, MemoryLeases, Operation
from usbip_sim.virtual.cluster_kubelet import ClusterKubelet, LocalPlugin, LocalPodResources
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.network import Host
from usbip_sim.virtual.node_objects import NodeConnection, NodeObject
from usbip_sim.virtual.steploop import Process, loop_of
from usbip_sim.virtual.surroundings import Surroundings
from usbip_sim.virtual.tcp import MemoryConnector

ENUMERATION_DELAY = 0.3
"""Seconds from attach to enumerated in the simulation."""
ATTACH_S = 0.003
"""Seconds that an attach write takes in the simulation."""
DETACH_S = 0.02
"""Seconds from a detach write until the port is free in the simulation."""
STOP_S = 2.0
"""Seconds that an agent has to end and close its sockets after SIGTERM before it is killed."""


class ClusterNode:
    """Node of a simulated cluster, whose kernel and kubelet outlive its agent.

    host: the Process that freezes the whole node.
    process: the agent's Process, None if no agent runs.
    status_api: the agent's connection to its Node object, None if no agent runs.
    evicted: pods whose eviction the agent requested, in order. The caller ends them.
    driver: for observers of the simulation; the agent has its own.
    """

    def __init__(self, name: str, cluster: Surroundings, clock: SimClock) -> None:
        self.name = name
        self.clock = clock
        self.boot = 1
        loop = loop_of()
        self.host = Process(loop, name)
        self.net = Host(name, self.host, clock.rate)
        self.kernel = SimulatedKernel(
            clock,
            enumeration_delay=ENUMERATION_DELAY,
            resolve=self.net.sockets.resolve,
            ports_per_hub=8,
            serial_of=cluster.serial_of,
        )
        self.pods = ClusterKubelet(Process(loop, f"{name} kubelet", self.host))
        self.kubelet = self.pods.kubelet
        self.known_pods = AdmittedPods(self.kubelet)
        self.specs = MemorySpecs(cluster.domain)
        self.evicted: list[PodRef] = []
        """Pods whose eviction the agent asked for, in order. The caller ends them."""
        self.eviction_causes: list[str] = []
        """The causes that the agent gave for these evictions, in the same order."""
        self.agent: Agent | None = None
        self.process: Process | None = None
        self.leases: MemoryLeases | None = None
        self.object = NodeObject(name)
        self.status_api: NodeConnection | None = None
        self.driver = SimulatedVhci(self.kernel, name)
        self._cluster = cluster
        self._task: asyncio.Task[None] | None = None
        self._partitioned = False
        self._silent = False
        self._lost = Lost.REQUEST
        phase = random.Random(f"{cluster.seed}/{name}").random()  # noqa: S311 - to be repeated
        self.pods.process.call_later(phase * KUBELET_SYNC_S, self._sync_status)

    @property
    def sockets(self) -> int:
        """Number of socket references on this node that are not closed."""
        return len(self.net.sockets)

    # The agent.

    def start(self) -> None:
        """Starts an agent process, unless one runs."""
        if self.process is not None:
            return
        cluster, loop = self._cluster, loop_of()
        number = cluster.starts
        cluster.starts += 1
        rng = random.Random(f"{cluster.seed}/{self.name}/{self.boot}/{number}")  # noqa: S311 - to be repeated
        process = self.process = Process(loop, f"{self.name} agent {number}", self.host)
        connector = MemoryConnector(cluster.network, self.net)
        process.on_death(connector.process_died)
        leases = self.leases = MemoryLeases(cluster.backend, self.clock, self.name, self._fate)
        process.on_death(leases.process_died)
        if self._silent:
            leases.stall()
        self.status_api = NodeConnection(self.object, self.clock, self._fate)
        process.on_death(self.status_api.process_died)
        outside = AgentDependencies(
            me=NodeIdentity(self.name, f"{self.name}-boot-{self.boot}"),
            client=TcpUsbipClient(self.clock, connector),
            driver=cluster.spec.driver(_ProcessVhci(self.kernel, self.name, process, self.net)),
            leases=leases,
            pod_resources=LocalPodResources(self.pods, self.clock),
            specs=self.specs,
            kube=None,
            registrar=_LocalRegistrar(self.pods, process, self.clock),
            clock=self.clock,
            rng=rng,
            tracer=cluster.spec.tracer(self.name),
            pods=self.known_pods,
            evict=self._evict,
            write_counts=self.status_api.write,
            count_nodes=self._count_nodes,
        )
        self.agent = Agent(
            outside,
            cluster.spec.config,
            domain=cluster.domain,
            lock_settings=cluster.spec.lock_settings,
            lock_rules=cluster.spec.rules,
            observer=cluster.spec.observer(self.name),
        )
        self._task = process.create_task(self.agent.run(), "agent")

    def _evict(self, pod: PodRef, cause: str) -> None:
        self.evicted.append(pod)
        self.eviction_causes.append(cause)

    async def _count_nodes(self) -> Fleet:
        if self.partitioned:
            raise KubeUnreachable("list", "pods", "connection refused")
        names = self._cluster.spec.names
        return Fleet(self._cluster.spec.fleet) if self._cluster.spec.fleet else Fleet(len(names), frozenset(names))

    async def stop(self) -> None:
        """Ends the agent in order, as SIGTERM does; attachments, locks and pods stay.

        An agent that has not ended within STOP_S is killed. Raises the error with which the agent ended.
        """
        task, process = self._task, self.process
        if task is None or process is None:
            return
        task.cancel()
        await asyncio.wait([task], timeout=STOP_S)
        if self.process is process:
            self.kill()
        if task.done() and not task.cancelled():
            task.result()

    @property
    def ending(self) -> bool:
        """Returns whether the agent runs and was told to end, by terminate() or stop()."""
        return self._task is not None and self._task.cancelling() > 0

    def terminate(self, over: Callable[[bool], None]) -> None:
        """Sends the agent, if one runs, a SIGTERM without waiting for its end.

        STOP_S seconds of the node's clock later, kills the agent, unless it was killed before, and calls over(ended).
        ended: whether the agent had ended by itself.
        """
        task, process = self._task, self.process
        if task is None or process is None:
            return
        task.cancel()

        def end() -> None:
            if self.process is process:
                ended = task.done()
                self.kill()
                over(ended)

        loop_of().call_later(STOP_S / self.clock.rate, end)

    def kill(self) -> None:
        """Kills the agent, as SIGKILL does: it runs no further step, and the kernel closes its sockets."""
        process, self.process, self.agent, self._task = self.process, None, None, None
        self.status_api = None
        if process is not None:
            process.kill()

    def alive(self) -> None:
        """Raises the error with which the agent's task ended, if it ended with one."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    def freeze(self) -> None:
        """Freezes the agent's process, as SIGSTOP does. Kernel and kubelet go on."""
        if self.process is not None:
            self.process.freeze()

    def thaw(self) -> None:
        if self.process is not None:
            self.process.thaw()

    # The node.

    def freeze_host(self) -> None:
        """Freezes the whole node: nothing on it answers. Timers due meanwhile run when it is thawed."""
        self.host.freeze()
        self._cluster.network.update_timers(self.net)

    def thaw_host(self) -> None:
        self.host.thaw()
        self._cluster.network.update_timers(self.net)

    def reboot(self) -> None:
        """Reboots the node: agent, attachments and port records are gone, and the boot id is new."""
        self.kill()
        self.kernel.reboot()
        self.specs.clear()
        self.boot += 1

    def lose_power(self) -> None:
        """Reboots the node without closing its connections: the servers get no FIN or RST."""
        self.kill()
        self._cluster.network.vanish(self.net)
        self.reboot()

    def kubelet_restart(self, *, down: bool) -> None:
        """Stops the kubelet (down) or starts it. While it is down, no plugin registers and no List succeeds."""
        if down:
            self.pods.stop()
        else:
            self.pods.start()
            self._write_status()

    def _sync_status(self) -> None:
        """Overwrites the Node object with the kubelet's counts every KUBELET_SYNC_S."""
        self.pods.process.call_later(KUBELET_SYNC_S / self.clock.rate, self._sync_status)
        if self.pods.up.is_set():
            self._write_status()

    def _write_status(self) -> None:
        if not self.partitioned:
            manager = self.kubelet.manager
            self.object.sync({resource: manager.allocatable(resource) for resource in manager.healthy})

    # The API server.

    @property
    def partitioned(self) -> bool:
        """True while the agent's calls to the API server fail, at once or by their timeouts."""
        return self._partitioned or self._silent

    def partition(self, *, cut: bool) -> None:
        """Breaks the connections to the API server and refuses new ones, or ends that and silence(), too."""
        self._partitioned = cut
        if cut and self.leases is not None:
            self.leases.cut()
        if cut:
            self.known_pods.hold(synced=False)
        else:
            self.silence(silent=False)

    def silence(self, *, silent: bool, lost: Lost = Lost.REQUEST) -> None:
        """Loses requests to the API server or only their answers, and all events of open watches; or ends that."""
        self._silent, self._lost = silent, lost
        if silent:
            self.known_pods.hold(synced=not self._partitioned)
        elif not self._partitioned:
            self.known_pods.resume()
        if self.leases is not None:
            if silent:
                self.leases.stall()
            else:
                self.leases.resume()

    def _fate(self, operation: Operation) -> Fate:
        if self._partitioned:
            return Fate(refused=KubeUnreachable(operation.verb, RESOURCE, "connection refused"))
        if self._silent and operation.verb != "event":
            return Fate(lost=self._lost)
        return self._cluster.spec.faults(self.name, operation)

    # State, for checks.

    def attached(self) -> frozenset[DeviceKey]:
        """Returns the devices that are attached to this node's kernel, whatever the agent's claims are."""
        occupants = ((key, self.kernel.occupant(port)) for port, key in self.kernel.records.get(self.name, {}).items())
        # A record may be out of date.
        return frozenset(
            key for key, occupant in occupants if occupant is not None and occupant.recorded_by == self.name
        )

    def held_in(self, *states: ClaimState) -> frozenset[DeviceKey]:
        """Returns the devices with a claim of the agent in one of these states."""
        if self.agent is None:
            return frozenset()
        return frozenset(claim.key for claim in self.agent.claims.view.values() if claim.state in states)

    # Pods.

    async def admit(self, pod: PodRef, resource: str, count: int = 1) -> str | None:
        """Admits a pod. Returns None if the pod runs, else the kubelet's error message."""
        return await self.pods.admit(pod, {self._cluster.full(resource): count})

    async def admit_containers(self, pod: PodRef, *containers: ContainerSpec) -> str | None:
        """Admits a pod like admit(), with limits by resource names without the domain."""
        full = self._cluster.full
        specs = [replace(spec, limits={full(name): n for name, n in spec.limits.items()}) for spec in containers]
        return await self.pods.admit(pod, specs)

    def allocation(self, pod: PodRef, resource: str, container: str = "app") -> Allocation:
        """Returns the kubelet's checkpoint entry. Raises KeyError."""
        return self.kubelet.manager.checkpoint[pod, container, self._cluster.full(resource)]

    async def start_container(self, pod: PodRef, container: str = "app") -> Resolved:
        """(Re)starts a container and returns what it gets by CDI. Raises EndpointError or UnresolvableDevice."""
        answers = await self.pods.start_container(pod, container)
        names = [name for answer in answers.values() for name in answer.cdi_devices]
        return resolve(self.specs.texts.values(), names)

    def end(self, pod: PodRef) -> None:
        """Ends a pod. Notifies the agent as its pod watch would, unless the node is partitioned."""
        self.kubelet.end(pod)
        if self.agent is not None and self.process is not None and not self.partitioned:
            self.process.call_soon(self.agent.usage.pod_may_have_ended)


class _ProcessVhci(SimulatedVhci):
    """VhciDriver of one process: attach and detach take time, and subscriptions end with the process."""

    def __init__(self, kernel: SimulatedKernel, node: str, process: Process, host: Host) -> None:
        super().__init__(kernel, node)
        self._kernel_of_node, self._process, self._host = kernel, process, host

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...] = ()) -> int:
        number = await super().attach(key, descriptor, fd, holds)
        try:
            await self._kernel_of_node.clock.sleep(ATTACH_S)  # attached in the kernel, not yet known to the process
        except BaseException:
            await super().detach(number, timeout=0)
            raise
        return number

    async def detach(self, port: int, *, timeout: float) -> None:
        kernel = self._kernel_of_node
        occupant = kernel.occupant(port)
        if occupant is not None and not kernel.detaching_hangs and not self._foreign(port):

            def done() -> bool | None:
                return kernel.occupant(port) is not occupant or None

            # a detach that was written is carried out even if the writing process dies
            self._host.later(DETACH_S, lambda: None if done() else kernel.free_port(port))
            try:
                await kernel.changed.until_within(done, kernel.clock, timeout=timeout)
            except TimeoutError:
                raise DetachFailed(f"port {port} was not free after {timeout:g} s") from None
        await super().detach(port, timeout=timeout)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return super().subscribe(lambda: None if self._process.dead else callback())


class _LocalRegistrar:
    def __init__(self, pods: ClusterKubelet, process: Process, clock: SimClock) -> None:
        self._pods, self._process, self._clock = pods, process, clock

    async def run(self) -> None:
        """Does nothing: ClusterKubelet.up is set while the kubelet runs."""

    def plugin(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> Plugin:
        return LocalPlugin(self._pods, server, self._process, self._clock, on_state)
