"""A pod's device on another server is attached from there, if its resource selects it by serial number there."""

import asyncio
from dataclasses import replace

import pytest

from tests.simulation.cluster_rig import (
    by_serial,
    carry,
    cluster,
    detail,
    pod,
    reason,
    server,
    spec,
    stick,
)
from tests.simulation.following_rig import ATTIC, FOUND_S, HOME, LAB, THERE, red, red_followed, red_taken
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.config.schema import DeviceSelector, ResourceConfig, Selector
from usbip_plugin.locks import record
from usbip_plugin.model import Reason
from usbip_sim.virtual.steploop import stepped

SERVER_AWAY_S = 60.0
"""Virtual seconds in which a server that was away is polled, and its device is attached."""


@stepped
async def test_a_free_device_is_offered_from_the_server_where_it_is_plugged_in_now() -> None:
    async with red(nodes=3) as c:
        lab, attic = c.servers[LAB], c.servers[ATTIC]
        await c.all_healthy(HOME)
        carry(lab, "1-1", attic, "7-2")
        for node in c.nodes.values():
            await c.becomes(node, THERE, healthy=True, within=FOUND_S)
            await c.becomes(node, HOME, healthy=False)
            assert reason(node, HOME) is Reason.MOVED
            assert "RED is now at attic:3240/7-2" in detail(node, HOME)
        assert attic.table.granted == 1, "read once for all nodes"
        assert await c["node-a"].admit(pod("p"), "stick") is None
        assert c["node-a"].attached() == {THERE}


@stepped
async def test_a_device_that_a_pod_has_is_attached_from_the_server_where_it_is_now_and_both_places_are_freed() -> None:
    notices: list[DeviceEvent] = []
    async with red(nodes=3, notices=notices) as c:
        lab, attic = c.servers[LAB], c.servers[ATTIC]
        node = await c.taken(HOME)
        epoch = c.backend.leases[HOME.id].transitions
        carry(lab, "1-1", attic, "7-2")
        await c.becomes(node, HOME, healthy=False)
        await c.becomes(node, HOME, healthy=True, within=FOUND_S)
        assert node.attached() == {THERE}
        assert "now listed as attic:3240/7-2" in detail(node, HOME)
        assert (c.holder(HOME), c.holder(THERE)) == ("node-a", "node-a")
        assert c.backend.leases[HOME.id].transitions == epoch, "the claim has not changed"
        assert c.backend.leases[THERE.id].annotations[record.IN_PLACE_OF] == HOME.id
        (moved,) = (notice for notice in notices if notice.what is EventKind.MOVED)
        assert moved.text == "it is now plugged in at attic:3240/7-2; attached from there"
        for other in (c["node-b"], c["node-c"]):
            await c.becomes(other, THERE, healthy=False)
            assert reason(other, THERE) is Reason.HELD_ELSEWHERE
            assert reason(other, HOME) is Reason.HELD_ELSEWHERE
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HOME) == c.holder(THERE) == "", ALLOCATION_GRACE)
        assert node.attached() == frozenset()
        assert not node.kernel.records["node-a"]
        for each in c.nodes.values():
            await c.becomes(each, THERE, healthy=True)
            assert reason(each, HOME) is Reason.MOVED
        assert not lab.violations + attic.violations


@stepped
async def test_a_device_is_followed_while_its_own_server_is_away() -> None:
    """A lab PC breaks, and its dongle is plugged into another one."""
    async with red_taken(THERE) as (c, attic, node):
        lab = c.servers[LAB]
        await lab.stop()
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 30)
        attic.plug(stick("7-2", "RED"))
        await c.becomes(node, HOME, healthy=True, within=FOUND_S)
        assert node.attached() == {THERE}
        lab.unplug("1-1")
        await lab.start()
        assert not await c.settle(lambda: node.attached() != {THERE}, 60)


@pytest.mark.parametrize("gone", ["server", "device"])
@stepped
async def test_a_twin_that_was_on_another_server_before_is_not_attached_instead(gone: str) -> None:
    async with red_taken(THERE) as (c, attic, node):
        lab = c.servers[LAB]
        attic.plug(stick("7-2", "RED"))
        for each in c.nodes.values():
            assert await c.settle(lambda each=each: reason(each, THERE) is Reason.AMBIGUOUS, FOUND_S)  # type: ignore[misc]
        await asyncio.sleep(60)
        if gone == "server":
            await lab.stop()
        else:
            lab.unplug("1-1")
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 120)
        assert c.holder(THERE) == ""
        if gone == "server":
            await lab.start()
        else:
            lab.plug(stick("1-1", "RED"))
        assert await c.settle(lambda: node.attached() == {HOME}, SERVER_AWAY_S)


@stepped
async def test_a_device_is_followed_back_when_the_server_it_was_followed_to_breaks() -> None:
    async with red_followed(THERE) as (c, attic, node):
        lab = c.servers[LAB]
        await attic.stop()
        await c.becomes(node, HOME, healthy=False)
        lab.plug(stick("1-1", "RED"))
        assert await c.settle(lambda: node.attached() == {HOME}, SERVER_AWAY_S)
        await c.becomes(node, HOME, healthy=True)
        assert await c.settle(lambda: c.holder(THERE) == "", 5)
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HOME) == "", ALLOCATION_GRACE)


@stepped
async def test_a_device_is_attached_again_from_a_server_that_was_away_for_a_moment() -> None:
    async with red_followed(THERE) as (c, attic, node):
        await attic.stop()
        await c.becomes(node, HOME, healthy=False)
        await asyncio.sleep(20)
        await attic.start()
        assert await c.settle(lambda: node.attached() == {THERE}, SERVER_AWAY_S)
        await c.becomes(node, HOME, healthy=True)
        assert (c.holder(HOME), c.holder(THERE)) == ("node-a", "node-a")


@stepped
async def test_a_server_on_which_its_resource_does_not_select_its_number_is_not_searched() -> None:
    lab, attic = server("lab", stick("1-1", "RED")), server("attic")
    any_stick = DeviceSelector(attic.key, Selector(vendor=stick("x").usb_id.vendor))
    other = ResourceConfig("other", (DeviceSelector(attic.key, Selector(bus_id="9-*", serial="RED")),))
    here = by_serial(lab)
    wanted = replace(here, devices=(*here.devices, any_stick))
    async with cluster(spec([lab, attic], wanted, other, nodes=1)) as c:
        node = await c.taken(HOME)
        carry(lab, "1-1", attic, "7-2")
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert attic.table.granted == 0
