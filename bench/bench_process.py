"""The plugin as a process: time until it registers, and processor time when idle."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from bench.bench_nodes import NAMESPACE, config_of, connected, virtual_server
from bench.bench_rows import Row
from tests.rigs.agents_rig import DONGLE
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_in_pod import STRIPPED, InPod, cpu_ms, switches
from usbip_plugin.locks import record
from usbip_plugin.locks.kubernetes import RESOURCE, KubernetesLeases
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_sim.kubelet.kubelet import FakeKubelet

RESOURCES = 5
START_TARGET_MS = 350.0
CPU_TARGET_MS_PER_S = 2.0
START_TIMEOUT_S = 30.0
LOCKS = 500
SETTLE_S = 13.0
"""More than process.START_OVER_S."""


@dataclass(frozen=True)
class _Run:
    """Figures of one process.

    last_register_ms: since the exec of Python.
    start_cpu_ms: processor time until then.
    switches_per_s: waits of all threads.
    """

    last_register_ms: float
    start_cpu_ms: float
    cpu_ms_per_s: float = 0.0
    switches_per_s: float = 0.0


async def process(cluster: Cluster, token: str, starts: int, idle_seconds: float) -> list[Row]:
    """Measures the process as in its image, with 5 resources, an open watch and HTTP pages."""
    *counted, idle = (await _runs(cluster, token, STRIPPED, starts, idle_seconds))[1:]
    lasts = [run.last_register_ms for run in counted]
    busy = statistics.median(run.start_cpu_ms for run in counted)
    while_idle = f"idle, {LOCKS} Leases watched, over {idle_seconds:g} s"
    return [
        Row("cold start, exec to last Register, median", statistics.median(lasts), "ms", START_TARGET_MS, starts),
        Row("cold start, exec to last Register, slowest", max(lasts), "ms", None, starts),
        Row("cold start, of it processor time, median", busy, "ms", None, starts),
        Row(f"processor time {while_idle}", idle.cpu_ms_per_s, "ms/s", CPU_TARGET_MS_PER_S),
        Row(f"waits of all threads {while_idle}", idle.switches_per_s, "1/s"),
    ]


async def _runs(cluster: Cluster, token: str, flags: tuple[str, ...], starts: int, idle_seconds: float) -> list[_Run]:
    """Returns a first run, which compiles the bytecode, then so many runs, and one that is measured idle."""
    with tempfile.TemporaryDirectory(prefix="u-") as name:
        pod = InPod(Path(name), cluster, token, "bench-process")
        async with virtual_server(RESOURCES) as server:
            resources = [config_of(n, server.key.port, f", bus_id: 1-{n + 1}") for n in range(RESOURCES)]
            pod.config.write_text("resources:\n" + "".join(resources), encoding="utf-8")
            runs = [await _one(pod, flags, 0.0) for _ in range(starts + 1)]
            async with _locks(cluster.kubeconfig(token)):
                return [*runs, await _one(pod, flags, idle_seconds)]


@contextlib.asynccontextmanager
async def _locks(kubeconfig: str) -> AsyncIterator[None]:
    """Creates the free Leases of so many devices."""
    async with connected(kubeconfig) as client:
        store, made = KubernetesLeases(client, NAMESPACE), []
        for number in range(LOCKS):
            key = DeviceKey(ServerKey("idle.invalid"), f"1-{number + 1}")
            notes = {**record.device_annotations(key), record.USB_ID: str(DONGLE)}
            lease = Lease(key.id, duration_seconds=40, annotations=notes, labels=record.LOCK_LABELS)
            made.append(await store.create(lease))
        yield
        for lease in made:
            path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{lease.name}"
            await client.request("delete", path, resource=RESOURCE)


async def _one(pod: InPod, flags: tuple[str, ...], idle_seconds: float) -> _Run:
    with (pod.directory / "log").open("wb") as log:
        async with FakeKubelet(pod.plugins, pod.pod_resources) as kubelet, asyncio.timeout(None) as limit:
            limit.reschedule(asyncio.get_running_loop().time() + START_TIMEOUT_S)
            with pod.process(flags, log.fileno()) as child:
                try:
                    await kubelet.changed.until(lambda: len(set(kubelet.seen.registrations)) == RESOURCES)
                    now, start_cpu = time.time_ns(), cpu_ms(child.pid)
                    await kubelet.changed.until(
                        lambda: len({resource for resource, _ in kubelet.seen.lists}) == RESOURCES
                    )
                except TimeoutError:
                    raise RuntimeError((pod.directory / "log").read_text(encoding="utf-8")[-3000:]) from None
                limit.reschedule(None)
                registered = (now - pod.begun_ns()) / 1e6
                if not idle_seconds:
                    return _Run(registered, start_cpu)
                await asyncio.sleep(SETTLE_S)
                cpu, waits, at = cpu_ms(child.pid), switches(child.pid), time.perf_counter()
                await asyncio.sleep(idle_seconds)
                took = time.perf_counter() - at
                cpu, waits = cpu_ms(child.pid) - cpu, switches(child.pid) - waits
                return _Run(registered, start_cpu, cpu / took, waits / took)
