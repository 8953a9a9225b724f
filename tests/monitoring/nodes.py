"""Two nodes whose plugins are processes, a USB/IP server, an exporter and a Prometheus that scrapes them all.

The API server is a fake over HTTPS; kernels and kubelets are simulated behind unix sockets; the server is virtual.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tests.monitoring.prometheus import Monitoring, Prometheus, watching
from tests.rigs.command_rig import LIMIT_S
from tests.rigs.fake_api import CERTIFICATE, NAMESPACE, TOKEN, FakeApi, serving
from tests.rigs.kubeconfig import kubeconfig
from tests.rigs.tcp_proxy import Proxy, proxy_to
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.export import parse_export
from usbip_plugin.config.reload import load
from usbip_plugin.exporter import daemon
from usbip_plugin.model import DeviceKey, PodRef, ServerKey, UsbId
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kernel.service import KernelService
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.host import SimulatedHost
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

LAB = "lab.test"
"""Name of the USB/IP server, which is another address for each node."""
STICK, METER = UsbId(0x0951, 0x1666), UsbId(0x10C4, 0xEA60)
STICKS, METER_AT = ("1-1", "1-2"), "2-1"
EXPORT = "export: [{vendor: '0951'}]\nfence: true\n"
HOSTS = """
import socket
real = socket.getaddrinfo
socket.getaddrinfo = lambda host, *more, **named: real({address!r} if host == "lab.test." else host, *more, **named)
"""
"""The node's name server, as a sitecustomize.py of its plugin."""


@dataclass
class Simulated:
    """A task of the test that stands for a process."""

    task: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@dataclass
class PluginNode:
    """A node for `usbip-plugin run`.

    api: its way to the API server. way: its way to the USB/IP server. page: the port of its pages.
    """

    name: str
    home: Path
    page: int
    server: ServerKey
    api: Proxy
    way: Proxy
    address: str
    kubelet: FakeKubelet
    environ: Mapping[str, str] = field(default_factory=dict)
    kernel: SimulatedKernel = field(default_factory=lambda: SimulatedKernel(SystemClock()))
    process: Process | None = None
    _kernel: Simulated = field(default_factory=Simulated)

    def device(self, busid: str) -> DeviceKey:
        return DeviceKey(self.server, busid)

    def configure(self, allocate_timeout: str = "60s") -> None:
        """Writes a configuration with sticks by their model, and a meter by its bus ID."""
        target = f"target: {{host: {LAB}, port: {self.server.port}}}"
        (self.home / "config.yaml").write_text(
            f"allocateTimeout: {allocate_timeout}\n"
            "lock: {duration: 21s}\n"
            "resources:\n"
            f'  stick: [{{{target}, selector: {{vendor: "{STICK.vendor:04x}"}}}}]\n'
            f'  meter: [{{{target}, selector: {{bus_id: "{METER_AT}"}}}}]\n'
        )

    def break_config(self) -> None:
        (self.home / "config.yaml").write_text("resources: 1\n")

    async def start_kernel(self) -> None:
        listening = asyncio.Event()
        service = KernelService(self.kernel, self.home / "kernel.sock", identify=True)
        self._kernel.task = asyncio.create_task(service.run(listening=listening.set))
        await listening.wait()

    async def stop_kernel(self) -> None:
        await self._kernel.stop()

    async def start(self) -> None:
        """Starts the plugin."""
        (self.home / "sitecustomize.py").write_text(HOSTS.format(address=self.address))
        path = os.pathsep.join(filter(None, (str(self.home), os.environ.get("PYTHONPATH"))))
        with (self.home / "log").open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "usbip_plugin", "run", "--node-name", self.name, "--namespace", NAMESPACE),
                *("--kubeconfig", str(self.home / "kubeconfig"), "--config", str(self.home / "config.yaml")),
                *("--plugin-directory", str(self.home / "plugins"), "--cdi-directory", str(self.home / "cdi")),
                *("--pod-resources-socket", str(self.home / "pods.sock")),
                *("--simulated-kernel", str(self.home / "kernel.sock"), "--listen", f"127.0.0.1:{self.page}"),
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environ, "PYTHONPATH": path},
            )

    async def stop(self) -> None:
        """Ends the plugin with SIGTERM. Its attachments stay."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(LIMIT_S):
                await process.wait()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def offers(self, resource: str, busid: str, *, healthy: bool = True) -> None:
        """Waits until the kubelet has a device as healthy or unhealthy."""
        async with asyncio.timeout(LIMIT_S):
            await self.kubelet.wait_for(
                f"usbip.dev/{resource}", lambda devices: devices.get(self.device(busid).id) is healthy
            )


class WatchedExporter:
    """`usbip-plugin export` with its fence, in the test process, on a simulated host."""

    def __init__(self, home: Path, api: Proxy, usbip: int, page: int) -> None:
        self.home, self.api, self.page = home, api, page
        self.server = ServerKey("127.0.0.1", usbip)
        self.host = SimulatedHost([VirtualDevice("1-1", STICK)], SystemClock(), reset_time=0.0)
        self._process = Simulated()

    def configure(self, text: str = EXPORT) -> None:
        (self.home / "export.yaml").write_text(text)

    def start(self) -> None:
        options = daemon.Options(
            config=self.home / "export.yaml",
            listen=f"127.0.0.1:{self.server.port}",
            http=f"127.0.0.1:{self.page}",
            namespace=NAMESPACE,
            kubeconfig=str(self.home / "kubeconfig"),
            sysfs=self.home,
            state_directory=self.home,
            after_start=lambda: None,
        )
        self._process.task = asyncio.create_task(daemon.run(options, load(options.config, parse_export)))

    async def stop(self) -> None:
        await self._process.stop()


@dataclass
class Fleet:
    """Everything that Prometheus watches, running."""

    a: PluginNode
    b: PluginNode
    exporter: WatchedExporter
    api: FakeApi
    server: VirtualServer
    prometheus: Prometheus

    async def admit(self, node: PluginNode, pod: str, resource: str = "stick") -> None:
        """Runs a pod that has one device. Waits until Prometheus sees the device as attached."""
        made = {
            "metadata": {"namespace": "default", "name": pod, "uid": f"uid-of-{pod}"},
            "spec": {
                "nodeName": node.name,
                "containers": [{"name": "app", "resources": {"limits": {f"usbip.dev/{resource}": "1"}}}],
            },
            "status": {"phase": "Running"},
        }
        self.api.put(f"/api/v1/namespaces/default/pods/{pod}", made)
        await node.kubelet.admit(PodRef("default", pod, f"uid-of-{pod}"), {f"usbip.dev/{resource}": 1})
        selector = f'node="{node.name}", resource="usbip.dev/{resource}"'
        await self.prometheus.until(f"usbip_device_plugin_attached_devices{{{selector}}} > 0")


@contextlib.asynccontextmanager
async def plugin_node(
    name: str, home: Path, api_port: int, server_port: int, address: str, page: int
) -> AsyncIterator[PluginNode]:
    """Yields a node whose plugin has not been started. address: of this machine, the node's for the USB/IP server."""
    (home / "plugins").mkdir(parents=True)
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(api_proxy(home, api_port))
        way = await stack.enter_async_context(proxy_to(server_port, address, server_port))
        kubelet = await stack.enter_async_context(FakeKubelet(home / "plugins", home / "pods.sock"))
        node = PluginNode(name, home, page, ServerKey(LAB, server_port), api, way, address, kubelet)
        node.configure()
        stack.push_async_callback(node.stop_kernel)
        stack.push_async_callback(node.stop)
        await node.start_kernel()
        yield node


@contextlib.asynccontextmanager
async def api_proxy(home: Path, port: int) -> AsyncIterator[Proxy]:
    """Yields a way of its own to the API server. Writes a kubeconfig for it in the directory."""
    async with proxy_to(port) as proxy:
        address = f"https://127.0.0.1:{proxy.port}"
        (home / "kubeconfig").write_text(kubeconfig(address, TOKEN, authority=CERTIFICATE))
        yield proxy


@contextlib.asynccontextmanager
async def watched_exporter(home: Path, api_port: int, usbip: int, page: int) -> AsyncIterator[WatchedExporter]:
    """Yields an exporter that has not been started."""
    async with api_proxy(home, api_port) as api:
        exporter = WatchedExporter(home, api, usbip, page)
        exporter.configure()
        loop = asyncio.get_running_loop()
        with (
            mock.patch.object(daemon, "make_host", return_value=exporter.host),
            mock.patch.object(loop, "add_signal_handler"),  # signals are for the whole process
        ):
            try:
                yield exporter
            finally:
                await exporter.stop()
                exporter.host.close()


@contextlib.asynccontextmanager
async def watched(
    monitoring: Monitoring,
    free_port: Callable[[], int],
    environ: Mapping[str, str] | None = None,
    port: int = 0,
) -> AsyncIterator[Fleet]:
    """Yields two nodes that offer two sticks and a meter, an exporter, and a Prometheus without an active alert.

    environ: of the plugin on node-a. port: of Prometheus, 0 for any.
    """
    async with contextlib.AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))  # socket paths end at 107 bytes
        api = await stack.enter_async_context(serving())
        sticks = [VirtualDevice(busid, STICK, configured=True) for busid in STICKS]
        server = VirtualServer([*sticks, VirtualDevice(METER_AT, METER, configured=True)], port=free_port())
        await server.start()
        stack.push_async_callback(server.stop)
        a, b = [
            await stack.enter_async_context(
                plugin_node(name, home / name, api.port, server.key.port, address, free_port())
            )
            for name, address in (("node-a", "127.0.0.2"), ("node-b", "127.0.0.3"))
        ]
        a.environ = environ or {}
        exporter = await stack.enter_async_context(watched_exporter(home, api.port, free_port(), free_port()))
        targets = {
            "usbip-plugin": {node.name: f"127.0.0.1:{node.page}" for node in (a, b)},
            "usbip-exporter": {"pi": f"127.0.0.1:{exporter.page}"},
        }
        prometheus = await stack.enter_async_context(watching(monitoring, home, port or free_port(), targets))
        await asyncio.gather(a.start(), b.start())
        exporter.start()
        for node in (a, b):
            await node.offers("meter", METER_AT)
            for busid in STICKS:
                await node.offers("stick", busid)
        await prometheus.until("up", holds=lambda found: [series.value for series in found] == [1, 1, 1])
        await prometheus.is_quiet()
        yield Fleet(a, b, exporter, api, server, prometheus)
