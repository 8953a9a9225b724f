"""One plugin process with 500 devices, as in its pod: a kubelet's sockets, a real API server, five USB/IP servers."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from tests.apiserver.node_tokens import NodeTokens
from tests.apiserver.objects import configuration, make_node
from tests.apiserver.test_apiserver_manager import lock_manager
from tests.rigs.agents_rig import DONGLE
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_in_pod import STRIPPED, InPod, cpu_ms, memory_mib, settled
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import DeviceKey
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

pytestmark = pytest.mark.short

SERVERS, EACH = 5, 100
RESOURCE = "usbip.dev/many"
DONGLE_SELECTOR = {"vendor": f"{DONGLE.vendor:04x}", "product": f"{DONGLE.product:04x}"}
LIMIT_MIB = 64
"""Memory limit of the DaemonSet."""
MOST_OWN_MIB = 10.0
"""Anonymous memory above that of the imports; 6.7 of 37.1 MiB were measured."""
MESSAGE_BYTES = 4 * 2**20
"""Most that the kubelet's gRPC client accepts."""
PATIENCE_S = 90.0
AT_ONCE = 8
CONTROLLERS, PER_HUB = 8, 15


def make_platform(directory: Path) -> Path:
    """Writes the sysfs directory of vhci_hcd in Debian's kernel, with no port in use."""
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


async def for_each(keys: list[DeviceKey], manager: LockManager, *, lock: bool) -> None:
    """Acquires or releases the locks of all devices, AT_ONCE at a time."""
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
    """Waits until all devices are healthy or unhealthy, and prints time, CPU, lists and memory since the last wait."""

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
    await make_node(admin, node)
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
        pod.config.write_text(
            configuration(many=[(server.key, DONGLE_SELECTOR) for server in servers]), encoding="utf-8"
        )
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
        other = await stack.enter_async_context(lock_manager(tokens))
        await for_each(keys, other, lock=True)
        await measured.until("500 locked by another node", healthy=False)
        await for_each(keys, other, lock=False)
        await measured.until("and released", healthy=True)

        own, bare, peak = memory_mib(child.pid, "RssAnon"), pod.bare_memory_mib(), memory_mib(child.pid, "VmHWM")
        print(f"one list: {listed.ByteSize()} bytes; most memory ever: {peak:.1f} MiB")
        print(f"{own:.1f} MiB not from files, {bare:.1f} by imports alone")
        assert own - bare < MOST_OWN_MIB
        assert peak < LIMIT_MIB
