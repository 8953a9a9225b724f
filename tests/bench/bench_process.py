"""The plugin as a process: time until it registers, memory and processor time when nothing happens."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from agents_rig import DONGLE
from api_process import Cluster
from bench_nodes import virtual_server
from bench_rows import Row
from plugin_in_pod import STRIPPED, InPod, cpu_ms, memory_mib

from usbip_plugin.sim.kubelet import FakeKubelet

RESOURCES = 5
RSS_TARGET_MIB = 60.0
START_TARGET_MS = 600.0
CPU_TARGET_MS_PER_S = 3.0
START_TIMEOUT_S = 30.0
SETTLE_S = 3.0


@dataclass(frozen=True)
class _Run:
    first_register_ms: float
    rss_mib: float
    cpu_ms_per_s: float | None


async def process(cluster: Cluster, token: str, starts: int, idle_seconds: float) -> list[Row]:
    """Rows of the real process with 5 resources, the watch open, and HTTP pages on."""
    plain = await _runs(cluster, token, (), starts, idle_seconds)
    stripped = await _runs(cluster, token, STRIPPED, 1, SETTLE_S)
    firsts = [run.first_register_ms for run in plain[1:]]
    cpu = plain[-1].cpu_ms_per_s
    assert cpu is not None
    return [
        Row("cold start, exec to Register, median", statistics.median(firsts), "ms", START_TARGET_MS, starts),
        Row("cold start, exec to Register, slowest", max(firsts), "ms", None, starts),
        Row(f"RSS idle, {RESOURCES} resources", plain[-1].rss_mib, "MiB", RSS_TARGET_MIB),
        Row(f"RSS idle, {RESOURCES} resources, python -OO", stripped[-1].rss_mib, "MiB", RSS_TARGET_MIB),
        Row(f"processor time idle, over {idle_seconds:g} s", cpu, "ms/s", CPU_TARGET_MS_PER_S),
    ]


async def _runs(cluster: Cluster, token: str, flags: tuple[str, ...], starts: int, idle_seconds: float) -> list[_Run]:
    """One run that compiles the bytecode and does not count, then so many; the last is measured idle."""
    with tempfile.TemporaryDirectory(prefix="u-") as name:
        pod = InPod(Path(name), cluster, token, "bench-process")
        async with virtual_server(RESOURCES) as server:
            pod.config.write_text(_config(server.key.port), encoding="utf-8")
            return [await _one(pod, flags, idle_seconds if number == starts else 0.0) for number in range(starts + 1)]


async def _one(pod: InPod, flags: tuple[str, ...], idle_seconds: float) -> _Run:
    with (pod.directory / "log").open("wb") as log:
        async with FakeKubelet(pod.plugins, pod.pod_resources) as kubelet, asyncio.timeout(None) as limit:
            began = time.perf_counter()
            limit.reschedule(asyncio.get_running_loop().time() + START_TIMEOUT_S)
            with pod.process(flags, log.fileno()) as child:
                try:
                    await kubelet.changed.until(lambda: bool(kubelet.seen.registrations))
                    registered = (time.perf_counter() - began) * 1e3
                    await kubelet.changed.until(
                        lambda: len({resource for resource, _ in kubelet.seen.lists}) == RESOURCES
                    )
                except TimeoutError:
                    raise RuntimeError((pod.directory / "log").read_text(encoding="utf-8")[-3000:]) from None
                limit.reschedule(None)
                if not idle_seconds:
                    return _Run(registered, 0.0, None)
                await asyncio.sleep(SETTLE_S)
                cpu, at = cpu_ms(child.pid), time.perf_counter()
                await asyncio.sleep(idle_seconds)
                cpu, took = cpu_ms(child.pid) - cpu, time.perf_counter() - at
                return _Run(registered, memory_mib(child.pid), cpu / took)


def _config(port: int) -> str:
    lines, usb_id = ["resources:"], f'vendor: "{DONGLE.vendor:04x}", product: "{DONGLE.product:04x}"'
    for number in range(RESOURCES):
        lines += [
            f"  bench{number}:",
            f"    - target: {{host: 127.0.0.1, port: {port}}}",
            f"      selector: {{{usb_id}, bus_id: 1-{number + 1}}}",
        ]
    return "\n".join(lines) + "\n"
