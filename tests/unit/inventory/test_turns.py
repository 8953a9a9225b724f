"""In which order nodes offer a device that was released, and when each of them does."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Coroutine
from dataclasses import replace

import pytest
from opentelemetry.trace import NoOpTracer

from usbip_plugin.context import NodeContext
from usbip_plugin.inventory.turns import OFFERED_BY_ALL_S, SLOT_S, TOGETHER_S, Turns, delay, rank
from usbip_plugin.kube.fleet import MAX_NAMED, UNCOUNTED, Fleet
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Lock, NodeIdentity, PodRef
from usbip_sim.virtual.loop import SimClock, virtual

DEVICE = "usbip-device"
NAMES = [f"node-{n}" for n in range(MAX_NAMED)]
POD = PodRef("default", "p")


def lock(holder: str, epoch: int = 1, pod: PodRef | None = None) -> Lock:
    return Lock(DEVICE, holder, epoch, 40.0, "1", pod=pod)


def released(by: str, epoch: int = 1, pod: PodRef | None = POD) -> LockChange:
    return LockChange(DEVICE, lock(by, epoch, pod), lock("", epoch))


def ranks(fleet: Fleet, change: LockChange, names: list[str] = NAMES) -> dict[str, int]:
    return {name: rank(fleet, name, change) for name in names}


def test_nodes_that_know_each_other_have_a_rank_each() -> None:
    fleet = Fleet(len(NAMES), frozenset(NAMES))
    for epoch in range(20):
        assert sorted(ranks(fleet, released("node-3", epoch)).values()) == list(range(len(NAMES)))


@pytest.mark.parametrize("fleet", [Fleet(3, frozenset(NAMES[:3])), Fleet(500), Fleet(UNCOUNTED)])
def test_the_former_holder_is_first_and_alone_unless_its_allocate_failed(fleet: Fleet) -> None:
    used, failed = (ranks(fleet, released("node-0", 1, pod), NAMES[:3]) for pod in (POD, None))
    assert used["node-0"] == failed["node-0"] == 0
    assert min(used["node-1"], used["node-2"]) > 0
    assert {name: used[name] - 1 for name in NAMES[1:3]} == {name: failed[name] for name in NAMES[1:3]}


def test_the_order_of_the_others_changes_with_the_epoch() -> None:
    fleet = Fleet(3, frozenset(NAMES[:3]))
    seconds = {min(NAMES[1:3], key=ranks(fleet, released("node-0", epoch)).__getitem__) for epoch in range(20)}
    assert seconds == {"node-1", "node-2"}


def test_a_node_that_the_others_do_not_know_yet_has_a_rank_among_them() -> None:
    assert 1 <= rank(Fleet(3, frozenset(NAMES[:3])), "new", released("node-0")) <= 3
    assert rank(Fleet(1), "alone", released("alone", pod=None)) == 0


def test_without_names_the_ranks_are_spread_over_the_fleet() -> None:
    drawn = ranks(Fleet(200), released("gone"), [f"n{n}" for n in range(200)])
    assert min(drawn.values()) >= 1
    assert max(drawn.values()) <= 199
    assert len(set(drawn.values())) > 100


def test_turns_are_a_slot_apart_at_first_and_over_in_time() -> None:
    assert [delay(place) / SLOT_S for place in range(8)] == [0, 1, 2, 2.5, 3, 3.25, 3.5, 3.75]
    seconds = [delay(place) for place in range(5000)]
    assert seconds == sorted(seconds)
    assert seconds[-1] == OFFERED_BY_ALL_S - TOGETHER_S


class Node:
    """node-1 of a fleet of two, and when (seconds since the first release) its turns came."""

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
            fleet=lambda: Fleet(2, frozenset({"node-0", "node-1"})),
            spawn=spawn,
            on_turn=lambda _device: self.turns.append(loop.time() - began),
        )

    def _ended(self, _task: asyncio.Task[None]) -> None:
        self.tasks -= 1

    def waits(self) -> bool:
        assert self.part.awaited() == self.part.awaited([DEVICE, "other"])
        return bool(self.part.awaited())


@virtual
async def test_a_device_is_awaited_until_this_nodes_turn() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        node.part.lock_changed(released("node-0"))
        assert node.waits()
        await asyncio.sleep(SLOT_S + 0.01)
        assert not node.waits()
        assert node.turns == pytest.approx([SLOT_S])


@virtual
async def test_a_lock_that_is_taken_or_gone_ends_the_turns() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        for over in (LockChange(DEVICE, lock(""), lock("node-0", 2)), LockChange(DEVICE, lock(""), None)):
            node.part.lock_changed(released("node-0"))
            node.part.lock_changed(over)
            assert not node.waits()
    assert not node.turns


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


@virtual
async def test_turns_of_devices_that_are_released_one_after_another_come_together() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        for number in range(20):
            await asyncio.sleep(TOGETHER_S / 25)
            node.part.lock_changed(replace(released("node-0"), device_id=f"device-{number}"))
    assert len(node.turns) == 20
    assert len(set(node.turns)) == 1


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
