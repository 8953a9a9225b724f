"""The allocatable counts in the Node's status: the latest ones, only of the plugin's resources, without delays."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping

import pytest

from tests.rigs.api_double import ApiDouble
from tests.rigs.tasks import background
from usbip_plugin.errors import KubeError, KubeForbidden, KubeUnreachable
from usbip_plugin.kube.node_status import FORBIDDEN_WAIT_S, KUBELET_SYNC_S, NodeStatusPublisher, patch_status, spread
from usbip_plugin.sync import Broadcast
from usbip_sim.virtual.loop import SimClock, virtual

STORAGE, MODEM = "usbip.dev/storage", "usbip.dev/modem"
PATCH_S = 0.02


class Node:
    """A Node whose writes take PATCH_S each. errors: raised by the next writes."""

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


@contextlib.asynccontextmanager
async def running(nodes: int = 1, seed: int = 1) -> AsyncIterator[tuple[Node, NodeStatusPublisher]]:
    """Runs the publisher of a node in a cluster of so many nodes."""
    node = Node()
    clock = SimClock(asyncio.get_running_loop())
    publisher = NodeStatusPublisher(node.write, clock, random.Random(seed), lambda: nodes)
    async with background(publisher.run()) as task:
        yield node, publisher
    assert task.cancelled()


async def test_the_patch_has_only_resources_of_the_plugin_and_counts_as_quantities() -> None:
    api = ApiDouble()
    await patch_status(api, "node-a", {STORAGE: 0, MODEM: 12})
    (call,) = api.calls
    assert (call.verb, call.path, call.resource) == ("patch", "/api/v1/nodes/node-a/status", "nodes/status")
    assert call.body == {"status": {"allocatable": {MODEM: "12", STORAGE: "0"}}}


@virtual
async def test_publish_now_returns_when_the_node_has_the_count() -> None:
    async with running() as (node, publisher):
        assert await publisher.publish_now({STORAGE: 0}, 1.0)
        assert node.allocatable == {"cpu": 4, STORAGE: 0}


@virtual
async def test_a_count_is_not_written_twice() -> None:
    async with running() as (node, publisher):
        for _ in range(3):
            assert await publisher.publish_now({STORAGE: 0}, 1.0)
            await asyncio.sleep(10 * PATCH_S)
        assert len(node.patches) == 1
        publisher.forget(STORAGE)
        assert await publisher.publish_now({STORAGE: 0}, 1.0)
        assert len(node.patches) == 2


@virtual
async def test_a_burst_becomes_few_patches_that_end_with_the_last_count() -> None:
    async with running() as (node, publisher):
        for count in range(100):
            publisher.publish({STORAGE: count, MODEM: 1})
            await asyncio.sleep(PATCH_S / 10)
        assert await publisher.publish_now({STORAGE: 7}, 1.0)
        assert node.allocatable == {"cpu": 4, STORAGE: 7, MODEM: 1}
        assert len(node.patches) < 20


@virtual
async def test_a_count_that_changes_during_its_patch_is_written_too() -> None:
    async with running() as (node, publisher):
        publisher.publish({STORAGE: 0})
        await asyncio.sleep(PATCH_S / 2)
        publisher.publish({STORAGE: 1})
        publisher.publish({STORAGE: 0})
        publisher.publish({STORAGE: 3})
        await asyncio.sleep(1)
        assert node.allocatable[STORAGE] == 3


@virtual
async def test_errors_are_tried_again_and_publish_now_is_bounded() -> None:
    async with running() as (node, publisher):
        node.errors = [KubeUnreachable("patch", "nodes/status", "refused")] * 20
        loop = asyncio.get_running_loop()
        start = loop.time()
        assert not await publisher.publish_now({STORAGE: 0}, 1.0)
        assert loop.time() - start <= 1.01
        await asyncio.sleep(300)
        assert node.allocatable[STORAGE] == 0
        assert not node.errors, "each was tried again"
        assert publisher.last_error is None


@virtual
async def test_a_forbidden_patch_does_not_delay_an_allocate() -> None:
    async with running() as (node, publisher):
        node.errors = [KubeForbidden("patch", "nodes/status", "no")]
        loop = asyncio.get_running_loop()
        assert not await publisher.publish_now({STORAGE: 0}, 1.0)
        start = loop.time()
        assert not await publisher.publish_now({STORAGE: 2}, 1.0)
        assert loop.time() == start
        assert "patch" in (publisher.last_error or "")
        assert "nodes/status" in (publisher.last_error or "")
        await asyncio.sleep(120)
        assert node.allocatable[STORAGE] == 2


@virtual
async def test_after_a_403_nothing_is_written_for_a_minute_not_even_for_an_allocate() -> None:
    async with running() as (node, publisher):
        node.errors = [KubeForbidden("patch", "nodes/status", "no")]
        for count in range(50):
            assert not await publisher.publish_now({STORAGE: count}, 1.0)
            await asyncio.sleep(1)
        assert len(node.patches) == 1
        await asyncio.sleep(FORBIDDEN_WAIT_S - 49)
        assert node.patches[1:] == [{STORAGE: 49}]


@virtual
async def test_publish_now_does_not_wait_for_the_end_of_a_backoff() -> None:
    async with running() as (node, publisher):
        node.errors = [KubeUnreachable("patch", "nodes/status", "refused")] * 8
        publisher.publish({STORAGE: 1})
        await asyncio.sleep(20)
        node.errors.clear()
        assert await publisher.publish_now({STORAGE: 0}, 2 * PATCH_S)


def test_lower_counts_are_written_sooner_than_higher_ones_and_all_before_the_kubelet_has() -> None:
    assert spread(100, lower=True) < spread(100, lower=False) < KUBELET_SYNC_S
    assert spread(2, lower=True) < 0.01, "a small cluster does not wait"
    assert spread(10**6, lower=True) == spread(10**6, lower=False) == KUBELET_SYNC_S


SOME, MANY, VERY_MANY = 100, 1000, 10_000
"""Numbers of nodes with which each writes all counts, only lower ones, or none."""


async def written_after(nodes: int, seed: int, before: int, after: int) -> float:
    """Returns the seconds from a change of a count until it is written."""
    async with running(nodes, seed) as (node, publisher):
        assert await publisher.publish_now({STORAGE: before}, 1.0)
        changed = asyncio.get_running_loop().time()
        publisher.publish({STORAGE: after})
        await node.patched.until(lambda: len(node.patches) == 2)
        return asyncio.get_running_loop().time() - changed - PATCH_S


@virtual
async def test_the_writes_of_nodes_are_spread() -> None:
    for nodes, before, after in ((MANY, 1, 0), (SOME, 0, 1)):
        within = spread(nodes, lower=after < before)
        times = [await written_after(nodes, seed, before, after) for seed in range(40)]
        assert max(times) <= within + 0.01
        assert max(times) - min(times) > within / 2


@virtual
async def test_a_lower_count_after_a_higher_one_has_its_own_spread() -> None:
    """All nodes learn of it at once, however long each has waited to write the higher one."""
    times = []
    for seed in range(40):
        async with running(MANY, seed) as (node, publisher):
            assert await publisher.publish_now({STORAGE: 1}, 1.0)
            publisher.publish({STORAGE: 2})
            await asyncio.sleep(5)
            assert len(node.patches) == 1
            changed = asyncio.get_running_loop().time()
            publisher.publish({STORAGE: 0})
            await node.patched.until(lambda: len(node.patches) == 2)
            times.append(asyncio.get_running_loop().time() - changed - PATCH_S)
    assert max(times) <= spread(MANY, lower=True) + 0.01
    assert max(times) - min(times) > spread(MANY, lower=True) / 2


@virtual
async def test_the_write_of_a_lower_count_is_not_postponed_by_still_lower_ones() -> None:
    for seed in range(10):
        async with running(MANY, seed) as (node, publisher):
            assert await publisher.publish_now({STORAGE: 1000}, 1.0)
            changed = asyncio.get_running_loop().time()
            for count in range(999, 0, -1):
                publisher.publish({STORAGE: count})
                await asyncio.sleep(0.01)
                if len(node.patches) == 2:
                    break
            waited = asyncio.get_running_loop().time() - changed
            assert waited <= spread(MANY, lower=True) + PATCH_S + 0.02


@virtual
async def test_a_lower_count_that_is_reverted_before_its_write_is_not_written() -> None:
    async with running(MANY, seed=4) as (node, publisher):
        assert await publisher.publish_now({STORAGE: 1}, 1.0)
        for _ in range(10):
            publisher.publish({STORAGE: 0})
            await asyncio.sleep(0.01)
            publisher.publish({STORAGE: 1})
            await asyncio.sleep(30)
        assert len(node.patches) <= 2


@virtual
async def test_a_reverted_higher_count_is_written_because_the_kubelet_may_have_written_it() -> None:
    async with running(SOME, seed=3) as (node, publisher):
        assert await publisher.publish_now({STORAGE: 0}, 1.0)
        publisher.publish({STORAGE: 1})
        await asyncio.sleep(0.01)
        assert len(node.patches) == 1
        node.allocatable[STORAGE] = 1  # the kubelet's own sync
        publisher.publish({STORAGE: 0})
        await asyncio.sleep(spread(SOME, lower=True) + 2 * PATCH_S)
        assert node.allocatable[STORAGE] == 0
        assert len(node.patches) == 2
        await asyncio.sleep(60)
        assert len(node.patches) == 2


@virtual
@pytest.mark.parametrize("known", [True, False])
async def test_a_count_below_that_of_the_kubelet_is_a_lower_one_after_any_write(known: bool) -> None:
    """Among many nodes, only the kubelet writes the higher one."""
    async with running(MANY, seed=3) as (node, publisher):
        if known:
            assert await publisher.publish_now({STORAGE: 0}, 1.0)
        before = len(node.patches)
        publisher.publish({STORAGE: 2})
        await asyncio.sleep(5)
        assert len(node.patches) == before
        publisher.publish({STORAGE: 1})
        await asyncio.sleep(spread(MANY, lower=True) + 2 * PATCH_S)
        assert node.patches[before:] == [{STORAGE: 1}]


@virtual
async def test_counts_that_the_kubelet_writes_as_soon_are_left_to_it() -> None:
    for nodes, patches in ((SOME, [1, 0, 1]), (MANY, [1, 0, 0]), (VERY_MANY, [1])):
        async with running(nodes, seed=2) as (node, publisher):
            assert await publisher.publish_now({STORAGE: 1}, 1.0)
            for count in (0, 1, 0) if nodes == MANY else (0, 1):
                publisher.publish({STORAGE: count})
                await asyncio.sleep(3 * KUBELET_SYNC_S)
            assert [p[STORAGE] for p in node.patches] == patches


@virtual
async def test_publish_now_writes_at_once_among_any_number_of_nodes() -> None:
    async with running(VERY_MANY) as (node, publisher):
        assert await publisher.publish_now({STORAGE: 1}, 2 * PATCH_S)
        publisher.publish({STORAGE: 0})
        await asyncio.sleep(0.001)
        assert await publisher.publish_now({STORAGE: 0}, 2 * PATCH_S)
        assert await publisher.publish_now({STORAGE: 0}, 2 * PATCH_S), "already written"
        publisher.publish({STORAGE: 1})
        await asyncio.sleep(1)
        assert len(node.patches) == 2, "the higher count is not written yet"
