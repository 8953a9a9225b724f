"""The stepping loop: single callbacks, and processes that freeze, thaw and die between two of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from usbip_sim.virtual import loop, steploop
from usbip_sim.virtual.loop import Deadlock
from usbip_sim.virtual.steploop import BusyLoop, Process, StepLoop, loop_of, run, stepped

BOTH = pytest.mark.parametrize("run_in", [run, loop.run], ids=["stepping loop", "virtual loop"])


@BOTH
def test_time_jumps_and_timers_fire_in_order(run_in: Callable[..., None]) -> None:
    order: list[int] = []

    async def note(delay: int) -> None:
        await asyncio.sleep(delay)
        order.append(delay)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for delay in (3600, 10, 20):
                group.create_task(note(delay))
        assert asyncio.get_running_loop().time() == pytest.approx(3600)

    run_in(main)
    assert order == [10, 20, 3600]


@stepped
async def test_a_cancelled_timer_neither_fires_nor_moves_time() -> None:
    stepping = loop_of()
    fired: list[int] = []
    for i in range(1000):
        stepping.call_later(10, fired.append, i).cancel()
    stepping.call_later(1, fired.append, -1)
    await asyncio.sleep(2)
    assert fired == [-1]
    assert stepping.time() == 2


@stepped
async def test_after_each_step_the_hook_is_called() -> None:
    stepping = loop_of()
    observed: list[int] = []
    stepping.after_step = lambda: observed.append(stepping.steps)
    for _ in range(3):
        await asyncio.sleep(0)
    stepping.after_step = None
    assert len(observed) >= 2
    assert observed == list(range(observed[0], observed[0] + len(observed)))


@BOTH
def test_a_loop_without_anything_to_wait_for_is_a_deadlock(
    run_in: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STALL_S", 0.01)
    with pytest.raises(Deadlock):
        run_in(lambda: asyncio.Event().wait())


def test_a_busy_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steploop, "MAX_STEPS_AT_ONE_TIME", 100)

    async def busy() -> None:
        while True:  # noqa: ASYNC110 (that is what is to be found)
            await asyncio.sleep(0)

    with pytest.raises(BusyLoop):
        run(busy)


def test_an_unhandled_error_is_raised() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)

    with pytest.raises(AssertionError, match="division"):
        run(main)


class Ticker:
    """A process that records the time of every tick, and whether it was ended in order."""

    def __init__(self, name: str = "ticker", host: Process | None = None) -> None:
        self.process = Process(loop_of(), name, host)
        self.ticks: list[float] = []
        self.ended = False
        self.task = self.process.create_task(self.run(), name)

    async def run(self) -> None:
        try:
            while True:
                await asyncio.sleep(1)
                self.ticks.append(loop_of().time())
        finally:
            self.ended = True


@stepped
async def test_a_frozen_process_does_nothing_and_finds_its_timers_due() -> None:
    ticker = Ticker()
    await asyncio.sleep(2.5)
    ticker.process.freeze()
    await asyncio.sleep(10)
    assert ticker.ticks == [1, 2]
    ticker.process.thaw()
    await asyncio.sleep(2)
    assert ticker.ticks == [1, 2, 12.5, 13.5]


@stepped
async def test_a_host_freezes_with_all_its_processes() -> None:
    host = Process(loop_of(), "host")
    one, other = Ticker("one", host), Ticker("other", host)
    await asyncio.sleep(0.5)
    host.freeze()
    other.process.freeze()
    await asyncio.sleep(5)
    host.thaw()
    await asyncio.sleep(0.5)
    assert (one.ticks, other.ticks) == ([5.5], []), "the other process is also frozen"
    other.process.thaw()
    await asyncio.sleep(0.1)
    assert other.ticks == [6]


@stepped
async def test_a_process_that_starts_on_a_frozen_host_runs_when_the_host_does() -> None:
    host = Process(loop_of(), "host")
    host.freeze()
    late = Ticker("late", host)
    await asyncio.sleep(5)
    assert late.process.halted_time() == 5
    host.thaw()
    await asyncio.sleep(1.5)
    assert late.ticks == [6]


@stepped
async def test_after_a_freeze_data_is_handled_before_timers() -> None:
    """Real event loops poll for I/O before they check timers."""
    process = Process(loop_of(), "p")
    arrived: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    observed: list[str] = []

    async def wait() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                observed.append(await arrived)

    task = process.create_task(wait(), "wait")
    await asyncio.sleep(0.5)
    process.freeze()
    await asyncio.sleep(5)  # the timer has been due for long
    arrived.set_result("late")
    await asyncio.sleep(1)
    process.thaw()
    await task
    assert observed == ["late"]


@stepped
async def test_a_killed_process_runs_no_further_step() -> None:
    ticker = Ticker()
    closed: list[str] = []
    ticker.process.on_death(lambda: closed.append("socket"))
    taken_back = ticker.process.on_death(lambda: closed.append("not this one"))
    taken_back()
    await asyncio.sleep(1.5)
    ticker.process.kill()
    ticker.process.kill()
    ticker.process.thaw()
    await asyncio.sleep(5)
    assert (ticker.ticks, ticker.ended, closed) == ([1], False, ["socket"])


@pytest.mark.parametrize("count", range(1, 8))
def test_a_process_is_killed_after_exactly_so_many_steps(count: int) -> None:
    @stepped
    async def killed() -> int:
        ticker = Ticker()
        ticker.process.after_steps(count, ticker.process.kill)
        await asyncio.sleep(60)
        return ticker.process.steps

    assert killed() == count


@stepped
async def test_callbacks_and_tasks_of_a_process_belong_to_it() -> None:
    process = Process(loop_of(), "p")
    ran: list[str] = []

    async def child() -> None:
        ran.append("child")

    def called() -> None:
        ran.append("call")
        loop_of().call_later(1, ran.append, "timer")
        tasks.append(loop_of().create_task(child()))

    tasks: list[asyncio.Task[None]] = []
    process.call_soon(called)
    await asyncio.sleep(0)
    assert ran == ["call"]
    process.freeze()
    await asyncio.sleep(2)
    assert ran == ["call"]
    assert process.tasks() == tasks
    process.thaw()
    await asyncio.sleep(0)
    assert ran == ["call", "child", "timer"]
    assert process.tasks() == []


def order_of_cancellation(main: Callable[[], object] | None = None) -> list[int]:
    order: list[int] = []

    async def member(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            order.append(number)

    async def group() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1), asyncio.TaskGroup() as tasks:
                for number in range(20):
                    tasks.create_task(member(number))

    run(group)
    return order


def test_task_groups_end_in_the_same_order_each_time() -> None:
    kept: list[object] = [object() for _ in range(1000)]  # other addresses
    first = order_of_cancellation()
    del kept[::2]
    assert order_of_cancellation() == first


def test_the_loop_ends_the_tasks_of_dead_processes() -> None:
    tickers: list[Ticker] = []

    async def main() -> None:
        tickers.extend([Ticker("dead"), Ticker("frozen"), Ticker("alive")])
        await asyncio.sleep(1.5)
        tickers[0].process.kill()
        tickers[1].process.freeze()
        await asyncio.sleep(1)
        assert not any(ticker.ended for ticker in tickers)

    run(main)
    assert all(ticker.ended for ticker in tickers)


@stepped
async def test_async_generators_are_closed_at_the_end() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    async for number in numbers():
        assert number == 1
    assert isinstance(asyncio.get_running_loop(), StepLoop)
