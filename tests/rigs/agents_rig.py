"""Whole agents of two nodes against a real API server: Leases, Node status and pods with the plugin's own rights.

Kernels, kubelets and the USB/IP server are doubles, behind real gRPC and real TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import grpc.aio

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.apiserver.scaled_clock import ScaledClock
from tests.rigs.api_process import Cluster
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
    """Wakes who waits for a span, in the event loop it was made in."""

    def __init__(self) -> None:
        super().__init__(traces=256)
        self.ended = Broadcast()
        self._loop = asyncio.get_running_loop()

    def on_end(self, span: object) -> None:
        super().on_end(span)  # type: ignore[arg-type]
        self._loop.call_soon_threadsafe(self.ended.fire)

    async def trace_with(self, *wanted: tuple[str, str]) -> tuple[SpanRecord, ...]:
        """The first trace that has a span of each (name, node)."""
        found: tuple[SpanRecord, ...] = ()

        def look() -> bool:
            nonlocal found
            whole = [t for t in self.traces() if set(wanted) <= {(span.name, span.node) for span in t}]
            found = whole[0] if whole else ()
            return bool(whole)

        async with asyncio.timeout(PATIENCE_S):
            await self.ended.until(look)
        return found


@dataclass(frozen=True)
class Allocated:
    """What one raw Allocate came to: a response, or the error's text."""

    node: SimNode
    response: pb.AllocateResponse | None
    error: str


class Nodes:
    """The nodes of a world and the devices they all offer as RESOURCE, with a way around their kubelets."""

    def __init__(self, world: World, keys: Sequence[DeviceKey]) -> None:
        self.world, self.keys = world, keys
        self.nodes = tuple(world.nodes.values())
        self.changed = Broadcast()
        self._stubs: dict[str, DevicePluginStub] = {}

    async def connect(self, stack: contextlib.AsyncExitStack) -> None:
        """Waits until every kubelet has all devices Healthy, then dials every plugin."""
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
        """Allocate straight at the plugin's socket, as a kubelet that has not heard yet."""
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[key.id])])
        try:
            return Allocated(node, await self._stubs[node.name].Allocate(request, timeout=PATIENCE_S), "")
        except grpc.aio.AioRpcError as error:
            return Allocated(node, None, error.details() or "")

    async def use(self, node: SimNode) -> PodRef:
        """A pod with all devices, which the kubelet lists until it ends: one that none lists keeps them for 15 s.

        Port and pod are noted on the locks, which is after the answer: what is read of a lock from here on stays so.
        """
        pod = PodRef("default", "user", "uid")
        await node.admit(pod, {RESOURCE: len(self.keys)})
        await self.until(lambda: all(map(partial(self._noted, node), self.keys)))
        return pod

    def _noted(self, node: SimNode, key: DeviceKey) -> bool:
        lock = self.lock(node, key)
        return lock is not None and None not in (lock.port, lock.pod)

    async def race(self, key: DeviceKey) -> tuple[list[Allocated], list[Allocated]]:
        """All nodes at the same moment: (winners, losers)."""
        answers = await asyncio.gather(*(self.allocate(node, key) for node in self.nodes))
        return [a for a in answers if a.response is not None], [a for a in answers if a.response is None]

    async def end_pod(self, node: SimNode, key: DeviceKey) -> None:
        """The device's pod is seen once and then no more; returns when all nodes have seen the lock free."""
        agent = node.agent
        assert agent is not None
        clock = SystemClock()
        nobody = Unlisted(certain=True)
        agent.attachments.usage.apply_poll(
            {key.id: DeviceUser(PodRef("default", "contender", "uid"), RESOURCE)}, clock.monotonic(), nobody
        )
        for _ in range(ABSENT_POLLS):
            agent.attachments.usage.apply_poll({}, clock.monotonic(), nobody)
        await self.until(lambda: not any(self.holders(key)))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looks again at each change of a lock and of the API server's state, as any node sees them."""
        async with asyncio.timeout(PATIENCE_S):
            await self.changed.until(condition)

    def lock(self, node: SimNode, key: DeviceKey) -> Lock | None:
        assert node.agent is not None
        return node.agent.locks.locks.get(key.id)

    def holders(self, key: DeviceKey) -> list[str]:
        """As each node sees it."""
        return [lock.holder if (lock := self.lock(node, key)) is not None else "" for node in self.nodes]

    def used_ports(self) -> int:
        return sum(p.status is not PortStatus.NULL for node in self.nodes for p in node.kernel.ports())

    def attached(self, node: SimNode, key: DeviceKey) -> bool:
        claim = node.agent.claims.view.get(key.id) if node.agent is not None else None
        return claim is not None and claim.state is ClaimState.ATTACHED


class Rig(Nodes):
    """Two nodes and a server with some dongles. keys: the devices, in order of bus id."""

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
        """The node's own clock, at real time until a test hurries it."""
        return self._clocks[node.name]


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


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
    """Both agents with all devices offered, each with its own node's token. through: letter -> another address of the
    API server. store: what the Leases are reached by.

    node_api: the agents also have the API server for Node status, evictions and with pods for their pods. events: what
    they notice is recorded there. environ: for tracing. Node names are new each time.
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
        recorders = {
            name: EventRecorder(clients[name], NodeIdentity(name, "boot"), SystemClock(), random.Random(name))
            for name in names
            if events
        }
        for recorder in recorders.values():
            stack.push_async_callback(_ended, asyncio.create_task(recorder.run()))

        def observer(node: str) -> MetricHooks:
            def noticed(notice: DeviceEvent) -> None:
                for text, pod in events_of(notice):
                    recorders[node].record(text, pod)

            return MetricHooks(on_notice=noticed) if events else MetricHooks()

        setup = Setup(
            config=Config((ResourceConfig(RESOURCE, (selector,), on_loss=on_loss),)),
            clock=SystemClock(),
            make_clock=clocks.__getitem__,
            make_tracer=lambda node: tracings[node].tracer,
            make_leases=lambda node: store(clients[node], NAMESPACE),
            make_kube=(lambda node: clients[node]) if node_api else None,
            make_observer=observer,
            kube_has_pods=pods,
        )
        world = await stack.enter_async_context(running(directory, names, setup))
        keys = [DeviceKey(server.key, f"1-{i + 1}") for i in range(devices)]
        rig = Rig(world, server, keys, spans, clocks)
        await rig.connect(stack)
        yield rig
