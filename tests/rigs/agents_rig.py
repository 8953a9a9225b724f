"""Complete agents of two nodes against a real API server, with the rights of the plugin.

Kernels, kubelets and the USB/IP server are doubles behind real gRPC and real TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.apiserver.scaled_clock import ScaledClock
from tests.rigs.api_process import Cluster
from tests.rigs.tasks import background
from usbip_plugin.attach.events import DeviceEvent, events_of
from usbip_plugin.attach.usage import ABSENT_POLLS, Unlisted
from usbip_plugin.claims import ClaimState, DeviceUser
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, OnLoss, ResourceConfig, Selector
from usbip_plugin.kube.client import KubeClient, connect
from usbip_plugin.kube.events import EventRecorder
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LeaseStore
from usbip_plugin.model import DeviceKey, Lock, NodeIdentity, PodRef, UsbId
from usbip_plugin.node.agent import MetricHooks
from usbip_plugin.observe.tracing import RecentSpans, SpanRecord, Tracing
from usbip_plugin.sync import Broadcast
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.world import Setup, SimNode, World, running

PATIENCE_S = 30.0
DONGLE = UsbId(0x0951, 0x1666)
RESOURCE = "dongle"


class WatchedSpans(RecentSpans):
    """Recent spans that wake waiting tasks of the event loop in which this object was made."""

    def __init__(self) -> None:
        super().__init__(traces=256)
        self.ended = Broadcast()
        self._loop = asyncio.get_running_loop()

    def on_end(self, span: object) -> None:
        super().on_end(span)  # type: ignore[arg-type]
        self._loop.call_soon_threadsafe(self.ended.fire)

    async def trace_with(self, *wanted: tuple[str, str]) -> tuple[SpanRecord, ...]:
        """Waits for a trace that has a span of each (name, node), and returns the first one."""

        def found() -> list[tuple[SpanRecord, ...]]:
            return [trace for trace in self.traces() if set(wanted) <= {(span.name, span.node) for span in trace}]

        async with asyncio.timeout(PATIENCE_S):
            await self.ended.until(lambda: bool(found()))
        return found()[0]


@dataclass(frozen=True)
class Allocated:
    """The result of one Allocate: a response, or the text of an error."""

    node: SimNode
    response: pb.AllocateResponse | None
    error: str


class Nodes:
    """The nodes of a world, which all offer the devices as RESOURCE. Calls their plugins past the kubelets."""

    def __init__(self, world: World, keys: Sequence[DeviceKey]) -> None:
        self.world, self.keys = world, keys
        self.nodes = tuple(world.nodes.values())
        self.changed = Broadcast()
        self._stubs: dict[str, DevicePluginStub] = {}

    async def connect(self, stack: contextlib.AsyncExitStack) -> None:
        """Waits until every kubelet has all devices Healthy, then connects to every plugin."""
        for node in self.nodes:
            await node.until(RESOURCE, lambda devices: len(devices) == len(self.keys) and all(devices.values()))
            agent = node.agent
            assert agent is not None
            for undo in (
                agent.locks.subscribe(lambda _change: self.changed.fire()),
                agent.locks.subscribe_api(lambda _state: self.changed.fire()),
            ):
                stack.callback(undo)
            (socket,) = node.plugin_directory.glob(f"usbip-{RESOURCE}*.sock")
            options = (("grpc.use_local_subchannel_pool", 1),)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{socket}", options=options))
            self._stubs[node.name] = DevicePluginStub(channel)

    async def allocate(self, node: SimNode, key: DeviceKey) -> Allocated:
        """Calls Allocate at the socket of the plugin, like a kubelet with an old list."""
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[key.id])])
        try:
            return Allocated(node, await self._stubs[node.name].Allocate(request, timeout=PATIENCE_S), "")
        except grpc.aio.AioRpcError as error:
            return Allocated(node, None, error.details() or "")

    async def use(self, node: SimNode) -> PodRef:
        """Admits a pod with all devices, which the kubelet lists until it ends, and returns the pod.

        Waits until the locks have port and pod, the last writes of an Allocate.
        """

        def complete(key: DeviceKey) -> bool:
            lock = self.lock(node, key)
            return lock is not None and None not in (lock.port, lock.pod)

        pod = PodRef("default", "user", "uid")
        await node.admit(pod, {RESOURCE: len(self.keys)})
        await self.until(lambda: all(map(complete, self.keys)))
        return pod

    async def race(self, key: DeviceKey) -> tuple[list[Allocated], list[Allocated]]:
        """Calls Allocate on all nodes at once, and returns (winners, losers)."""
        answers = await asyncio.gather(*(self.allocate(node, key) for node in self.nodes))
        return [a for a in answers if a.response is not None], [a for a in answers if a.response is None]

    async def end_pod(self, node: SimNode, key: DeviceKey) -> None:
        """Lists the pod of the device once and then no longer, and waits until all nodes see the lock free."""
        agent = node.agent
        assert agent is not None
        user = DeviceUser(PodRef("default", "contender", "uid"), RESOURCE)
        for users in ({key.id: user}, *[{}] * ABSENT_POLLS):
            agent.attachments.usage.apply_poll(users, SystemClock().monotonic(), Unlisted(certain=True))
        await self.until(lambda: not any(self.holders(key)))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for the condition, which is checked when a node sees a change of a lock or of the API server."""
        async with asyncio.timeout(PATIENCE_S):
            await self.changed.until(condition)

    def lock(self, node: SimNode, key: DeviceKey) -> Lock | None:
        assert node.agent is not None
        return node.agent.locks.locks.get(key.id)

    def holders(self, key: DeviceKey) -> list[str]:
        """Returns the holder of the lock as each node sees it."""
        return [lock.holder if (lock := self.lock(node, key)) is not None else "" for node in self.nodes]

    def used_ports(self) -> int:
        return sum(p.status is not PortStatus.NULL for node in self.nodes for p in node.kernel.ports())

    def attached(self, node: SimNode, key: DeviceKey) -> bool:
        claim = node.agent.claims.view.get(key.id) if node.agent is not None else None
        return claim is not None and claim.state is ClaimState.ATTACHED


class Rig(Nodes):
    """Two nodes and a server with some dongles. keys: the devices, in order of bus ID."""

    def __init__(
        self,
        world: World,
        server: VirtualServer,
        keys: Sequence[DeviceKey],
        spans: WatchedSpans,
        clocks: Mapping[str, ScaledClock],
    ) -> None:
        super().__init__(world, keys)
        self.server, self.spans = server, spans
        self._clocks = clocks

    def clock(self, node: SimNode) -> ScaledClock:
        return self._clocks[node.name]


async def recording(
    stack: contextlib.AsyncExitStack, clients: Mapping[str, KubeClient]
) -> Callable[[str], MetricHooks]:
    """Runs an EventRecorder for each node, and returns the hooks by which a node's agent records its events."""
    recorders = {
        name: EventRecorder(client, NodeIdentity(name, "boot"), SystemClock(), random.Random(name))
        for name, client in clients.items()
    }
    for recorder in recorders.values():
        await stack.enter_async_context(background(recorder.run()))

    def hooks(node: str) -> MetricHooks:
        def record(event: DeviceEvent) -> None:
            for text, pod in events_of(event):
                recorders[node].record(text, pod)

        return MetricHooks(on_notice=record)

    return hooks


@contextlib.asynccontextmanager
async def agents(
    cluster: Cluster,
    tokens: NodeTokens,
    *,
    devices: int = 1,
    through: Mapping[str, str] | None = None,
    node_api: bool = False,
    store: Callable[[KubeClient, str], LeaseStore] = KubernetesLeases,
    pods: bool = False,
    events: bool = False,
    on_loss: OnLoss = OnLoss.KEEP,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Rig]:
    """Runs two agents, each with the token of its node; enters the block when all devices are offered.

    Node names are new each time.
    through: another address of the API server by the letter of a node.
    node_api: whether the agents use the API server for Node status and evictions, and with pods for their pods.
    store: makes the store of the Leases.
    events: whether Events are recorded.
    environ: the environment for tracing.
    """
    names = [f"n{uuid.uuid4().hex[:6]}-{letter}" for letter in "ab"]
    clocks = {name: ScaledClock() for name in names}
    spans = WatchedSpans()
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        clients: dict[str, KubeClient] = {}
        tracings: dict[str, Tracing] = {}
        for letter, name in zip("ab", names, strict=True):
            clients[name] = await connect(cluster.kubeconfig(await tokens.of(name), (through or {}).get(letter)))
            stack.push_async_callback(clients[name].close)
            tracings[name] = Tracing(name, version="test", environ=environ or {}, recent=spans)
            stack.callback(tracings[name].shutdown)
        server = VirtualServer(
            [VirtualDevice(f"1-{i + 1}", DONGLE, serial=f"S{i}", configured=True) for i in range(devices)], reset_time=0
        )
        await server.start()
        stack.push_async_callback(server.stop)
        selector = DeviceSelector(server.key, Selector(vendor=DONGLE.vendor, product=DONGLE.product))
        hooks = await recording(stack, clients) if events else lambda _node: MetricHooks()
        setup = Setup(
            config=Config((ResourceConfig(RESOURCE, (selector,), on_loss=on_loss),)),
            clock=SystemClock(),
            make_clock=clocks.__getitem__,
            make_tracer=lambda node: tracings[node].tracer,
            make_leases=lambda node: store(clients[node], NAMESPACE),
            make_kube=(lambda node: clients[node]) if node_api else None,
            make_observer=hooks,
            kube_has_pods=pods,
        )
        world = await stack.enter_async_context(running(directory, names, setup))
        keys = [DeviceKey(server.key, f"1-{i + 1}") for i in range(devices)]
        rig = Rig(world, server, keys, spans, clocks)
        await rig.connect(stack)
        yield rig
