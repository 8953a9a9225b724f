"""In which order nodes offer a device that was released, and when each of them does."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Coroutine
from dataclasses import replace
from unittest.mock import patch

import pytest
from opentelemetry.trace import NoOpTracer

from usbip_plugin.context import NodeContext
from usbip_plugin.inventory import turns
from usbip_plugin.inventory.turns import OFFERED_BY_ALL_S, SLOT_S, TOGETHER_S, Turns, delay, rank
from usbip_plugin.kube.fleet import MAX_NAMED, Fleet
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Lock, NodeIdentity
from usbip_sim.virtual.loop import SimClock, virtual

DEVICE = "usbip-device"
NAMES = [f"node-{n}" for n in range(MAX_NAMED)]


def lock(holder: str, epoch: int = 1) -> Lock:
    return Lock(DEVICE, holder, epoch, 40.0, "1")


def released(by: str, epoch: int = 1) -> LockChange:
    return LockChange(DEVICE, lock(by, epoch), lock("", epoch))


def ranks(fleet: Fleet, change: LockChange, names: list[str] = NAMES) -> dict[str, int]:
    return {name: rank(fleet, name, change) for name in names}


def test_nodes_that_know_each_other_have_a_rank_each_but_for_the_former_holder() -> None:
    fleet = Fleet(len(NAMES), frozenset(NAMES))
    for epoch in range(20):
        found = ranks(fleet, released("node-3", epoch))
        assert found.pop("node-3") == 0
        assert sorted(found.values()) == list(range(len(NAMES) - 1))


def test_the_order_of_the_others_changes_with_the_epoch() -> None:
    fleet = Fleet(3, frozenset(NAMES[:3]))
    seconds = {min(NAMES[1:3], key=ranks(fleet, released("node-0", epoch)).__getitem__) for epoch in range(20)}
    assert seconds == {"node-1", "node-2"}


def test_a_node_that_the_others_do_not_know_yet_has_a_rank_among_them() -> None:
    assert 0 <= rank(Fleet(3, frozenset(NAMES[:3])), "new", released("node-0")) <= 2
    assert rank(Fleet(1), "alone", released("alone")) == 0


def test_without_names_the_ranks_are_spread_over_the_fleet() -> None:
    drawn = ranks(Fleet(200), released("gone"), [f"n{n}" for n in range(200)])
    assert min(drawn.values()) >= 0
    assert max(drawn.values()) < 199
    assert len(set(drawn.values())) > 100


def test_turns_are_a_slot_apart_at_first_and_over_in_time() -> None:
    assert [delay(place) / SLOT_S for place in range(8)] == [0, 1, 2, 2.5, 3, 3.25, 3.5, 3.75]
    seconds = [delay(place) for place in range(5000)]
    assert seconds == sorted(seconds)
    assert seconds[-1] == OFFERED_BY_ALL_S - TOGETHER_S


second = patch.object(turns, "rank", lambda _fleet, node, change: int(node != change.former))
"""Makes each node except the former holder the second one."""


class Node:
    """node-1 of a fleet, and when (seconds since the first release) its turns came."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        self.turns: list[float] = []
        self.tasks = 0
        began = loop.time()
        context = NodeContext(NodeIdentity("node-1", "boot"), SimClock(loop), random.Random(1), NoOpTracer())

        def spawn(work: Coroutine[object, object, None]) -> None:
            self.tasks += 1
            tasks.create_task(work).add_done_callback(self._ended)

        self.part = Turns(
            context,
            fleet=lambda: Fleet(3),
            spawn=spawn,
            on_turn=lambda _device: self.turns.append(loop.time() - began),
        )

    def _ended(self, _task: asyncio.Task[None]) -> None:
        self.tasks -= 1

    def waits(self) -> bool:
        assert self.part.awaited() == self.part.awaited([DEVICE, "other"])
        return bool(self.part.awaited())


@second
@virtual
async def test_a_device_is_awaited_until_this_nodes_turn() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        node.part.lock_changed(released("node-0"))
        assert node.waits()
        await asyncio.sleep(SLOT_S + 0.01)
        assert not node.waits()
        assert node.turns == pytest.approx([SLOT_S])


@second
@virtual
async def test_a_lock_that_is_taken_or_gone_ends_the_turns() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        for over in (LockChange(DEVICE, lock(""), lock("node-0", 2)), LockChange(DEVICE, lock(""), None)):
            node.part.lock_changed(released("node-0"))
            node.part.lock_changed(over)
            assert not node.waits()
    assert not node.turns


@second
@virtual
async def test_each_release_begins_the_turns_again_in_one_task() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        for epoch in range(1, 4):
            node.part.lock_changed(released("node-0", epoch))
            await asyncio.sleep(SLOT_S / 2)
            node.part.lock_changed(LockChange(DEVICE, lock(""), lock("node-0", epoch + 1)))
            assert node.tasks == 1
        node.part.lock_changed(released("node-0", 4))
    assert node.turns == pytest.approx([math.ceil(2.5 * SLOT_S / TOGETHER_S) * TOGETHER_S])


@second
@virtual
async def test_turns_of_devices_that_are_released_one_after_another_come_together() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        for number in range(20):
            await asyncio.sleep(TOGETHER_S / 25)
            node.part.lock_changed(replace(released("node-0"), device_id=f"device-{number}"))
    assert len(node.turns) == 20
    assert len(set(node.turns)) == 1


@second
@virtual
async def test_what_this_process_has_not_seen_released_or_has_released_itself_is_not_awaited() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        for change in (
            LockChange(DEVICE, None, lock("")),
            LockChange(DEVICE, lock(""), lock("")),
            LockChange(DEVICE, lock("node-0"), None),
            released("node-1"),
        ):
            node.part.lock_changed(change)
            assert not node.waits()
            assert node.tasks == 0
