"""The process as in its image when nothing happens: what it has loaded and in memory, and how often it wakes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.rigs.agents_rig import DONGLE
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_in_pod import STRIPPED, InPod, memory_mib, settled, switches
from usbip_plugin.kube.client import KubeClient
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
RESOURCES = 5
PATIENCE_S = 60.0
POLLS = 6
"""How many polls of its server a process is watched for: 18 s."""
MOST_WAITS_A_POLL = 75
"""Of all threads; it was 29. Each is a system call that slept."""
MOST_CALLS_A_POLL = 300
"""System calls of all threads; it was 115. A loop that turns for nothing makes more within a second."""
MOST_OWN_MIB = 4.0
"""Not from files, besides what the imports alone take; it was 1.1 of 31.5."""
UNUSED = (
    "kubernetes_asyncio.client.api",
    "aiohttp.web_app",
    "http.server",
    "opentelemetry.exporter",
    "usbip_sim.",
)
_POLL_S = 0.1


async def test_an_idle_process_sleeps_and_is_small(cluster: Cluster, tokens: NodeTokens, admin: KubeClient) -> None:
    # it would watch the locks that other tests have left, which takes memory: 500 of them 2 MiB
    await admin.request("delete", LEASES, resource="leases")
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    async with offering(cluster, tokens) as (pod, server):
        if not pod.allowed:
            pytest.skip("makes mounts, which needs root")
        async with registered(pod, "-X", "importtime"):  # the bytecode is compiled, and it says what it loads
            pass
        loaded = (pod.directory / "log").read_text(encoding="utf-8")
        assert "kubernetes_asyncio.client.rest" in loaded
        assert not [name for name in UNUSED if name in loaded]
        async with registered(pod) as child:
            await settled(pod.directory / "log")
            before = switches(child.pid)
            waits = (await polls(server), switches(child.pid) - before)
            own = memory_mib(child.pid, "RssAnon")
            async with traced(strace, child.pid, pod.directory / "calls"):
                traced_polls = await polls(server)
            assert child.poll() is None, "it runs on"
        calls = calls_in(pod.directory / "calls")
        bare = pod.bare_memory_mib()
    a_poll = sum(calls.values()) / traced_polls
    most = sorted(calls, key=lambda name: -calls[name])[:5]
    print(f"{waits[1] / waits[0]:.1f} waits a poll, {own:.1f} MiB not from files, {bare:.1f} by imports alone")
    print(f"{a_poll:.0f} system calls a poll, most of them {', '.join(f'{n} {calls[n]}' for n in most)}")
    assert waits[1] / waits[0] < MOST_WAITS_A_POLL
    assert own - bare < MOST_OWN_MIB
    assert calls.keys() & {"epoll_wait", "epoll_pwait", "futex"}, "they are counted"
    assert a_poll < MOST_CALLS_A_POLL


@contextlib.asynccontextmanager
async def offering(cluster: Cluster, tokens: NodeTokens) -> AsyncIterator[tuple[InPod, VirtualServer]]:
    """How to run it for a node of its own, with RESOURCES resources of one device each, which the server has."""
    node = f"n{uuid.uuid4().hex[:6]}-idle"
    server = VirtualServer([VirtualDevice(f"1-{n + 1}", DONGLE, configured=True) for n in range(RESOURCES)])
    await server.start()
    try:
        with tempfile.TemporaryDirectory(prefix="u-") as name:
            pod = InPod(Path(name), cluster, await tokens.of(node), node)
            pod.config.write_text(config_of(server.key.port), encoding="utf-8")
            yield pod, server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def registered(pod: InPod, *flags: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process, as soon as the kubelet has a list of each resource. flags: python's, besides STRIPPED."""
    with (pod.directory / "log").open("wb") as log:
        async with FakeKubelet(pod.plugins, pod.pod_resources) as kubelet:
            with pod.process((*STRIPPED, *flags), log.fileno(), ("--log-level", "debug")) as child:
                async with asyncio.timeout(PATIENCE_S):
                    await kubelet.changed.until(
                        lambda: len({resource for resource, _ in kubelet.seen.lists}) == RESOURCES
                    )
                yield child


async def polls(server: VirtualServer) -> int:
    """Waits until the process has polled its server so often, nothing else being asked of it; how often it has."""
    before = server.connections
    async with asyncio.timeout(PATIENCE_S):
        while server.connections - before < POLLS:  # noqa: ASYNC110 - a server tells nobody
            await asyncio.sleep(_POLL_S)
    return server.connections - before


@contextlib.asynccontextmanager
async def traced(strace: str, pid: int, file: Path) -> AsyncIterator[None]:
    """Counts the system calls of all threads of a process within the block."""
    tracing = await asyncio.create_subprocess_exec(strace, "-q", "-f", "-c", "-o", str(file), "-p", str(pid))
    try:
        yield
    finally:
        tracing.send_signal(signal.SIGINT)  # it lets the process go and writes what it counted
        await tracing.wait()


def calls_in(file: Path) -> dict[str, int]:
    """% time, seconds, usecs/call, calls, errors unless there were none, name."""
    rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"}


def config_of(port: int) -> str:
    lines = ["resources:"]
    for number in range(RESOURCES):
        lines += [f"  idle{number}:", f"    - target: {{host: 127.0.0.1, port: {port}}}"]
        lines += [f"      selector: {{bus_id: 1-{number + 1}}}"]
    return "\n".join(lines) + "\n"
