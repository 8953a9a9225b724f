"""`usbip-plugin run` as a process, with a kubelet's sockets, a USB/IP server and, if wanted, a simulated kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import grpc
import grpc.aio

from tests.apiserver.command_line import PLUGIN
from tests.apiserver.node_tokens import NAMESPACE
from tests.apiserver.objects import POLL_S, configuration, delete_pod, make_pod
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.model import DeviceKey, PodRef, UsbId
from usbip_sim.kubelet.device_manager import AdmissionError
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

PATIENCE_S = 20.0
"""Seconds for an event that must come; less than the hour for which a process must not wait at its end."""
MOST_END = 5
"""Core-seconds from SIGTERM to the exit, divided by those of a bare interpreter; 1 was measured."""
NODE = "node-p"
RESOURCE = "usbip.dev/stick"
STICK = UsbId(0x0951, 0x1666)
BUSID = "1-1"
BOOTED = """
import sys
from usbip_plugin.cli.main import main
from usbip_plugin.node import daemon
boot_id = sys.argv.pop(1)
daemon.boot_id = lambda: boot_id
sys.exit(main())
"""
"""The plugin as a program that takes the kernel's boot id as its first argument: another machine."""


@dataclass
class PluginProcess:
    """A plugin process on NODE with its kubelet, its configuration file and its HTTP address."""

    process: Process
    kubelet: FakeKubelet
    config: Path
    address: str
    device: DeviceKey
    log: list[str] = field(default_factory=list)
    """The lines of the log that have been read."""

    async def offered(self) -> None:
        """Waits until the kubelet has the device, Healthy."""
        async with asyncio.timeout(PATIENCE_S):
            await self.kubelet.wait_for(RESOURCE, lambda devices: devices.get(self.device.id) is True)

    async def admit(self, admin: KubeClient) -> PodRef:
        """Returns a new pod that has the device, once the plugin knows the pod: otherwise a release takes 15 s."""
        pod = await make_pod(admin, NODE, limits={RESOURCE: "1"})
        await self.kubelet.admit(pod, {RESOURCE: 1})
        async with asyncio.timeout(PATIENCE_S):
            while str(pod) not in (await self.get("/api/devices"))[1]:  # noqa: ASYNC110 - another process
                await asyncio.sleep(POLL_S)
        return pod

    async def allocate(self, pod: PodRef) -> str:
        """Admits a pod with the device. Returns the kubelet's or the plugin's error, "" if the pod has the device."""
        try:
            await self.kubelet.admit(pod, {RESOURCE: 1})
        except AdmissionError as error:
            return str(error)
        return ""

    async def allocate_past_the_kubelet(self) -> str:
        """Calls Allocate as a kubelet with an old list does. Returns the plugin's error, "" if there is none."""
        (socket,) = self.kubelet.directory.glob("usbip-*.sock")
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[self.device.id])])
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            try:
                await DevicePluginStub(channel).Allocate(request, timeout=PATIENCE_S)
            except grpc.aio.AioRpcError as error:
                return error.details() or ""
        return ""

    async def end_pod(self, admin: KubeClient, pod: PodRef) -> None:
        self.kubelet.end(pod)
        await delete_pod(admin, pod)

    async def get(self, path: str) -> tuple[int, str]:
        def request() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(self.address + path, timeout=PATIENCE_S) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(request)

    async def line(self, text: str) -> str:
        """Reads the log until a line contains this text, and returns the line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self.log.append((await self.process.stdout.readline()).decode())
                if text in self.log[-1]:
                    return self.log[-1]
                assert not self.process.stdout.at_eof(), f"the log ended without {text!r}"

    async def end(self) -> None:
        """Ends the process with SIGTERM. It must exit with 0 within PATIENCE_S and MOST_END."""
        before, used = children_cpu_s(), cpu_s(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await self.process.wait() == 0
        took = children_cpu_s() - before - used
        bare = await bare_interpreter_cpu_s()
        print(f"SIGTERM to exit: {took * 1e3:.0f} ms of processor time, a bare interpreter {bare * 1e3:.0f}")
        assert took < MOST_END * bare


def children_cpu_s() -> float:
    """Returns the core-seconds of all children that have ended and been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_s(pid: int) -> float:
    """Returns the core-seconds of a running process, those of ended threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def bare_interpreter_cpu_s() -> float:
    """Returns the core-seconds of a Python that does nothing."""
    before = children_cpu_s()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    assert await process.wait() == 0
    return children_cpu_s() - before


@contextlib.asynccontextmanager
async def kernel(socket: Path) -> AsyncIterator[str]:
    """Yields the socket of a process that simulates vhci_hcd."""
    process = await asyncio.create_subprocess_exec(*PLUGIN, "simulate", "kernel", "--socket", str(socket), stdout=PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert b"simulated kernel" in await process.stdout.readline()
        yield str(socket)
    finally:
        process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def usbip_server() -> AsyncIterator[VirtualServer]:
    """Yields a USB/IP server with one STICK."""
    server = VirtualServer([VirtualDevice(BUSID, STICK, configured=True)])
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def plugin(
    kubeconfig: str,
    port: int,
    *flags: str,
    simulated: bool = False,
    server: VirtualServer | None = None,
    boot_id: str | None = None,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[PluginProcess]:
    """Yields a plugin on NODE with its HTTP port.

    flags: more flags.
    simulated: with a simulated vhci_hcd.
    server: with the STICK; None for one of its own.
    boot_id: of the plugin's machine; None for that of this machine.
    environ: more variables.
    """
    with tempfile.TemporaryDirectory(prefix="usbip-") as name:
        home = Path(name)
        (home / "plugins").mkdir()
        config = home / "config.yaml"
        async with contextlib.AsyncExitStack() as stack:
            if server is None:
                server = await stack.enter_async_context(usbip_server())
            selector = {"vendor": f"{STICK.vendor:04x}", "product": f"{STICK.product:04x}"}
            config.write_text(configuration(stick=[(server.key, selector)]))
            kubelet = await stack.enter_async_context(FakeKubelet(home / "plugins", home / "pods.sock"))
            if simulated:
                flags += ("--simulated-kernel", await stack.enter_async_context(kernel(home / "kernel.sock")))
            process = await asyncio.create_subprocess_exec(
                *(PLUGIN if boot_id is None else (sys.executable, "-c", BOOTED, boot_id)),
                "run",
                *("--kubeconfig", kubeconfig, "--namespace", NAMESPACE, "--node-name", NODE),
                *("--config", str(config), "--plugin-directory", str(home / "plugins")),
                *("--pod-resources-socket", str(home / "pods.sock"), "--listen", f"127.0.0.1:{port}"),
                *flags,
                stdin=DEVNULL,
                stdout=PIPE,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environ),
            )
            try:
                device = DeviceKey(server.key, BUSID)
                yield PluginProcess(process, kubelet, config, f"http://127.0.0.1:{port}", device)
            finally:
                if process.returncode is None:
                    process.kill()
                await process.communicate()
