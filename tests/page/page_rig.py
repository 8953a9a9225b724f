"""Two simulated nodes in one process, with the real HTTP server for one of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from unittest import mock

import grpc
import grpc.aio

from usbip_plugin import __version__
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import ConfigError, ServerUnreachable
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.model import DeviceKey, Endpoint, PodRef, Reason, ServerKey, UsbId
from usbip_plugin.node.status import config_failed, config_loaded, status_of
from usbip_plugin.observe.http import HttpServer
from usbip_plugin.observe.liveness import Verdict
from usbip_plugin.observe.metrics import Metrics
from usbip_plugin.observe.pages import Site, probe_pages
from usbip_plugin.observe.status import NodeReport
from usbip_plugin.observe.tracing import RecentSpans, Tracing
from usbip_plugin.sync import Steps
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.usbip.connect import Connector, Source
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.world import Setup, SimNode, World, running

PATIENCE_S = 30.0
DONGLE, PROBE, SCANNER, CAMERA = (
    UsbId(*ids) for ids in ((0x0951, 0x1666), (0x0483, 0x374B), (0x05E0, 0x1200), (0x046D, 0x082D))
)
LAB, ATTIC = ServerKey("lab-pi.example", 3240), ServerKey("attic.example", 3240)


class NamingConnector:
    """A connector that reaches virtual servers by names of its own."""

    def __init__(self, real: Mapping[ServerKey, VirtualServer]) -> None:
        self._real = real
        self._connector = Connector()

    async def connect(self, server: ServerKey) -> socket.socket:
        try:
            return await self._connector.connect(self._real[server].key)
        except ServerUnreachable as error:
            raise ServerUnreachable(server, str(error).partition(": ")[2]) from error

    async def bind(self, server: ServerKey, last: Endpoint | None = None) -> Source:
        return await self._connector.bind(self._real[server].key, last)

    async def end_half_open(self, server: ServerKey, source: Endpoint) -> bool:
        return await self._connector.end_half_open(self._real[server].key, source)

    def close(self) -> None:
        self._connector.close()


class Watched:
    """The status page of node-a, and changes of its nodes and servers. url: of the page."""

    def __init__(self, world: World, servers: Mapping[ServerKey, VirtualServer], recent: RecentSpans) -> None:
        self.world, self.servers, self.recent = world, servers, recent
        self.a, self.b = world["node-a"], world["node-b"]
        self.url = ""
        self.config = config_loaded(Path("/etc/usbip-device-plugin/config.yaml"), CONFIG, (), SystemClock().now())
        self._clock = SystemClock()
        self._started = self._clock.monotonic()
        self.poison: list[NodeReport] = []
        """The last item is shown instead of the node's status."""

    def status(self) -> Steps[NodeReport]:
        if self.poison:
            return self.poison[-1]
        agent = self.a.agent
        assert agent is not None
        return (
            yield from status_of(
                agent,
                node="node-a",
                domain="usbip.dev",
                clock=self._clock,
                started=self._started,
                config=self.config,
                ready=Verdict(ok=agent.ready),
                alive=Verdict(ok=True),
            )
        )

    def break_config(self) -> None:
        problem = "config.yaml:12: resources.storage[0].selector.vendor: 1666 without quotes is ambiguous"
        self.config = config_failed(self.config, ConfigError("config.yaml", [problem]), self._clock.now())

    async def known(self, node: SimNode, key: DeviceKey, *reasons: Reason) -> None:
        """Waits until the device has one of these reasons on the node."""

        def known() -> bool:
            health = node.agent.inventory.health().get(key.id) if node.agent is not None else None
            return health is not None and health.reason in reasons

        async with asyncio.timeout(PATIENCE_S):
            await node.advertised.until(known)

    @staticmethod
    def claimed(node: SimNode, *keys: DeviceKey) -> DeviceKey:
        """Returns the device among these that the node has attached."""
        assert node.agent is not None
        return next(key for key in keys if key.id in node.agent.claims.view)

    async def denied(self, node: SimNode, resource: str, key: DeviceKey) -> str:
        """Returns the error of an Allocate, sent like a kubelet that does not know yet that the device is held."""
        (path,) = node.plugin_directory.glob(f"usbip-{resource}*.sock")
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
            request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[key.id])])
            try:
                await DevicePluginStub(channel).Allocate(request, timeout=PATIENCE_S)
            except grpc.aio.AioRpcError as error:
                return error.details() or ""
        return ""


def _entry(server: ServerKey, ids: UsbId) -> DeviceSelector:
    return DeviceSelector(server, Selector(vendor=ids.vendor, product=ids.product))


CONFIG = Config(
    (
        ResourceConfig("camera", (_entry(ATTIC, CAMERA),)),
        ResourceConfig("debug-probe", (_entry(LAB, PROBE),)),
        ResourceConfig("licence-dongle", (_entry(LAB, DONGLE),)),
        ResourceConfig("scanner", (_entry(LAB, SCANNER),)),
    )
)
DONGLE_1, PROBE_1, PROBE_2, SCANNER_1 = (DeviceKey(LAB, busid) for busid in ("1-1.2", "1-1.3", "1-1.4", "2-1"))
CAMERA_1, CAMERA_2 = DeviceKey(ATTIC, "3-1"), DeviceKey(ATTIC, "3-2")


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    """Yields two nodes that offer every device, none of which has been used."""
    servers = {
        LAB: VirtualServer(
            [
                VirtualDevice(DONGLE_1.busid, DONGLE, serial="LICENCE-0001", configured=True),
                VirtualDevice(PROBE_1.busid, PROBE, serial="066AFF", configured=True),
                VirtualDevice(PROBE_2.busid, PROBE, serial="066B01", configured=True),
                VirtualDevice(SCANNER_1.busid, SCANNER, configured=True),
            ]
        ),
        ATTIC: VirtualServer([VirtualDevice(key.busid, CAMERA, configured=True) for key in (CAMERA_1, CAMERA_2)]),
    }

    def client(clock: Clock) -> TcpUsbipClient:
        return TcpUsbipClient(clock, NamingConnector(servers))

    recent = RecentSpans()
    tracings = {name: Tracing(name, version=__version__, environ={}, recent=recent) for name in ("node-a", "node-b")}
    setup = Setup(config=CONFIG, clock=SystemClock(), make_tracer=lambda node: tracings[node].tracer)
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        stack.enter_context(mock.patch("usbip_sim.world.TcpUsbipClient", client))
        for server in servers.values():
            await server.start()
            stack.push_async_callback(server.stop)
        for tracing in tracings.values():
            stack.callback(tracing.shutdown)
        world = await stack.enter_async_context(running(directory, ("node-a", "node-b"), setup))
        rig = Watched(world, servers, recent)
        for node in (rig.a, rig.b):
            for key in (DONGLE_1, PROBE_1, PROBE_2, SCANNER_1, CAMERA_1, CAMERA_2):
                await rig.known(node, key, Reason.FREE)
            for resource in CONFIG.resources:
                await node.until(resource.name, lambda devices: bool(devices) and all(devices.values()))
        site = Site(rig.status, Metrics().render, recent, setup.clock)
        pages = probe_pages(alive=lambda: Verdict(ok=True), ready=lambda: Verdict(ok=True))
        http = HttpServer("127.0.0.1:0", {**pages, **site.pages()}, setup.clock, below=site.below())
        serving = asyncio.create_task(http.run())
        await http.started.wait()
        rig.url = f"http://127.0.0.1:{http.port}/"
        try:
            yield rig
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving


async def busy_day(rig: Watched) -> None:
    """Leads the devices into every state: in use here and elsewhere, denied, lost, with an unreachable server."""
    await rig.a.admit(PodRef("default", "simulation-0"), {"licence-dongle": 1})
    await rig.known(rig.b, DONGLE_1, Reason.HELD_ELSEWHERE)
    await rig.denied(rig.b, "licence-dongle", DONGLE_1)
    await rig.b.admit(PodRef("ci", "flash-firmware-7"), {"debug-probe": 1})
    await rig.known(rig.a, rig.claimed(rig.b, PROBE_1, PROBE_2), Reason.HELD_ELSEWHERE)
    await rig.a.admit(PodRef("default", "doorbell-5c9f"), {"camera": 1})
    camera = rig.claimed(rig.a, CAMERA_1, CAMERA_2)
    scan = PodRef("office", "scan-inbox-28814")
    await rig.a.admit(scan, {"scanner": 1})
    await rig.known(rig.a, SCANNER_1, Reason.ATTACHED)
    rig.a.end(scan)
    await rig.known(rig.a, SCANNER_1, Reason.FREE)
    await rig.servers[ATTIC].stop()
    await rig.known(rig.a, camera, Reason.LOST)
    await rig.known(rig.a, CAMERA_1 if camera == CAMERA_2 else CAMERA_2, Reason.SERVER_UNREACHABLE)
