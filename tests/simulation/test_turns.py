"""Nodes offer a released device one after another: how many pods fail, and how long a pod waits for its device."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from statistics import median
from unittest.mock import patch

import pytest

from tests.simulation.cluster_rig import Cluster, agent, cluster, key, one_stick, pod, reason, server, spec, stick
from tests.simulation.scheduler import BUSY, CALM, ROUNDS, Pace, contested, job, scheduled
from usbip_plugin.attach import usage
from usbip_plugin.inventory import turns
from usbip_plugin.inventory.turns import OFFERED_BY_ALL_S, SLOT_S, delay
from usbip_plugin.kubelet.pod_resources import HINTED_INTERVAL
from usbip_plugin.model import DeviceKey, Reason
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped

COMPLETIONS = 20
SOON_S = 0.5
"""Within it, a node that offers a device has written so on its Node, and a waiting pod has it."""


def released_at_once() -> contextlib.AbstractContextManager[object]:
    """Lets the plugin release a device with the pod's end, without a look for the next pod."""
    return patch.multiple(usage, ABSENT_POLLS=1, BOUND_POD_S=0.0, COMPLETED_POD_S=0.0)


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("pace", [CALM, BUSY], ids=["calm", "busy"])
@pytest.mark.parametrize("seed", range(3))
def test_a_job_over_two_devices_has_at_most_one_failed_pod(seed: int, pace: Pace, nodes: int) -> None:
    @stepped
    async def story() -> None:
        scheduler = await scheduled(seed, pace, 2, lambda one: job(one, COMPLETIONS, parallel=2), nodes)
        assert len(scheduler.failures) <= 1, scheduler.failures

    story()


@pytest.mark.parametrize("pace", [CALM, BUSY], ids=["calm", "busy"])
@pytest.mark.parametrize("seed", range(2))
def test_contested_handovers_fail_no_pod(seed: int, pace: Pace) -> None:
    now = contested(seed, pace)
    assert sum(failed == 0 for failed, _ in now) >= 0.95 * ROUNDS, now
    with released_at_once(), patch.object(turns, "delay", lambda _place: 0.0):
        before = contested(seed, pace)
    assert sum(failed > 0 for failed, _ in before) >= ROUNDS / 4, "else nothing is shown here"
    assert median(s for _, s in now) <= median(s for _, s in before)


def test_a_holder_that_may_not_have_the_next_pod_costs_the_time_of_a_poll() -> None:
    now = contested(0, CALM, cordon=True)
    assert sum(failed == 0 for failed, _ in now) >= 0.95 * ROUNDS, now
    with released_at_once(), patch.object(turns, "delay", lambda _place: 0.0):
        before = contested(0, CALM, cordon=True)
    assert sum(failed > 0 for failed, _ in before) >= ROUNDS / 4, "the other nodes take turns"
    assert median(s for _, s in now) <= median(s for _, s in before) + HINTED_INTERVAL + 0.1


def offering(c: Cluster, device: DeviceKey) -> list[str]:
    """The nodes whose kubelet has the device as healthy."""
    return [name for name, node in c.nodes.items() if c.health(node).get(device.id)]


async def released(c: Cluster, node: ClusterNode, device: DeviceKey) -> None:
    """The pod p of this node has ended, and nobody has the device any more."""
    node.end(pod("p"))
    await c.freed(device)


@stepped
async def test_each_node_offers_it_in_its_turn_and_tells_its_node_at_once() -> None:
    async with one_stick(nodes=4) as (c, _lab, device):
        node, loop = await c.taken(device), asyncio.get_running_loop()
        await released(c, node, device)
        began = loop.time()
        for place in (1, 2):
            await asyncio.sleep(SOON_S)
            first = offering(c, device)
            assert node.name in first
            assert len(first) == place + 1
            waiting = {reason(other, device) for name, other in c.nodes.items() if name not in first}
            assert waiting == {Reason.HANDED_OVER}
            assert sum(other.object.allocatable[c.full("stick")] for other in c.nodes.values()) == place + 1
            await asyncio.sleep(began + delay(place) - 0.1 - loop.time())
            assert offering(c, device) == first
        await asyncio.sleep(SOON_S)
        assert len(offering(c, device)) == 4


@stepped
async def test_a_lock_that_is_taken_ends_all_turns() -> None:
    async with one_stick(nodes=3) as (c, _lab, device):
        node = await c.taken(device)
        await released(c, node, device)
        assert await node.admit(pod("q"), "stick") is None
        for _ in range(30):
            await asyncio.sleep(0.5)
            assert offering(c, device) == [node.name]


@stepped
async def test_after_ten_seconds_all_offer_it_however_many_they_are() -> None:
    lab = server("lab", stick("1-1"))
    async with cluster(replace(spec([lab], nodes=8), fleet=5000)) as c:
        node, device = c["node-a"], key(lab, "1-1")
        assert await c.settle(lambda: len(offering(c, device)) == 8, 600)
        assert await node.admit(pod("p"), "stick") is None
        await c.noted(device, "p")
        await released(c, node, device)
        assert len(offering(c, device)) < 8
        assert await c.settle(lambda: len(offering(c, device)) == 8, OFFERED_BY_ALL_S + 0.1)


@stepped
async def test_a_node_that_has_just_started_offers_it_at_once_and_one_that_was_cut_off_soon() -> None:
    async with one_stick(nodes=3) as (c, _lab, device):
        node = await c.taken(device)
        new, away = c["node-b"], c["node-c"]
        new.kill()
        away.partition(cut=True)
        await asyncio.sleep(20)
        await released(c, node, device)
        await asyncio.sleep(0.5)  # the server has reset the device and lists it
        new.start()
        await c.becomes(new, device, healthy=True, within=SLOT_S / 2)
        await asyncio.sleep(30)
        assert reason(away, device) is Reason.HELD_ELSEWHERE
        away.partition(cut=False)
        assert await c.settle(lambda: agent(away).locks.api.reachable, 60)
        await c.becomes(away, device, healthy=True, within=OFFERED_BY_ALL_S + 1)
