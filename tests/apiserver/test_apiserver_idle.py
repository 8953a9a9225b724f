"""The process as in its image when nothing happens: how often it wakes, what it has loaded, what it has in memory."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agents_rig import DONGLE
from api_process import Cluster
from node_tokens import NodeTokens
from plugin_in_pod import STRIPPED, InPod, memory_mib, switches

from usbip_plugin.process import START_OVER_S
from usbip_plugin.sim.kubelet import FakeKubelet
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.usbdevice import VirtualDevice

RESOURCES = 5
PATIENCE_S = 60.0
WINDOW_S = 20.0
MOST_WAITS_PER_S = 25.0
"""Of all threads; it was 11. Each is a system call that slept."""
MOST_OWN_MIB = 36.0
"""Not from files; it is 31.5 in each run, and was 34.04 once where other work kept the machine busy."""
MOST_MIB = 50.0
"""With what is mapped from files, of which the kernel brings back more or less after settle(): 37 to 40 were seen."""
UNUSED = (
    "kubernetes_asyncio.client.api",
    "aiohttp.web_app",
    "http.server",
    "opentelemetry.exporter",
    "usbip_plugin.sim.",
)


async def test_an_idle_process_sleeps_and_is_small(cluster: Cluster, tokens: NodeTokens) -> None:
    async with offering(cluster, tokens) as pod:
        if not pod.allowed:
            pytest.skip("makes mounts, which needs root")
        async with registered(pod, "-X", "importtime"):  # the bytecode is compiled, and it says what it loads
            pass
        loaded = (pod.directory / "log").read_text(encoding="utf-8")
        assert "kubernetes_asyncio.client.rest" in loaded
        assert not [name for name in UNUSED if name in loaded]
        async with registered(pod) as child:
            await asyncio.sleep(START_OVER_S + 2)
            before = switches(child.pid)
            await asyncio.sleep(WINDOW_S)
            waits = (switches(child.pid) - before) / WINDOW_S
            resident, own = memory_mib(child.pid), memory_mib(child.pid, "RssAnon")
        print(f"{waits:.1f} waits/s, RSS {resident:.1f} MiB, of it {own:.1f} not from files")
        assert waits < MOST_WAITS_PER_S
        assert own < MOST_OWN_MIB
        assert resident < MOST_MIB


@contextlib.asynccontextmanager
async def offering(cluster: Cluster, tokens: NodeTokens) -> AsyncIterator[InPod]:
    """How to run it for a node of its own, with RESOURCES resources of one device each, which a server has."""
    node = f"n{uuid.uuid4().hex[:6]}-idle"
    server = VirtualServer([VirtualDevice(f"1-{n + 1}", DONGLE, configured=True) for n in range(RESOURCES)])
    await server.start()
    try:
        with tempfile.TemporaryDirectory(prefix="u-") as name:
            pod = InPod(Path(name), cluster, await tokens.of(node), node)
            pod.config.write_text(config_of(server.key.port), encoding="utf-8")
            yield pod
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def registered(pod: InPod, *flags: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process, as soon as the kubelet has a list of each resource. flags: python's, besides STRIPPED."""
    with (pod.directory / "log").open("wb") as log:
        async with FakeKubelet(pod.plugins, pod.pod_resources) as kubelet:
            with pod.process((*STRIPPED, *flags), log.fileno()) as child:
                async with asyncio.timeout(PATIENCE_S):
                    await kubelet.changed.until(
                        lambda: len({resource for resource, _ in kubelet.seen.lists}) == RESOURCES
                    )
                yield child


def config_of(port: int) -> str:
    lines = ["resources:"]
    for number in range(RESOURCES):
        lines += [f"  idle{number}:", f"    - target: {{host: 127.0.0.1, port: {port}}}"]
        lines += [f"      selector: {{bus_id: 1-{number + 1}}}"]
    return "\n".join(lines) + "\n"
