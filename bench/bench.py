"""Timings and memory of the plugin: a table for people, JSON for machines.

    python -m bench.bench [--short] [--json FILE] [--kernel [--network]]

Without arguments everything that needs no special kernel, in less than 8 minutes; --short in less than 4. --kernel,
for the guest (tests/lab/guest/run.sh -u), measures on a real usbipd and vhci_hcd instead; with --network, latency and
bandwidth of devices over networks of several delays. A missed target is printed; the exit status is 0 all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

from bench.bench_rows import Row, Skipped, document, line, machine


@dataclass(frozen=True)
class Counts:
    """Numbers of samples of each measurement. idle: seconds."""

    allocates: int
    unanswered: int
    locks: int
    withdrawals: int
    releases: int
    starts: int
    idle: float
    kernel: int


FULL = Counts(allocates=100, unanswered=100, locks=500, withdrawals=200, releases=50, starts=5, idle=20, kernel=20)
SHORT = Counts(allocates=15, unanswered=30, locks=100, withdrawals=25, releases=10, starts=2, idle=10, kernel=5)


class Bench:
    """Rows of a run, printed as they are measured."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[Skipped] = []

    def measure(self, work: Coroutine[None, None, list[Row]]) -> None:
        self.add(asyncio.run(work))

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            print(line(row), flush=True)

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name, reason))
        print(f"{name}: not measured: {reason}", flush=True)


def doubles(bench: Bench, counts: Counts) -> None:
    """Measures with doubles only."""
    from bench import bench_allocate, bench_exporter, bench_handover, bench_pages, bench_watch

    bench.measure(bench_allocate.allocate(None, counts.allocates))
    bench.measure(bench_allocate.unanswered(counts.unanswered))
    bench.measure(bench_allocate.among_many(counts.allocates))
    bench.measure(bench_watch.watch())
    bench.measure(bench_pages.load())
    bench.measure(bench_exporter.exporter())
    bench.add(bench_handover.handover())


def api_server(bench: Bench, counts: Counts) -> None:
    """Measures on a real API server, if one is installed or can be built."""
    from bench import bench_allocate, bench_locks, bench_memory, bench_process, bench_release
    from tests.rigs.api_process import ADMIN_TOKEN, running

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        try:
            cluster = stack.enter_context(running(directory))
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            bench.skip("everything on a real API server", str(error))
            return
        config = cluster.kubeconfig(ADMIN_TOKEN)
        asyncio.run(bench_locks.make_namespace(config))
        bench.measure(bench_locks.acquisition(config, counts.locks))
        bench.measure(bench_locks.withdrawal(config, counts.withdrawals))
        bench.measure(bench_allocate.allocate(config, counts.allocates))
        bench.measure(bench_release.release(cluster, ADMIN_TOKEN, counts.releases))
        bench.measure(bench_locks.unanswered(cluster, ADMIN_TOKEN))
        bench.measure(bench_process.process(cluster, ADMIN_TOKEN, counts.starts, counts.idle))
        bench.measure(bench_memory.memory(cluster, ADMIN_TOKEN))


def real_kernel(bench: Bench, counts: Counts) -> None:
    """Measures on this machine's vhci_hcd, with a real usbipd."""
    from bench import bench_kernel

    bench.measure(bench_kernel.kernel(counts.kernel))


def network(bench: Bench, counts: Counts) -> None:
    """Measures devices of a real usbipd on this machine's vhci_hcd over networks of several delays."""
    from bench import bench_network

    try:
        bench.measure(bench_network.network(counts.kernel))
    except bench_network.NoDelay as error:
        bench.skip("latency and bandwidth over a network", str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer samples")
    parser.add_argument("--json", metavar="FILE", type=Path, default=Path("bench.json"), help="default %(default)s")
    parser.add_argument("--kernel", action="store_true", help="the real kernel instead of everything else")
    parser.add_argument("--network", action="store_true", help="with --kernel: devices over networks of several delays")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    counts = SHORT if options.short else FULL
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, Python {where['python']}\n", flush=True)
    bench, began = Bench(), time.monotonic()
    on_kernel = network if options.network else real_kernel
    for section in (on_kernel,) if options.kernel else (doubles, api_server):
        section(bench, counts)
    missed = [row for row in bench.rows if row.met is False]
    targets = sum(row.target is not None for row in bench.rows)
    print(f"\n{targets - len(missed)} of {targets} targets met, {time.monotonic() - began:.0f} s", flush=True)
    for row in missed:
        print(f"missed: {row.name}: {row.value:.1f} {row.unit}, target {row.target:g}")
    options.json.write_text(json.dumps(document(bench.rows, bench.skipped), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
