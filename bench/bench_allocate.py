"""Time of an Allocate, also beside a server that does not answer and among many devices."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from unittest import mock

from bench.bench_nodes import (
    NAMESPACE,
    Place,
    allocate_times,
    connected,
    keys_of,
    nodes,
    timed_allocate,
    virtual_server,
)
from bench.bench_rows import Row, p50_p99, percentile
from tests.rigs.agents_rig import Nodes
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LeaseStore
from usbip_plugin.model import DeviceKey
from usbip_sim.server.server import VirtualServer

OVER_MS = 30.0
"""Milliseconds that an Allocate may take beyond the kernel's own time."""
ENUMERATION_S = 0.3
"""Seconds of a kernel from the attach write to the device node, measured as 0.28-0.38 s."""
TIMEOUT_S = 2.0
"""allocateTimeout while servers do not answer."""
DELAY_TARGET_MS = 50.0
MANY, SERVERS = 500, 5
MANY_MS = 5.0
"""Milliseconds of processor time that so many devices may add to an Allocate."""
HELD_MS = 10.0
"""Milliseconds that one callback may block the event loop."""


async def allocate(kubeconfig: str | None, count: int) -> list[Row]:
    """Measures an Allocate without the kernel's time, which the simulated kernel keeps exactly.

    kubeconfig: None for Leases in memory.
    """
    async with contextlib.AsyncExitStack() as stack:
        leases: Callable[[str], LeaseStore] | None = None
        if kubeconfig is not None:
            store = KubernetesLeases(await stack.enter_async_context(connected(kubeconfig)), NAMESPACE)
            leases = lambda _node: store  # noqa: E731
        server = await stack.enter_async_context(virtual_server())
        place = Place(("solo",), (server.key,), keys_of(server), leases=leases, enumeration_delay=ENUMERATION_S)
        async with nodes(place) as found:
            times = await allocate_times(found, place.keys[0], count)
    over = [took - ENUMERATION_S * 1e3 for took in times]
    where = "memory" if kubeconfig is None else "API server"
    return p50_p99(f"Allocate over the kernel's {ENUMERATION_S:g} s (simulated kernel, Leases: {where})", over, OVER_MS)


async def unanswered(count: int) -> list[Row]:
    """Measures an Allocate beside a server that is silent, closed or drops SYNs, and an Allocate from that server."""
    rows: list[Row] = []
    for name, broken in (("silent", _silent), ("closed", _closed), ("dropping SYNs", _dropping)):
        async with virtual_server() as good, virtual_server() as bad:
            place = Place(("solo",), (good.key, bad.key), keys_of(good, bad), allocate_timeout=TIMEOUT_S)
            async with nodes(place) as found:
                before = await allocate_times(found, place.keys[0], count)
                async with broken(bad):
                    during, ends = await _meanwhile(found, place.keys[0], place.keys[1])
        delay = percentile(during, 99) - percentile(before, 50)
        rows.append(
            Row(f"Allocate delayed by a server {name} (p99 against p50)", delay, "ms", DELAY_TARGET_MS, len(during))
        )
        rows.append(Row(f"Allocate to a server {name} ends within", max(ends), "ms", TIMEOUT_S * 1e3, len(ends)))
    return rows


async def among_many(count: int) -> list[Row]:
    """Measures an Allocate with 500 devices on offer: its processor time, and its longest callback.

    The time with five devices is subtracted. It contains that of the doubles, which run on the same loop.
    """
    few, _ = await _spent(1, count)
    many, held = await _spent(MANY // SERVERS, count)
    return [
        Row(
            f"Allocate among {MANY} devices, processor time beyond one among {SERVERS}",
            many - few,
            "ms",
            MANY_MS,
            count,
        ),
        Row(f"Allocate among {MANY} devices, the event loop held at most", held, "ms", HELD_MS, count),
    ]


async def _spent(each: int, count: int) -> tuple[float, float]:
    """Returns the median of an Allocate and the maximum of a callback, in milliseconds of processor time."""
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(virtual_server(each)) for _ in range(SERVERS)]
        keys = [DeviceKey(server.key, f"1-{n + 1}") for n in range(each) for server in servers]
        place = Place(("solo",), tuple(server.key for server in servers), tuple(keys))
        found = await stack.enter_async_context(nodes(place))
        times: list[float] = []
        longest = 0.0
        with _callbacks() as callbacks:
            for number in range(count):
                key = place.keys[number % SERVERS]
                callbacks.clear()
                began = time.thread_time()
                await timed_allocate(found, found.nodes[0], key)
                times.append((time.thread_time() - began) * 1e3)
                longest = max(longest, *callbacks)
                await found.end_pod(found.nodes[0], key)
        return percentile(times, 50), longest


@contextlib.contextmanager
def _callbacks() -> Iterator[list[float]]:
    """Yields a list that gets the milliseconds of processor time of each callback of the event loop."""
    times: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        times.append((time.thread_time() - began) * 1e3)

    with mock.patch.object(asyncio.Handle, "_run", timed):
        yield times


async def _meanwhile(found: Nodes, good: DeviceKey, bad: DeviceKey) -> tuple[list[float], list[float]]:
    """Returns the milliseconds of Allocates from a good server and of those from a bad server at the same time."""
    during: list[float] = []
    ends: list[float] = []
    stop = time.perf_counter() + TIMEOUT_S

    async def keep_asking() -> None:
        while not ends or time.perf_counter() < stop:
            began = time.perf_counter()
            answer = await found.allocate(found.nodes[0], bad)
            ends.append((time.perf_counter() - began) * 1e3)
            if answer.response is not None:
                raise RuntimeError("a server that does not answer gave a device away")

    asking = asyncio.create_task(keep_asking())
    try:
        while not asking.done():
            during.append(await timed_allocate(found, found.nodes[0], good))
            await found.end_pod(found.nodes[0], good)
    finally:
        await asking
    return during, ends


@contextlib.asynccontextmanager
async def _silent(server: VirtualServer) -> AsyncIterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@contextlib.asynccontextmanager
async def _closed(server: VirtualServer) -> AsyncIterator[None]:
    await server.stop()
    yield


@contextlib.asynccontextmanager
async def _dropping(server: VirtualServer) -> AsyncIterator[None]:
    """Fills the backlog of a listener, so that the kernel drops SYNs."""
    await server.stop()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((server.key.host, server.key.port))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect((server.key.host, server.key.port))
        yield
