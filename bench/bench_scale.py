"""Costs of many nodes for the API server and the USB/IP servers: counts, processor time and memory.

    python -m bench.bench_scale [--short] [--point AGENTS,DEVICES ...] [--json FILE]

Each point has its own kube-apiserver and etcd, with the plugin's RBAC and admission policy. All agents run in this
process, as a process for each would need 10 GB. Each agent has its own connections, watches and token.
Exit status 1 if a count differs from the model (scale_model.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.bench_rows import Row, document, line, machine
from tests.rigs import scale_model as model
from tests.rigs.api_process import Cluster, binaries, running
from tests.rigs.plugin_in_pod import memory_mib
from tests.rigs.plugin_rights import admission_works, apply_rbac
from tests.rigs.scale_api import WRITES, Meter, Sample, Span, between
from tests.rigs.scale_rig import ScaleRig, prepared
from usbip_sim.kubelet.device_manager import AdmissionError
from usbip_sim.world import SimNode

FULL = ((10, 100), (50, 100), (100, 100), (200, 100), (10, 10), (10, 500), (10, 2000))
SHORT = ((10, 10), (40, 10))
POLLS_TOLERANCE = 0.25
"""Tolerated share of the polls of a server, which have jitter."""
REPEATED = 0.25
"""Share of the requests of a phase that may be repeated because of late answers."""
FILES = 16384
AT_ONCE = 10


@dataclass(frozen=True)
class Lengths:
    """Lengths of the phases.

    without, idle, holding: seconds without agents, with agents, and while some hold devices.
    tenures: number of devices that change hands.
    """

    without: float
    idle: float
    holding: float
    tenures: int


LONG = Lengths(without=20, idle=30, holding=40, tenures=5)
BRIEF = Lengths(without=5, idle=10, holding=20, tenures=2)


@dataclass(frozen=True)
class Point:
    """Figures of one size. Those ending in _s are per second; cpu is in ms per second, memory in MiB.

    tenure_*: of one device from free to free, with the status writes of every node.
    """

    agents: int
    devices: int
    servers: int
    holders: int
    start: dict[str, int]
    start_s: float
    without_cpu: float
    without_memory: float
    idle_writes: int
    idle_requests: dict[str, int]
    idle_cpu: float
    idle_memory: float
    polls_s: float
    tenure_requests: dict[str, float]
    tenure_events: float
    tenure_cpu_ms: float
    holding_seconds: float
    holding_writes: int
    holding_events: float
    holding_cpu: float
    holding_memory: float
    etcd_holding_cpu: float
    etcd_memory: float
    bench_memory: float


class Check:
    """Rows of counts. wrong: texts on counts that differ from the model."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.wrong: list[str] = []

    def exact(self, name: str, value: float, expected: float, unit: str) -> None:
        self.within(name, value, expected, expected, unit)

    def within(self, name: str, value: float, least: float, most: float, unit: str) -> None:
        row = Row(name, value, unit, most)
        self.rows.append(row)
        print(line(row), flush=True)
        if not least <= value <= most:
            self.wrong.append(f"{name}: {value:g} {unit}, the model says {least:g} to {most:g}")

    def note(self, name: str, value: float, unit: str) -> None:
        row = Row(name, value, unit)
        self.rows.append(row)
        print(line(row), flush=True)


async def _rest(meter: Meter, seconds: float) -> tuple[Span, Sample]:
    first = meter.sample()
    await asyncio.sleep(seconds)
    last = meter.sample()
    return between(first, last), last


async def measure(cluster: Cluster, agents: int, devices: int, lengths: Lengths, check: Check) -> Point:
    holders = min(agents, devices) // 2
    fleet = model.Fleet(agents, devices, holders)
    what = f"{agents} nodes, {devices} devices: "
    meter = Meter(cluster)
    async with prepared(cluster, agents, devices) as start:
        without, before = await _rest(meter, lengths.without)
        began = time.monotonic()
        async with start() as rig:
            start_s = time.monotonic() - began
            started = between(before, meter.sample())
            for (verb, kind), count in model.start_requests(fleet).items():
                name = f"{what}{verb} of {kind} to start"
                check.within(name, started.requests.get((verb, kind), 0), count, count * (1 + REPEATED), "")
            polls = rig.polls()
            idle, idle_sample = await _rest(meter, lengths.idle)
            polls = rig.polls() - polls
            check.exact(f"{what}writes in {lengths.idle:g} s, nothing held", idle.writes, 0, "")
            polls_s = polls / idle.seconds / len(rig.servers)
            expected = model.server_polls(agents)
            low, high = expected * (1 - POLLS_TOLERANCE), expected * (1 + POLLS_TOLERANCE)
            check.within(f"{what}DEVLIST to each server", polls_s, low, high, "/s")
            tenures = await _tenures(rig, meter, lengths.tenures)
            _check_tenures(check, what, fleet, tenures, lengths.tenures)
            async with _held(rig, holders):
                holding, holding_sample = await _rest(meter, lengths.holding)
            least, most = model.heartbeats(fleet, holding.seconds)
            check.within(f"{what}writes in {holding.seconds:.0f} s, {holders} hold", holding.writes, least, most, "")
            each = 1 / lengths.tenures
            point = Point(
                agents=agents,
                devices=devices,
                servers=len(rig.servers),
                holders=holders,
                start=_named(started),
                start_s=start_s,
                without_cpu=without.cpu / without.seconds * 1e3,
                without_memory=before.ended.memory,
                idle_writes=idle.writes,
                idle_requests=_named(idle),
                idle_cpu=idle.cpu / idle.seconds * 1e3,
                idle_memory=idle_sample.ended.memory,
                polls_s=polls_s,
                tenure_requests={name: count * each for name, count in _named(tenures).items()},
                tenure_events=tenures.events * each,
                tenure_cpu_ms=max(0.0, tenures.cpu - idle.cpu / idle.seconds * tenures.seconds) * 1e3 * each,
                holding_seconds=holding.seconds,
                holding_writes=holding.writes,
                holding_events=holding.events,
                holding_cpu=holding.cpu / holding.seconds * 1e3,
                holding_memory=holding_sample.ended.memory,
                etcd_holding_cpu=holding.etcd_cpu / holding.seconds * 1e3,
                etcd_memory=holding_sample.ended.etcd_memory,
                bench_memory=memory_mib(os.getpid()),
            )
    check.note(f"{what}API server without us", point.without_cpu, "ms/s")
    check.note(f"{what}API server, nothing held", point.idle_cpu, "ms/s")
    check.note(f"{what}API server, {holders} hold", point.holding_cpu, "ms/s")
    check.note(f"{what}API server, for a device that changes hands", point.tenure_cpu_ms, "ms")
    check.note(f"{what}API server without us", point.without_memory, "MiB")
    check.note(f"{what}API server, {holders} hold", point.holding_memory, "MiB")
    return point


def _named(span: Span) -> dict[str, int]:
    return {f"{verb} {kind}": count for (verb, kind), count in sorted(span.requests.items())}


async def _tenures(rig: ScaleRig, meter: Meter, count: int) -> Span:
    """Takes and releases a device on one node after the other."""
    first = meter.sample()
    for number in range(count):
        node = rig.nodes[number % len(rig.nodes)]
        pod = await rig.take(node)
        await rig.withdrawn(node)
        await rig.end(node, pod)
        await rig.offered()
    return between(first, meter.sample())


def _check_tenures(check: Check, what: str, fleet: model.Fleet, tenures: Span, count: int) -> None:
    def writes(kind: str) -> int:
        return sum(n for (verb, what), n in tenures.requests.items() if what == kind and verb in WRITES)

    check.within(
        f"{what}Lease writes for {count} tenures",
        writes("leases"),
        model.LOCK_WRITES * count + count,
        model.LOCK_WRITES * count + count * 2,
        "",
    )
    check.exact(f"{what}Events written for them", writes("events"), count, "")
    patches = model.tenure_patches(fleet) * count
    # a node whose turn comes after the release writes nothing
    check.within(f"{what}Node status writes for them", writes("nodes/status"), 0, patches * (1 + REPEATED), "")
    events = model.tenure_events(fleet) * count
    bookmarks = model.bookmarks(fleet, tenures.seconds)
    check.within(f"{what}watch events of Leases for them", tenures.events, events, events + bookmarks, "")


@contextlib.asynccontextmanager
async def _held(rig: ScaleRig, holders: int) -> AsyncIterator[None]:
    """Gives a device to each of so many nodes."""
    room = asyncio.Semaphore(AT_ONCE)

    async def take(node: SimNode) -> None:
        async with room:
            while True:
                with contextlib.suppress(AdmissionError):  # two nodes chose the same device
                    await rig.take(node)
                    return

    async with asyncio.TaskGroup() as group:
        for node in rig.nodes[:holders]:
            group.create_task(take(node))
    await rig.published()
    yield


def one_point(agents: int, devices: int, lengths: Lengths, check: Check) -> Point:
    with tempfile.TemporaryDirectory(prefix="scale-") as directory, running(Path(directory)) as cluster:
        asyncio.run(apply_rbac(cluster))
        asyncio.run(admission_works(cluster))
        return asyncio.run(measure(cluster, agents, devices, lengths, check))


def _versions() -> dict[str, str]:
    found = {}
    for name in ("kube-apiserver", "etcd"):
        output = subprocess.run([binaries() / name, "--version"], check=True, capture_output=True, text=True).stdout
        version = re.search(r"v?\d+\.\d+\.\d+", output)
        found[name] = version[0].lstrip("v") if version else "?"
    return found


def _total_memory() -> int:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"MemTotal: +(\d+) kB", text)
    return round(int(found[1]) / 2**20) if found else 0


def _size(text: str) -> tuple[int, int]:
    agents, _, devices = text.partition(",")
    return int(agents), int(devices)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two small points")
    parser.add_argument("--point", type=_size, action="append", metavar="AGENTS,DEVICES", help="these instead")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=Path("bench-scale.json"), help="default %(default)s"
    )
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else FILES, most))
    where = {**machine(), "memory_gib": _total_memory(), **_versions()}
    print(", ".join(f"{name} {value}" for name, value in where.items()) + "\n", flush=True)
    check, began, points = Check(), time.monotonic(), []
    for agents, devices in options.point or (SHORT if options.short else FULL):
        points.append(one_point(agents, devices, BRIEF if options.short else LONG, check))
        found = {**document(check.rows, []), "machine": where, "points": [asdict(point) for point in points]}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"\n{time.monotonic() - began:.0f} s; counts that are not the model's: {len(check.wrong)}", flush=True)
    for text in check.wrong:
        print(f"wrong: {text}")
    return 1 if check.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
