"""Waits for a Broadcast, the looks after uevents, and the ports to avoid, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.rigs.tasks import background
from usbip_plugin.sync import RECHECK_S, Broadcast
from usbip_plugin.vhci.sysfs import SAME_CONTROLLER, SAME_PORT, STALL_S, Port, PortCooldown, PortStatus
from usbip_plugin.vhci.uevents import RESYNC_S, SETTLE_S, settle
from usbip_sim.virtual.loop import SimClock, virtual


def now() -> float:
    return asyncio.get_running_loop().time()


def clock() -> SimClock:
    return SimClock(asyncio.get_running_loop())


class TestUntil:
    @virtual
    async def test_a_true_condition_is_not_waited_for(self) -> None:
        assert await Broadcast().until_within(lambda: "yes", clock(), timeout=1) == "yes"
        assert now() == 0

    @virtual
    async def test_a_change_checks_the_condition_at_once(self) -> None:
        changed, answers = Broadcast(), [None, "yes"]
        waiting = asyncio.create_task(changed.until_within(lambda: answers.pop(0), clock(), timeout=1))
        await asyncio.sleep(0)
        changed.fire()
        assert await waiting == "yes"
        assert now() == 0

    @virtual
    async def test_without_a_change_the_condition_is_checked_at_intervals(self) -> None:
        answers = [None, None, "yes"]
        assert await Broadcast().until_within(lambda: answers.pop(0), clock(), timeout=1) == "yes"
        assert now() == pytest.approx(2 * RECHECK_S)

    @virtual
    async def test_the_timeout_ends_the_wait_and_its_subscription(self) -> None:
        changed = Broadcast()
        with pytest.raises(TimeoutError):
            await changed.until_within(lambda: None, clock(), timeout=0.32)
        assert now() == pytest.approx(0.32)
        assert not changed._callbacks
        assert not changed._event._waiters

    @virtual
    async def test_an_error_of_the_condition_is_raised(self) -> None:
        def check() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await Broadcast().until_within(check, clock(), timeout=1)


@contextlib.asynccontextmanager
async def settling() -> AsyncIterator[tuple[asyncio.Event, list[float]]]:
    """Runs settle(), and yields the event of a uevent and the times of the looks."""
    changed, stirred, looks = Broadcast(), asyncio.Event(), list[float]()
    changed.subscribe(lambda: looks.append(now()))
    async with background(settle(changed, stirred, clock())):
        yield stirred, looks


class TestSettle:
    @virtual
    async def test_it_looks_a_few_times_after_the_last_uevent_and_then_rarely(self) -> None:
        async with settling() as (stirred, looks):
            await asyncio.sleep(1)
            stirred.set()
            await asyncio.sleep(30)
        soon = [1 + sum(SETTLE_S[: n + 1]) for n in range(len(SETTLE_S))]
        assert looks == pytest.approx([*soon, soon[-1] + RESYNC_S])

    @virtual
    async def test_a_uevent_restarts_the_wait(self) -> None:
        async with settling() as (stirred, looks):
            for _ in range(3):
                stirred.set()
                await asyncio.sleep(SETTLE_S[0] / 2)
            assert looks == []
            await asyncio.sleep(SETTLE_S[0])
        assert len(looks) == 1


@virtual
async def test_a_stuck_port_and_its_controller_are_avoided_for_a_while() -> None:
    cooldown = PortCooldown(clock())
    ports = [
        Port(3, "hs", PortStatus.NULL, controller=0),
        Port(15, "ss", PortStatus.NULL, controller=0),
        Port(30, "hs", PortStatus.NULL, controller=1),
    ]
    assert [cooldown.penalty(port) for port in ports] == [0, 0, 0]
    cooldown.mark(ports[0])
    assert [cooldown.penalty(port) for port in ports] == [SAME_PORT, SAME_CONTROLLER, 0]
    await asyncio.sleep(STALL_S)
    assert [cooldown.penalty(port) for port in ports] == [0, 0, 0]
