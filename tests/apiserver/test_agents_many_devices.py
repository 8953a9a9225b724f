"""One plugin with 500 devices: the process as in its pod, a kubelet's sockets, a real API server, five servers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.trace import NoOpTracer

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.rigs.agents_rig import DONGLE
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_in_pod import STRIPPED, InPod, cpu_ms, memory_mib, settled
from usbip_plugin.clock import SystemClock
from usbip_plugin.kube.client import KubeClient, connect
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.model import DeviceKey, NodeIdentity
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

pytestmark = pytest.mark.short

SERVERS, EACH = 5, 100
RESOURCE = "usbip.dev/many"
LIMIT_MIB = 64
"""Of the DaemonSet."""
MOST_OWN_MIB = 10.0
"""Not from files, besides what the imports alone take; it was 6.7 of 37.1."""
MESSAGE_BYTES = 4 * 2**20
"""What the kubelet's gRPC client takes."""
PATIENCE_S = 90.0
AT_ONCE = 8
CONTROLLERS, PER_HUB = 8, 15


def make_platform(directory: Path) -> Path:
    """vhci_hcd as Debian's kernel has it, with no port in use."""
    base = directory / "platform" / "vhci_hcd.0"
    base.mkdir(parents=True)
    (base / "nports").write_text(f"{CONTROLLERS * 2 * PER_HUB}\n")
    for name in ("attach", "detach"):
        (base / name).write_text("")
    number = 0
    for controller in range(CONTROLLERS):
        lines = ["hub port sta spd dev      sockfd local_busid"]
        for hub in ("hs", "ss"):
            for _ in range(PER_HUB):
                lines.append(f"{hub}  {number:04d} 004 000 00000000 000000 0-0")
                number += 1
        (base / (f"status.{controller}" if controller else "status")).write_text("\n".join(lines) + "\n")
    return base.parent


def config_of(servers: list[VirtualServer]) -> str:
    selector = f'{{vendor: "{DONGLE.vendor:04x}", product: "{DONGLE.product:04x}"}}'
    lines = ["resources:", "  many:"]
    for server in servers:
        lines += [f"    - target: {{host: 127.0.0.1, port: {server.key.port}}}", f"      selector: {selector}"]
    return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def other_node(cluster: Cluster, token: str, name: str) -> AsyncIterator[LockManager]:
    client = await connect(cluster.kubeconfig(token))
    me, store = NodeIdentity(name, "boot"), KubernetesLeases(client, NAMESPACE)
    manager = LockManager(store, me, SystemClock(), random.Random(name), LockSettings(), NoOpTracer())
    running = asyncio.create_task(manager.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await manager.ready.wait()
        yield manager
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()


async def for_each(keys: list[DeviceKey], manager: LockManager, *, lock: bool) -> None:
    """AT_ONCE of them at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(key: DeviceKey) -> None:
        async with room:
            if lock:
                await manager.acquire(key)
            else:
                await manager.release(key)

    async with asyncio.TaskGroup() as group:
        for key in keys:
            group.create_task(one(key))


class Measured:
    """Waits for the kubelet to have all devices so, and notes what that cost."""

    def __init__(self, kubelet: FakeKubelet, keys: list[DeviceKey], pid: int) -> None:
        self._kubelet, self._ids, self._pid = kubelet, [key.id for key in keys], pid
        self._at, self._cpu, self._messages = time.monotonic(), cpu_ms(pid), 0

    async def until(self, what: str, *, healthy: bool) -> None:
        wanted = dict.fromkeys(self._ids, healthy)
        async with asyncio.timeout(PATIENCE_S):
            await self._kubelet.wait_for(RESOURCE, wanted.__eq__)
        now, cpu, messages = time.monotonic(), cpu_ms(self._pid), len(self._kubelet.seen.lists)
        print(
            f"{what}: {now - self._at:.1f} s, processor {cpu - self._cpu:.0f} ms, {messages - self._messages} lists, "
            f"RSS {memory_mib(self._pid):.1f} MiB"
        )
        self._at, self._cpu, self._messages = now, cpu, messages


async def test_500_devices_follow_servers_and_locks_within_the_memory_of_the_daemonset(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    node = f"n{uuid.uuid4().hex[:6]}-many"
    await admin.request(
        "create",
        "/api/v1/nodes",
        resource="nodes",
        body={"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}},
    )
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        pod = InPod(directory, cluster, await tokens.of(node), node, make_platform(directory))
        if not pod.allowed:
            pytest.skip("makes mounts, which needs root")
        servers = []
        for _ in range(SERVERS):
            devices = [VirtualDevice(f"1-{n + 1}", DONGLE, serial=f"S{n}", configured=True) for n in range(EACH)]
            servers.append(VirtualServer(devices, reset_time=0))
            await servers[-1].start()
            stack.push_async_callback(servers[-1].stop)
        keys = [DeviceKey(server.key, f"1-{n + 1}") for server in servers for n in range(EACH)]
        pod.config.write_text(config_of(servers), encoding="utf-8")
        log = stack.enter_context((directory / "log").open("wb"))
        kubelet = await stack.enter_async_context(FakeKubelet(pod.plugins, pod.pod_resources))
        with pod.process(STRIPPED, log.fileno()):  # compiles the bytecode
            async with asyncio.timeout(PATIENCE_S):
                await kubelet.wait_for(RESOURCE, lambda devices: len(devices) == len(keys) and all(devices.values()))
        async with asyncio.timeout(PATIENCE_S):
            await kubelet.changed.until(lambda: not kubelet.connected(RESOURCE))
        log = stack.enter_context((directory / "second.log").open("wb"))
        child = stack.enter_context(pod.process(STRIPPED, log.fileno(), ("--log-level", "debug")))
        measured = Measured(kubelet, keys, child.pid)
        await measured.until("500 devices registered", healthy=True)
        listed = pb.ListAndWatchResponse(devices=[pb.Device(ID=key.id, health="Unhealthy") for key in keys])
        assert listed.ByteSize() < MESSAGE_BYTES / 100

        for server in servers:
            await server.stop()
        await measured.until("their servers gone", healthy=False)
        for server in servers:
            await server.start()
        await measured.until("and back", healthy=True)

        await settled(directory / "second.log")
        other = await stack.enter_async_context(other_node(cluster, await tokens.of(f"{node}-other"), f"{node}-other"))
        await for_each(keys, other, lock=True)
        await measured.until("500 locked by another node", healthy=False)
        await for_each(keys, other, lock=False)
        await measured.until("and released", healthy=True)

        own, bare, peak = memory_mib(child.pid, "RssAnon"), pod.bare_memory_mib(), memory_mib(child.pid, "VmHWM")
        print(f"one list: {listed.ByteSize()} bytes; most memory ever: {peak:.1f} MiB")
        print(f"{own:.1f} MiB not from files, {bare:.1f} by imports alone")
        assert own - bare < MOST_OWN_MIB
        assert peak < LIMIT_MIB
