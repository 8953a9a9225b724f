"""An idle plugin process as in its image: the modules it has loaded, its memory, and how often it wakes."""

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

from tests.apiserver.node_tokens import NodeTokens
from tests.apiserver.objects import configuration
from tests.rigs.agents_rig import DONGLE
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_in_pod import STRIPPED, InPod, memory_mib, settled, switches
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

RESOURCES = 5
PATIENCE_S = 60.0
POLLS = 3
"""Polls of its server for which a process is watched: 9 s, or 30 s with the 200 pods that other tests leave."""
MOST_WAITS_A_POLL = 75
"""System calls of all threads that slept, for each poll; 29 were measured."""
MOST_CALLS_A_POLL = 300
"""System calls of all threads for each poll; 115 were measured. A busy loop makes more within a second."""
MOST_OWN_MIB = 4.0
"""Anonymous memory above that of the imports; 1.1 of 31.5 MiB were measured."""
UNUSED = (
    "kubernetes_asyncio.client.api",
    "aiohttp.web_app",
    "http.server",
    "opentelemetry.exporter",
    "usbip_sim.",
)
_POLL_S = 0.1


async def test_an_idle_process_sleeps_and_is_small(cluster: Cluster, tokens: NodeTokens) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    async with offering(cluster, tokens) as (pod, server):
        if not pod.allowed:
            pytest.skip("makes mounts, which needs root")
        async with registered(pod, "-X", "importtime"):  # compiles the bytecode and logs the imports
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
            assert child.poll() is None, "the process still runs"
        calls = calls_in(pod.directory / "calls")
        bare = pod.bare_memory_mib()
    a_poll = sum(calls.values()) / traced_polls
    most = sorted(calls, key=lambda name: -calls[name])[:5]
    print(f"{waits[1] / waits[0]:.1f} waits a poll, {own:.1f} MiB not from files, {bare:.1f} by imports alone")
    print(f"{a_poll:.0f} system calls a poll, most of them {', '.join(f'{n} {calls[n]}' for n in most)}")
    assert waits[1] / waits[0] < MOST_WAITS_A_POLL
    assert own - bare < MOST_OWN_MIB
    assert calls.keys() & {"epoll_wait", "epoll_pwait", "futex"}, "system calls are counted"
    assert a_poll < MOST_CALLS_A_POLL


@contextlib.asynccontextmanager
async def offering(cluster: Cluster, tokens: NodeTokens) -> AsyncIterator[tuple[InPod, VirtualServer]]:
    """Yields a plugin for a node of its own, and its server with RESOURCES devices, one for each resource."""
    node = f"n{uuid.uuid4().hex[:6]}-idle"
    server = VirtualServer([VirtualDevice(f"1-{n + 1}", DONGLE, configured=True) for n in range(RESOURCES)])
    await server.start()
    try:
        with tempfile.TemporaryDirectory(prefix="u-") as name:
            pod = InPod(Path(name), cluster, await tokens.of(node), node)
            resources = {f"idle{n}": [(server.key, {"bus_id": f"1-{n + 1}"})] for n in range(RESOURCES)}
            pod.config.write_text(configuration(**resources), encoding="utf-8")
            yield pod, server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def registered(pod: InPod, *flags: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Yields a process once the kubelet has a list of each resource. flags: of Python, besides STRIPPED."""
    with (pod.directory / "log").open("wb") as log:
        async with FakeKubelet(pod.plugins, pod.pod_resources) as kubelet:
            with pod.process((*STRIPPED, *flags), log.fileno(), ("--log-level", "debug")) as child:
                async with asyncio.timeout(PATIENCE_S):
                    await kubelet.changed.until(
                        lambda: len({resource for resource, _ in kubelet.seen.lists}) == RESOURCES
                    )
                yield child


async def polls(server: VirtualServer) -> int:
    """Waits for POLLS polls of the server. Returns how many there were."""
    before = server.connections
    async with asyncio.timeout(PATIENCE_S):
        while server.connections - before < POLLS:  # noqa: ASYNC110 - a server has no event for it
            await asyncio.sleep(_POLL_S)
    return server.connections - before


@contextlib.asynccontextmanager
async def traced(strace: str, pid: int, file: Path) -> AsyncIterator[None]:
    """Counts the system calls of all threads of a process within the block."""
    tracing = await asyncio.create_subprocess_exec(strace, "-q", "-f", "-c", "-o", str(file), "-p", str(pid))
    try:
        yield
    finally:
        tracing.send_signal(signal.SIGINT)  # it detaches and writes its counts
        await tracing.wait()


def calls_in(file: Path) -> dict[str, int]:
    """Reads the summary of strace: % time, seconds, usecs/call, calls, errors if there were any, name."""
    rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"}
