"""The HTTP port under attack: what a timer of the plugin's event loop loses, and the memory of the process.

    python -m bench.bench_pages

The server is a process of its own with all of the plugin's modules, the pages of 200 devices and as many spans as are
kept. The peers are another process with many addresses of 127.0.0.0/8, so that all connections are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from bench.bench_rows import Row, line, percentile

HALVES, CLIENTS = 1000, 100
"""Connections with half a request, and clients that ask for the status page without end."""
ADDRESSES = 200
TIMER_S, SECONDS = 0.05, 10.0
"""Period of the timer, and seconds of each measurement."""
MAX_GROWTH_MS, MAX_MIB = 20.0, 64.0
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: " + b"x" * 4000
WHOLE = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def _mib() -> float:
    """Returns the anonymous memory of this process in MiB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon"))) / 1024


async def _serve() -> None:
    """Serves the pages. For each line of input, writes the lateness of a timer (ms) and the most memory (MiB) since."""
    import usbip_plugin.node.daemon
    from tests.unit.observe.test_page import CLUSTER, HELD, STATUS, span
    from usbip_plugin.clock import SystemClock
    from usbip_plugin.observe.http import HttpServer
    from usbip_plugin.observe.metrics import Metrics
    from usbip_plugin.observe.pages import Site
    from usbip_plugin.observe.status import ClusterReport, NodeReport
    from usbip_plugin.observe.tracing import KeptSpan, RecentSpans
    from usbip_plugin.sync import Steps

    assert usbip_plugin.node.daemon
    recent = RecentSpans()
    for trace in range(64):
        spans = [span(n, 0, trace, attributes={"usbip.device": "lab:3240/1-1", "key": "value"}) for n in range(32)]
        recent._traces[f"{trace:032x}"] = [KeptSpan(None, one) for one in spans]
    rows = tuple(replace(HELD, id=f"usbip-{n:020d}", device=f"lab:3240/1-{n}") for n in range(200))

    def status() -> Steps[NodeReport]:
        for _ in rows:
            yield
        return replace(STATUS, devices=rows)

    def cluster() -> Steps[ClusterReport]:
        yield
        return CLUSTER

    clock = SystemClock()
    site = Site(status, cluster, Metrics().render, recent, clock)
    server = HttpServer("127.0.0.1:0", site.pages(), clock, below=site.below())
    late: list[float] = []
    most = [0.0]

    async def timer() -> None:
        while True:
            due = clock.monotonic() + TIMER_S
            await asyncio.sleep(TIMER_S)
            late.append((clock.monotonic() - due) * 1000)
            most[0] = max(most[0], _mib())

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.run())
        await server.started.wait()
        print(server.port, flush=True)
        tasks.create_task(timer())
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps([sorted(late), most[0], len(server._open)]), flush=True)
            late.clear()
            most[0] = 0.0
        raise SystemExit


async def _connect(port: int, rng: random.Random) -> socket.socket:
    sock = socket.socket()
    sock.bind((f"127.0.0.{rng.randrange(2, ADDRESSES)}", 0))
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


async def _attack(kind: str, port: int) -> None:
    loop, rng = asyncio.get_running_loop(), random.Random(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    async def half() -> None:
        while True:
            with contextlib.suppress(OSError), await _connect(port, rng) as sock:
                await loop.sock_sendall(sock, HALF)
                await loop.sock_recv(sock, 1)
            await asyncio.sleep(1)

    async def client() -> None:
        while True:
            with contextlib.suppress(OSError), await _connect(port, rng) as sock:
                await loop.sock_sendall(sock, WHOLE)
                while await loop.sock_recv(sock, 1 << 16):
                    pass

    async with asyncio.TaskGroup() as tasks:
        for _ in range(HALVES if kind == "halves" else CLIENTS):
            tasks.create_task(half() if kind == "halves" else client())


@contextlib.asynccontextmanager
async def _process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.bench_pages", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=1 << 24,
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def load(seconds: float = SECONDS) -> list[Row]:
    """Returns the rows of both attacks."""
    rows = []
    async with _process("serve") as server:
        orders, answers = server.stdin, server.stdout
        assert orders is not None
        assert answers is not None
        port = (await answers.readline()).decode().strip()

        async def measured() -> tuple[float, float, int]:
            for wait in (1.0, seconds):  # the first second is not counted
                await asyncio.sleep(wait)
                orders.write(b"\n")
                late, most, connections = json.loads(await answers.readline())
            return percentile(late, 99), most, connections

        # the first visit loads the page
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(WHOLE)
        await reader.read()
        writer.close()
        quiet, memory, _ = await measured()
        rows.append(Row("timer without peers, p99 late", quiet, "ms"))
        rows.append(Row("memory without peers", memory, "MiB"))
        for kind, name in (("halves", f"{HALVES} halves of requests"), ("clients", f"{CLIENTS} clients of the page")):
            async with _process(kind, port):
                late, memory, connections = await measured()
            rows.append(Row(f"{name}: timer p99 grows by", late - quiet, "ms", MAX_GROWTH_MS))
            rows.append(Row(f"{name}: most memory", memory, "MiB", MAX_MIB))
            rows.append(Row(f"{name}: open connections", connections, "", 64))
    return rows


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            asyncio.run(_serve())
        case [kind, port]:
            asyncio.run(_attack(kind, int(port)))
        case _:
            for row in asyncio.run(load()):
                print(line(row), flush=True)
