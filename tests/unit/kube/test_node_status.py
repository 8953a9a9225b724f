"""Publishing allocatable: the latest counts, only our keys, never in the way."""

import asyncio
import random
from collections.abc import Mapping
from typing import Self

import pytest

from tests.rigs.api_double import ApiDouble
from usbip_plugin.errors import KubeError, KubeForbidden, KubeUnreachable
from usbip_plugin.kube.node_status import FORBIDDEN_WAIT_S, KUBELET_SYNC_S, NodeStatusPublisher, patch_status, spread
from usbip_plugin.sync import Broadcast
from usbip_sim.virtual.loop import SimClock, virtual

STORAGE, MODEM = "usbip.dev/storage", "usbip.dev/modem"
PATCH_S = 0.02


class Node:
    """Takes PATCH_S for each write; raises what is in `errors` first."""

    def __init__(self) -> None:
        self.allocatable = {"cpu": 4, STORAGE: 1}
        self.patches: list[Mapping[str, int]] = []
        self.patched = Broadcast()
        self.errors: list[KubeError] = []

    async def write(self, counts: Mapping[str, int]) -> None:
        await asyncio.sleep(PATCH_S)
        self.patches.append(counts)
        self.patched.fire()
        if self.errors:
            raise self.errors.pop(0)
        self.allocatable.update(counts)


class Running:
    """A publisher whose worker runs for the length of the block."""

    def __init__(self, nodes: int = 1, seed: int = 1) -> None:
        self.node = Node()
        clock = SimClock(asyncio.get_running_loop())
        self.publisher = NodeStatusPublisher(self.node.write, clock, random.Random(seed), lambda: nodes)

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.publisher.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled()


async def test_the_patch_names_our_resources_only_and_counts_are_quantities() -> None:
    api = ApiDouble()
    await patch_status(api, "node-a", {STORAGE: 0, MODEM: 12})
    (call,) = api.calls
    assert (call.verb, call.path, call.resource) == ("patch", "/api/v1/nodes/node-a/status", "nodes/status")
    assert call.body == {"status": {"allocatable": {MODEM: "12", STORAGE: "0"}}}


@virtual
async def test_publish_now_returns_when_the_node_says_so() -> None:
    async with Running() as r:
        assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
        assert r.node.allocatable == {"cpu": 4, STORAGE: 0}


@virtual
async def test_what_is_written_already_is_not_written_again() -> None:
    async with Running() as r:
        for _ in range(3):
            assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
            await asyncio.sleep(10 * PATCH_S)
        assert len(r.node.patches) == 1
        r.publisher.forget(STORAGE)
        assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
        assert len(r.node.patches) == 2


@virtual
async def test_a_burst_becomes_few_patches_and_the_last_count_stands() -> None:
    async with Running() as r:
        for count in range(100):
            r.publisher.publish({STORAGE: count, MODEM: 1})
            await asyncio.sleep(PATCH_S / 10)
        assert await r.publisher.publish_now({STORAGE: 7}, 1.0)
        assert r.node.allocatable == {"cpu": 4, STORAGE: 7, MODEM: 1}
        assert len(r.node.patches) < 20


@virtual
async def test_a_count_that_changes_during_its_patch_is_written_too() -> None:
    async with Running() as r:
        r.publisher.publish({STORAGE: 0})
        await asyncio.sleep(PATCH_S / 2)
        r.publisher.publish({STORAGE: 1})
        r.publisher.publish({STORAGE: 0})
        r.publisher.publish({STORAGE: 3})
        await asyncio.sleep(1)
        assert r.node.allocatable[STORAGE] == 3


@virtual
async def test_errors_are_tried_again_and_publish_now_is_bounded() -> None:
    async with Running() as r:
        r.node.errors = [KubeUnreachable("patch", "nodes/status", "refused")] * 20
        loop = asyncio.get_running_loop()
        start = loop.time()
        assert not await r.publisher.publish_now({STORAGE: 0}, 1.0)
        assert loop.time() - start <= 1.01
        await asyncio.sleep(300)
        assert r.node.allocatable[STORAGE] == 0
        assert not r.node.errors, "each was tried again"
        assert r.publisher.last_error is None


@virtual
async def test_forbidden_costs_an_allocate_nothing() -> None:
    async with Running() as r:
        r.node.errors = [KubeForbidden("patch", "nodes/status", "no")]
        loop = asyncio.get_running_loop()
        assert not await r.publisher.publish_now({STORAGE: 0}, 1.0)
        start = loop.time()
        assert not await r.publisher.publish_now({STORAGE: 2}, 1.0)
        assert loop.time() == start
        assert "patch" in (r.publisher.last_error or "")
        assert "nodes/status" in (r.publisher.last_error or "")
        await asyncio.sleep(120)
        assert r.node.allocatable[STORAGE] == 2


@virtual
async def test_after_a_403_nothing_is_written_for_a_minute_whatever_an_allocate_asks_for() -> None:
    async with Running() as r:
        r.node.errors = [KubeForbidden("patch", "nodes/status", "no")]
        for count in range(50):
            assert not await r.publisher.publish_now({STORAGE: count}, 1.0)
            await asyncio.sleep(1)
        assert len(r.node.patches) == 1
        await asyncio.sleep(FORBIDDEN_WAIT_S - 49)
        assert r.node.patches[1:] == [{STORAGE: 49}]


@virtual
async def test_an_urgent_count_does_not_wait_out_a_backoff() -> None:
    async with Running() as r:
        r.node.errors = [KubeUnreachable("patch", "nodes/status", "refused")] * 8
        r.publisher.publish({STORAGE: 1})
        await asyncio.sleep(20)
        r.node.errors.clear()
        assert await r.publisher.publish_now({STORAGE: 0}, 2 * PATCH_S)


def test_lower_counts_are_written_sooner_than_higher_ones_and_all_before_the_kubelet_has() -> None:
    assert spread(100, lower=True) < spread(100, lower=False) < KUBELET_SYNC_S
    assert spread(2, lower=True) < 0.01, "a small cluster does not wait"
    assert spread(10**6, lower=True) == spread(10**6, lower=False) == KUBELET_SYNC_S


SOME, MANY, VERY_MANY = 100, 1000, 10_000
"""Nodes that write all, only lower counts, nothing."""


async def written_after(nodes: int, seed: int, before: int, after: int) -> float:
    """Seconds from a change to its writing."""
    async with Running(nodes, seed) as r:
        assert await r.publisher.publish_now({STORAGE: before}, 1.0)
        changed = asyncio.get_running_loop().time()
        r.publisher.publish({STORAGE: after})
        await r.node.patched.until(lambda: len(r.node.patches) == 2)
        return asyncio.get_running_loop().time() - changed - PATCH_S


@virtual
async def test_nodes_take_turns() -> None:
    for nodes, before, after in ((MANY, 1, 0), (SOME, 0, 1)):
        within = spread(nodes, lower=after < before)
        times = [await written_after(nodes, seed, before, after) for seed in range(40)]
        assert max(times) <= within + 0.01
        assert max(times) - min(times) > within / 2


@virtual
async def test_a_lower_count_after_a_higher_one_has_a_turn_of_its_own() -> None:
    """All nodes hear of it at once, however long each has waited to write the higher one."""
    times = []
    for seed in range(40):
        async with Running(MANY, seed) as r:
            assert await r.publisher.publish_now({STORAGE: 1}, 1.0)
            r.publisher.publish({STORAGE: 2})
            await asyncio.sleep(5)
            assert len(r.node.patches) == 1
            changed = asyncio.get_running_loop().time()
            r.publisher.publish({STORAGE: 0})
            await r.node.patched.until(lambda: len(r.node.patches) == 2)
            times.append(asyncio.get_running_loop().time() - changed - PATCH_S)
    assert max(times) <= spread(MANY, lower=True) + 0.01
    assert max(times) - min(times) > spread(MANY, lower=True) / 2


@virtual
async def test_a_turn_for_a_lower_count_is_not_put_off_by_still_lower_ones() -> None:
    for seed in range(10):
        async with Running(MANY, seed) as r:
            assert await r.publisher.publish_now({STORAGE: 1000}, 1.0)
            changed = asyncio.get_running_loop().time()
            for count in range(999, 0, -1):
                r.publisher.publish({STORAGE: count})
                await asyncio.sleep(0.01)
                if len(r.node.patches) == 2:
                    break
            waited = asyncio.get_running_loop().time() - changed
            assert waited <= spread(MANY, lower=True) + PATCH_S + 0.02


@virtual
async def test_a_lower_count_that_is_taken_back_before_its_turn_is_not_written() -> None:
    async with Running(MANY, seed=4) as r:
        assert await r.publisher.publish_now({STORAGE: 1}, 1.0)
        for _ in range(10):
            r.publisher.publish({STORAGE: 0})
            await asyncio.sleep(0.01)
            r.publisher.publish({STORAGE: 1})
            await asyncio.sleep(30)
        assert len(r.node.patches) <= 2


@virtual
async def test_a_higher_count_that_is_taken_back_is_written_because_the_kubelet_may_have_written_the_other() -> None:
    async with Running(SOME, seed=3) as r:
        assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
        r.publisher.publish({STORAGE: 1})
        await asyncio.sleep(0.01)
        assert len(r.node.patches) == 1
        r.node.allocatable[STORAGE] = 1  # the kubelet's own sync
        r.publisher.publish({STORAGE: 0})
        await asyncio.sleep(spread(SOME, lower=True) + 2 * PATCH_S)
        assert r.node.allocatable[STORAGE] == 0
        assert len(r.node.patches) == 2
        await asyncio.sleep(60)
        assert len(r.node.patches) == 2


@virtual
@pytest.mark.parametrize("known", [True, False])
async def test_a_count_below_what_the_kubelet_was_told_is_a_lower_one_whatever_was_written_before(known: bool) -> None:
    """The kubelet may have written the higher one, which is left to it among so many nodes."""
    async with Running(MANY, seed=3) as r:
        if known:
            assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
        before = len(r.node.patches)
        r.publisher.publish({STORAGE: 2})
        await asyncio.sleep(5)
        assert len(r.node.patches) == before
        r.publisher.publish({STORAGE: 1})
        await asyncio.sleep(spread(MANY, lower=True) + 2 * PATCH_S)
        assert r.node.patches[before:] == [{STORAGE: 1}]


@virtual
async def test_what_the_kubelets_write_as_soon_is_left_to_them() -> None:
    for nodes, patches in ((SOME, [1, 0, 1]), (MANY, [1, 0, 0]), (VERY_MANY, [1])):
        async with Running(nodes, seed=2) as r:
            assert await r.publisher.publish_now({STORAGE: 1}, 1.0)
            for count in (0, 1, 0) if nodes == MANY else (0, 1):
                r.publisher.publish({STORAGE: count})
                await asyncio.sleep(3 * KUBELET_SYNC_S)
            assert [p[STORAGE] for p in r.node.patches] == patches


@virtual
async def test_what_an_allocate_waits_for_waits_for_no_turn() -> None:
    async with Running(VERY_MANY) as r:
        assert await r.publisher.publish_now({STORAGE: 1}, 2 * PATCH_S)
        r.publisher.publish({STORAGE: 0})
        await asyncio.sleep(0.001)
        assert await r.publisher.publish_now({STORAGE: 0}, 2 * PATCH_S)
        assert await r.publisher.publish_now({STORAGE: 0}, 2 * PATCH_S), "written already"
        r.publisher.publish({STORAGE: 1})
        await asyncio.sleep(1)
        assert len(r.node.patches) == 2, "that one waits"
