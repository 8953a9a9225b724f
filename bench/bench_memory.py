"""Memory of the plugin's process, idle and under load. It runs with python -OO, as in its image."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.bench_nodes import config_of
from bench.bench_rows import Row
from tests.rigs.agents_rig import DONGLE
from tests.rigs.api_process import Cluster
from tests.rigs.memory_group import MemoryGroup, memory_group
from tests.rigs.otlp_receiver import receiving
from tests.rigs.plugin_in_pod import STRIPPED, InPod, memory_mib, proportional_mib
from usbip_plugin.clock import SystemClock
from usbip_plugin.model import PodRef
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kernel.service import KernelService
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

IDLE_MIB, EXPORTING_MIB, LIMIT_MIB = 50.0, 58.0, 64.0
SETTLE_S = 13.0
"""More than process.START_OVER_S."""
PATIENCE_S = 120.0
PORTS_PER_CONTROLLER = 8


@dataclass(frozen=True)
class Scenario:
    """Load of the process.

    devices: number of each resource, all on one server.
    attached: every device has a pod.
    target: MiB resident. If None, only the working set of the cgroup has a target.
    """

    name: str
    target: float | None
    resources: int = 5
    devices: int = 1
    exporting: bool = False
    attached: bool = False


SCENARIOS = (
    Scenario("idle, 5 resources", IDLE_MIB),
    Scenario("idle, 50 resources", IDLE_MIB, resources=50),
    Scenario("idle, 5 resources of 100 devices", None, devices=100),
    Scenario("240 devices attached", None, resources=4, devices=60, attached=True),
    Scenario("5 devices attached, OTLP", EXPORTING_MIB, exporting=True, attached=True),
    Scenario("240 devices attached, OTLP", None, resources=4, devices=60, exporting=True, attached=True),
)


WARMING = Scenario("compiles the bytecode", 0, exporting=True, attached=True)


async def memory(cluster: Cluster, token: str) -> list[Row]:
    """Measures each scenario: memory that is resident, anonymous, proportional, the maximum, and the cgroup's."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bytecode-") as bytecode:
        for scenario in (WARMING, *SCENARIOS):
            with contextlib.ExitStack() as stack:
                environ = {"PYTHONPYCACHEPREFIX": bytecode}
                if scenario.exporting:
                    environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = stack.enter_context(receiving()).endpoint
                group = stack.enter_context(memory_group())
                if group is not None:
                    environ["CGROUP"] = str(group.directory)
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
                pod = InPod(directory, cluster, token, f"bench-{uuid.uuid4().hex[:6]}")
                async with _place(scenario, pod) as kernel, _running(scenario, pod, kernel, environ) as pid:
                    if scenario is not WARMING:
                        await asyncio.sleep(SETTLE_S)
                        rows += _rows(scenario, pid, group)
    return rows


def _rows(scenario: Scenario, pid: int, group: MemoryGroup | None) -> list[Row]:
    name = f"memory, {scenario.name}"
    rows = [
        Row(f"{name}: RSS", memory_mib(pid), "MiB", scenario.target),
        Row(f"{name}: of it not from files", memory_mib(pid, "RssAnon"), "MiB"),
        Row(f"{name}: PSS", proportional_mib(pid), "MiB"),
        Row(f"{name}: the most ever", memory_mib(pid, "VmHWM"), "MiB"),
    ]
    if group is not None:
        rows.append(
            Row(f"{name}: working set of the cgroup", group.working_set_mib(), "MiB", scenario.target or LIMIT_MIB)
        )
    return rows


@contextlib.asynccontextmanager
async def _place(scenario: Scenario, pod: InPod) -> AsyncIterator[Path]:
    """Runs servers with all devices and a kernel, and writes the configuration. Yields the kernel's socket."""
    async with contextlib.AsyncExitStack() as stack:
        socket, listening = pod.directory / "kernel.sock", asyncio.Event()
        controllers = 1 + scenario.resources * scenario.devices // PORTS_PER_CONTROLLER
        kernel = KernelService(SimulatedKernel(SystemClock(), controllers=controllers), socket)
        task = asyncio.create_task(kernel.run(listening=listening.set))
        stack.push_async_callback(asyncio.wait, [task])
        stack.callback(task.cancel)
        await listening.wait()
        config = "resources:\n"
        for number in range(scenario.resources):
            devices = [
                VirtualDevice(f"1-{n + 1}", DONGLE, serial=f"S{n}", configured=True) for n in range(scenario.devices)
            ]
            server = VirtualServer(devices, reset_time=0)
            await server.start()
            stack.push_async_callback(server.stop)
            config += config_of(number, server.key.port)
        pod.config.write_text(config, encoding="utf-8")
        yield socket


@contextlib.asynccontextmanager
async def _running(scenario: Scenario, pod: InPod, kernel: Path, environ: Mapping[str, str]) -> AsyncIterator[int]:
    """Runs the plugin. Yields its pid when the load of the scenario is reached."""
    names = [f"usbip.dev/bench{number}" for number in range(scenario.resources)]
    log_path = pod.directory / "log"
    async with FakeKubelet(pod.plugins, pod.pod_resources) as kubelet:
        with (
            log_path.open("wb") as log,
            pod.process(STRIPPED, log.fileno(), ("--simulated-kernel", str(kernel)), environ) as child,
        ):
            try:
                async with asyncio.timeout(PATIENCE_S):
                    for name in names:
                        await kubelet.wait_for(
                            name, lambda found: len(found) == scenario.devices and all(found.values())
                        )
                    if scenario.attached:
                        for number in range(scenario.resources * scenario.devices):
                            user = PodRef("default", f"p{number}", f"u{number}")
                            await kubelet.admit(user, {names[number % len(names)]: 1})
            except TimeoutError:
                raise RuntimeError(log_path.read_text(encoding="utf-8")[-3000:]) from None
            yield child.pid
