"""Waiting, settling, and which ports to leave alone; on a clock that is turned by hand."""

from __future__ import annotations

import asyncio

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.sync import RECHECK_S, Broadcast
from usbip_plugin.vhci.sysfs import SAME_CONTROLLER, SAME_PORT, STALL_S, Port, PortCooldown, PortStatus
from usbip_plugin.vhci.uevents import RESYNC_S, SETTLE_S, settle
from usbip_sim.virtual.loop import VirtualLoop


class LoopClock(SystemClock):
    """The loop's time, which is virtual."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


def virtually(main: object) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)  # type: ignore[arg-type]


class TestUntil:
    def test_what_is_true_already_is_not_waited_for(self) -> None:
        async def main() -> None:
            assert await Broadcast().until_within(lambda: "yes", LoopClock(), timeout=1) == "yes"
            assert asyncio.get_running_loop().time() == 0

        virtually(main())

    def test_a_change_makes_it_look_at_once(self) -> None:
        async def main() -> None:
            changed, answers = Broadcast(), [None, "yes"]
            waiting = asyncio.create_task(changed.until_within(lambda: answers.pop(0), LoopClock(), timeout=1))
            await asyncio.sleep(0)
            changed.fire()
            assert await waiting == "yes"
            assert asyncio.get_running_loop().time() == 0

        virtually(main())

    def test_without_a_change_it_looks_again_by_itself(self) -> None:
        async def main() -> None:
            answers = [None, None, "yes"]
            assert await Broadcast().until_within(lambda: answers.pop(0), LoopClock(), timeout=1) == "yes"
            assert asyncio.get_running_loop().time() == pytest.approx(2 * RECHECK_S)

        virtually(main())

    def test_it_ends_with_the_timeout(self) -> None:
        async def main() -> None:
            with pytest.raises(TimeoutError):
                await Broadcast().until_within(lambda: None, LoopClock(), timeout=0.32)
            assert asyncio.get_running_loop().time() == pytest.approx(0.32)

        virtually(main())

    def test_it_leaves_no_waiter(self) -> None:
        async def main() -> None:
            changed = Broadcast()
            with pytest.raises(TimeoutError):
                await changed.until_within(lambda: None, LoopClock(), timeout=0.1)
            assert not changed._callbacks
            assert not changed._event._waiters

        virtually(main())

    def test_what_the_check_raises_passes_through(self) -> None:
        def check() -> None:
            raise ValueError("no")

        async def main() -> None:
            with pytest.raises(ValueError, match="no"):
                await Broadcast().until_within(check, LoopClock(), timeout=1)

        virtually(main())


class TestSettle:
    def test_it_rings_a_few_times_after_the_last_event_then_seldom(self) -> None:
        async def main() -> None:
            loop, changed, stirred = asyncio.get_running_loop(), Broadcast(), asyncio.Event()
            rings: list[float] = []
            changed.subscribe(lambda: rings.append(loop.time()))
            task = asyncio.create_task(settle(changed, stirred, LoopClock()))
            await asyncio.sleep(1)
            stirred.set()
            await asyncio.sleep(30)
            task.cancel()
            soon = [1 + sum(SETTLE_S[: n + 1]) for n in range(len(SETTLE_S))]
            assert rings == pytest.approx([*soon, soon[-1] + RESYNC_S])

        virtually(main())

    def test_an_event_starts_the_waiting_anew(self) -> None:
        async def main() -> None:
            loop, changed, stirred = asyncio.get_running_loop(), Broadcast(), asyncio.Event()
            rings: list[float] = []
            changed.subscribe(lambda: rings.append(loop.time()))
            task = asyncio.create_task(settle(changed, stirred, LoopClock()))
            for _ in range(3):
                stirred.set()
                await asyncio.sleep(SETTLE_S[0] / 2)
            assert rings == []
            await asyncio.sleep(SETTLE_S[0])
            task.cancel()
            assert len(rings) == 1

        virtually(main())


class TestStalls:
    def test_the_port_and_its_controller_are_avoided_for_a_while(self) -> None:
        async def main() -> None:
            stalls = PortCooldown(LoopClock())
            port = Port(3, "hs", PortStatus.NULL, controller=0)
            sibling = Port(15, "ss", PortStatus.NULL, controller=0)
            elsewhere = Port(30, "hs", PortStatus.NULL, controller=1)
            assert [stalls.penalty(one) for one in (port, sibling, elsewhere)] == [0, 0, 0]
            stalls.mark(port)
            assert [stalls.penalty(one) for one in (port, sibling, elsewhere)] == [SAME_PORT, SAME_CONTROLLER, 0]
            await asyncio.sleep(STALL_S)
            assert [stalls.penalty(one) for one in (port, sibling, elsewhere)] == [0, 0, 0]

        virtually(main())
