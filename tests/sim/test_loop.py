"""Virtual time: it jumps to the next timer, stops for I/O and threads, and has a rate for each node."""

import asyncio
import socket
import time

import pytest

from usbip_plugin.clock import Clock
from usbip_sim.virtual.loop import SimClock, virtual


@virtual
async def test_an_hour_passes_at_once() -> None:
    clock: Clock = SimClock(asyncio.get_running_loop())
    start = clock.monotonic()
    wall = clock.now()
    await clock.sleep(3600)
    assert clock.monotonic() - start == pytest.approx(3600)
    assert (clock.now() - wall).total_seconds() == pytest.approx(3600)


@virtual
async def test_rates_differ_per_node() -> None:
    loop = asyncio.get_running_loop()
    fast, slow = SimClock(loop, 1.9), SimClock(loop, 1.0)
    started = slow.monotonic()
    before = fast.monotonic()
    await fast.sleep(19)
    assert fast.monotonic() - before == pytest.approx(19)
    assert slow.monotonic() - started == pytest.approx(10)


@virtual
async def test_timeout_in_node_seconds() -> None:
    loop = asyncio.get_running_loop()
    clock = SimClock(loop, 2.0)
    with pytest.raises(TimeoutError):
        async with clock.timeout(10):
            await asyncio.Event().wait()
    assert loop.time() == pytest.approx(5)


@virtual
async def test_data_on_a_socket_is_read_before_time_moves() -> None:
    loop = asyncio.get_running_loop()
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        left.send(b"x")
        async with asyncio.timeout(0.001):
            assert await loop.sock_recv(right, 1) == b"x"
        assert loop.time() == 0


@virtual
async def test_time_stands_still_while_a_thread_works() -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(1):
        await asyncio.to_thread(time.sleep, 0.05)
    assert loop.time() == 0
