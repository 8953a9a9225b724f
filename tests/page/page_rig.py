"""Two simulated nodes in one process, with the real HTTP server for one of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from unittest import mock

from tests.rigs.api_double import ApiDouble
from tests.rigs.outdated_kubelet import allocate_error
from usbip_plugin import __version__
from usbip_plugin.attach.events import DeviceEvent, events_of
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import ConfigError, ServerUnreachable
from usbip_plugin.kube.events import EventRecorder
from usbip_plugin.model import Descriptor, DeviceKey, Endpoint, Hold, NodeIdentity, PodRef, Reason, ServerKey, UsbId
from usbip_plugin.node.agent import Agent, MetricHooks
from usbip_plugin.node.cluster import cluster_of
from usbip_plugin.node.products import Products
from usbip_plugin.node.status import config_failed, config_loaded, report_of, status_of
from usbip_plugin.observe.http import MAX_CONNECTIONS, HttpServer
from usbip_plugin.observe.liveness import Verdict
from usbip_plugin.observe.metrics import Metrics
from usbip_plugin.observe.pages import Site, probe_pages
from usbip_plugin.observe.status import ClusterReport, NodeReport, Report
from usbip_plugin.observe.tracing import RecentSpans, Tracing
from usbip_plugin.sync import Steps
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.usbip.connect import Connector, Source
from usbip_sim.kernel.driver import SimulatedVhci
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

    def __init__(
        self, world: World, servers: Mapping[ServerKey, VirtualServer], recent: RecentSpans, events: EventRecorder
    ) -> None:
        self.world, self.servers, self.recent = world, servers, recent
        self.a, self.b = world["node-a"], world["node-b"]
        self.url = ""
        self.events = events
        assert self.a.agent is not None
        self._products = Products(self.a.agent.claims)
        self.config = config_loaded(Path("/etc/usbip-device-plugin/config.yaml"), CONFIG, (), SystemClock().now())
        self._clock = SystemClock()
        self._started = self._clock.monotonic()
        self.poison: list[NodeReport] = []
        """The last item is shown instead of the node's status."""
        self.poisoned_cluster: list[ClusterReport] = []

    def status(self) -> Steps[NodeReport]:
        if self.poison:
            return self.poison[-1]
        agent = self.a.agent
        assert agent is not None
        return (
            yield from status_of(
                agent,
                self._report(agent),
                domain="usbip.dev",
                now=self._clock.now(),
                monotonic=self._clock.monotonic(),
                config=self.config,
                products=self._products,
                events=tuple(self.events.recent),
            )
        )

    def cluster(self) -> Steps[ClusterReport]:
        agent = self.a.agent
        assert agent is not None
        report = yield from cluster_of(
            agent,
            self._report(agent),
            domain="usbip.dev",
            now=self._clock.now(),
            monotonic=self._clock.monotonic(),
            products=self._products,
            port=13240,
        )
        return self.poisoned_cluster[-1] if self.poisoned_cluster else report

    def _report(self, agent: Agent) -> Report:
        return report_of(
            node="node-a",
            clock=self._clock,
            started=self._started,
            ready=Verdict(ok=agent.ready),
            alive=Verdict(ok=True),
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
        return await allocate_error(node.plugin_directory, resource, key.id, PATIENCE_S)


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
DEVICES = {
    key: VirtualDevice(key.busid, usb_id, serial, product, maker, configured=True)
    for key, usb_id, maker, product, serial in (
        (DONGLE_1, DONGLE, "Kingston", "DataTraveler", "LICENCE-0001"),
        (PROBE_1, PROBE, "STMicroelectronics", "ST-LINK/V2.1", "066AFF"),
        (PROBE_2, PROBE, "STMicroelectronics", "ST-LINK/V2.1", "066B01"),
        (SCANNER_1, SCANNER, "Symbol", "Bar Code Scanner", ""),
        (CAMERA_1, CAMERA, "Logitech", "HD Pro Webcam C920", ""),
        (CAMERA_2, CAMERA, "Logitech", "HD Pro Webcam C920", ""),
    )
}


class IdentifyingVhci(SimulatedVhci):
    """A driver that knows the strings of the devices."""

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...] = ()) -> int:
        port = await super().attach(key, descriptor, fd, holds)
        occupant, device = self._kernel.occupant(port), DEVICES[key]
        assert occupant is not None
        occupant.manufacturer, occupant.model, occupant.serial = device.manufacturer, device.product, device.serial
        return port


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    """Yields two nodes that offer every device, none of which has been used."""
    servers = {
        server: VirtualServer([device for key, device in DEVICES.items() if key.server == server])
        for server in (LAB, ATTIC)
    }

    def client(clock: Clock) -> TcpUsbipClient:
        return TcpUsbipClient(clock, NamingConnector(servers))

    recent = RecentSpans()
    tracings = {name: Tracing(name, version=__version__, environ={}, recent=recent) for name in ("node-a", "node-b")}
    clock = SystemClock()
    events = EventRecorder(ApiDouble(), NodeIdentity("node-a", "boot"), clock, random.Random(0))

    def record(notice: DeviceEvent) -> None:
        for text, pod in events_of(notice):
            events.record(text, pod)

    setup = Setup(
        config=CONFIG,
        clock=clock,
        make_tracer=lambda node: tracings[node].tracer,
        make_driver=lambda node, kernel: IdentifyingVhci(kernel, node),
        make_observer=lambda node: MetricHooks(on_notice=record) if node == "node-a" else MetricHooks(),
    )
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        stack.enter_context(mock.patch("usbip_sim.world.TcpUsbipClient", client))
        # the tabs of a test are one peer
        stack.enter_context(mock.patch("usbip_plugin.observe.http.MAX_PER_PEER", MAX_CONNECTIONS))
        for server in servers.values():
            await server.start()
            stack.push_async_callback(server.stop)
        for tracing in tracings.values():
            stack.callback(tracing.shutdown)
        world = await stack.enter_async_context(running(directory, ("node-a", "node-b"), setup))
        rig = Watched(world, servers, recent, events)
        for node in (rig.a, rig.b):
            for key in (DONGLE_1, PROBE_1, PROBE_2, SCANNER_1, CAMERA_1, CAMERA_2):
                await rig.known(node, key, Reason.FREE)
            for resource in CONFIG.resources:
                await node.until(resource.name, lambda devices: bool(devices) and all(devices.values()))
        site = Site(rig.status, rig.cluster, Metrics().render, recent, setup.clock)
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
