"""Virtual time: it jumps to the next timer, stops for I/O and threads, and has a rate for each node."""

import asyncio
import socket
import time

import pytest

from usbip_plugin.clock import Clock
from usbip_sim.virtual import loop as sim_loop
from usbip_sim.virtual.loop import Deadlock, SimClock, virtual


@virtual
async def test_an_hour_passes_at_once() -> None:
    clock: Clock = SimClock(asyncio.get_running_loop())
    start = clock.monotonic()
    wall = clock.now()
    await clock.sleep(3600)
    assert clock.monotonic() - start == pytest.approx(3600)
    assert (clock.now() - wall).total_seconds() == pytest.approx(3600)


@virtual
async def test_timers_fire_in_order() -> None:
    order: list[int] = []

    async def note(delay: int) -> None:
        await asyncio.sleep(delay)
        order.append(delay)

    async with asyncio.TaskGroup() as group:
        for delay in (30, 10, 20):
            group.create_task(note(delay))
    assert order == [10, 20, 30]


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


def test_a_deadlock_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_loop, "STALL_S", 0.01)

    async def stuck() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        sim_loop.run(stuck)
