"""A device that a pod has comes back at another server, where its resource names its serial number: it is followed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TypeAlias

import pytest

from tests.simulation.cluster_rig import (
    Cluster,
    by_serial,
    carry,
    cluster,
    detail,
    hearing,
    key,
    pod,
    reason,
    server,
    spec,
    stick,
)
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.claims import ClaimState
from usbip_plugin.config.schema import DeviceSelector, ResourceConfig, Selector
from usbip_plugin.locks import record
from usbip_plugin.model import DeviceKey, Reason, ServerKey
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.steploop import stepped

FOUND = 10.0
"""Virtual seconds until a server has been asked what it lists, the device who it is, and it is attached."""
SERVER_AWAY = 60.0
LAB, ATTIC = ServerKey("lab", 3240), ServerKey("attic", 3240)
HOME, PLACE = DeviceKey(LAB, "1-1"), DeviceKey(ATTIC, "7-2")
"""Where RED is when a pod gets it, and where it is plugged in then."""
Servers: TypeAlias = tuple[Cluster, VirtualServer, VirtualServer]


@contextlib.asynccontextmanager
async def red(nodes: int = 2, notices: list[DeviceEvent] | None = None) -> AsyncIterator[Servers]:
    """Two servers, of which lab has RED, as a resource names it at either. notices: see hearing()."""
    lab, attic = server("lab", stick("1-1", "RED")), server("attic")
    made = spec([lab, attic], by_serial(lab, attic), nodes=nodes)
    async with cluster(made if notices is None else hearing(made, notices)) as c:
        yield c, lab, attic


@contextlib.asynccontextmanager
async def red_followed() -> AsyncIterator[Servers]:
    """A pod of node-a has RED, which was carried to attic after that."""
    async with red() as (c, lab, attic):
        node = await c.taken(HOME)
        carry(lab, "1-1", attic, "7-2")
        assert await c.settle(lambda: node.attached() == {PLACE}, FOUND)
        await c.becomes(node, HOME, healthy=True)
        yield c, lab, attic


@stepped
async def test_a_free_device_is_offered_from_the_server_where_it_is_plugged_in_now() -> None:
    async with red(3) as (c, lab, attic):
        await c.all_healthy(HOME)
        carry(lab, "1-1", attic, "7-2")
        for node in c.nodes.values():
            await c.becomes(node, PLACE, healthy=True, within=FOUND)
            await c.becomes(node, HOME, healthy=False)
            assert reason(node, HOME) is Reason.MOVED
            assert "RED is now at attic:3240/7-2" in detail(node, HOME)
        assert attic.table.granted == 1, "asked once for all nodes"
        assert await c["node-a"].admit(pod("p"), "stick") is None
        assert c["node-a"].attached() == {PLACE}


@stepped
async def test_a_device_that_a_pod_has_is_attached_from_the_server_where_it_is_now_and_both_places_are_freed() -> None:
    notices: list[DeviceEvent] = []
    async with red(3, notices=notices) as (c, lab, attic):
        node = await c.taken(HOME)
        epoch = c.backend.leases[HOME.id].transitions
        carry(lab, "1-1", attic, "7-2")
        await c.becomes(node, HOME, healthy=False)
        await c.becomes(node, HOME, healthy=True, within=FOUND)
        assert node.attached() == {PLACE}
        assert "now listed as attic:3240/7-2" in detail(node, HOME)
        assert (c.holder(HOME), c.holder(PLACE)) == ("node-a", "node-a")
        assert c.backend.leases[HOME.id].transitions == epoch, "the same claim under the same lock"
        assert c.backend.leases[PLACE.id].annotations[record.IN_PLACE_OF] == HOME.id
        (moved,) = (notice for notice in notices if notice.what is EventKind.MOVED)
        assert moved.text == "it is now plugged in at attic:3240/7-2; attached from there"
        for other in (c["node-b"], c["node-c"]):
            await c.becomes(other, PLACE, healthy=False)
            assert reason(other, PLACE) is Reason.HELD_ELSEWHERE
            assert reason(other, HOME) is Reason.HELD_ELSEWHERE
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HOME) == c.holder(PLACE) == "", ALLOCATION_GRACE)
        assert node.attached() == frozenset()
        assert not node.kernel.records["node-a"]
        for each in c.nodes.values():
            await c.becomes(each, PLACE, healthy=True)
            assert reason(each, HOME) is Reason.MOVED
        assert not lab.violations + attic.violations


@stepped
async def test_while_its_own_server_is_away_a_device_is_followed_to_where_it_came_meanwhile() -> None:
    """As when a lab PC breaks, and its dongle is plugged into another."""
    async with red() as (c, lab, attic):
        node = await c.taken(HOME)
        await lab.stop()
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 30)
        attic.plug(stick("7-2", "RED"))
        await c.becomes(node, HOME, healthy=True, within=FOUND)
        assert node.attached() == {PLACE}
        lab.unplug("1-1")
        await lab.start()
        assert not await c.settle(lambda: node.attached() != {PLACE}, 60)


@pytest.mark.parametrize("gone", ["server", "device"])
@stepped
async def test_a_twin_that_stood_at_another_server_all_along_is_not_taken_for_it(gone: str) -> None:
    async with red() as (c, lab, attic):
        node = await c.taken(HOME)
        attic.plug(stick("7-2", "RED"))
        for each in c.nodes.values():
            assert await c.settle(lambda each=each: reason(each, PLACE) is Reason.AMBIGUOUS, FOUND)  # type: ignore[misc]
        await asyncio.sleep(60)
        if gone == "server":
            await lab.stop()
        else:
            lab.unplug("1-1")
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 120)
        assert c.holder(PLACE) == ""
        if gone == "server":
            await lab.start()
        else:
            lab.plug(stick("1-1", "RED"))
        assert await c.settle(lambda: node.attached() == {HOME}, SERVER_AWAY)


@stepped
async def test_a_device_is_followed_back_when_the_server_it_was_followed_to_breaks() -> None:
    async with red_followed() as (c, lab, attic):
        node = c["node-a"]
        await attic.stop()
        await c.becomes(node, HOME, healthy=False)
        lab.plug(stick("1-1", "RED"))
        assert await c.settle(lambda: node.attached() == {HOME}, SERVER_AWAY)
        await c.becomes(node, HOME, healthy=True)
        assert await c.settle(lambda: c.holder(PLACE) == "", 5)
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HOME) == "", ALLOCATION_GRACE)


@stepped
async def test_a_server_that_is_away_for_a_moment_has_its_device_again() -> None:
    async with red_followed() as (c, _lab, attic):
        node = c["node-a"]
        await attic.stop()
        await c.becomes(node, HOME, healthy=False)
        await asyncio.sleep(20)
        await attic.start()
        assert await c.settle(lambda: node.attached() == {PLACE}, SERVER_AWAY)
        await c.becomes(node, HOME, healthy=True)
        assert (c.holder(HOME), c.holder(PLACE)) == ("node-a", "node-a")


@stepped
async def test_a_server_where_its_resource_does_not_name_its_number_is_not_asked() -> None:
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


@stepped
async def test_a_restarted_plugin_adopts_a_device_at_the_server_it_was_followed_to() -> None:
    async with red_followed() as (c, lab, attic):
        node = c["node-a"]
        imports = attic.table.granted
        await node.stop()
        node.start()
        assert await c.settle(lambda: node.held_in(ClaimState.ATTACHED) == {HOME}, 5)
        assert attic.table.granted == imports
        carry(attic, "7-2", lab, "1-3")
        assert await c.settle(lambda: node.attached() == {key(lab, "1-3")}, FOUND)
        assert await c.settle(lambda: c.holder(PLACE) == "", 5)
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HOME) == c.holder(key(lab, "1-3")) == "", ALLOCATION_GRACE)


@pytest.mark.parametrize("steps", [60, 120, 180, 240, 300, 360])
@pytest.mark.parametrize("ended", [False, True], ids=["pod runs", "pod ended"])
@stepped
async def test_killed_at_any_step_its_successor_goes_on_or_cleans_up(steps: int, ended: bool) -> None:
    async with red() as (c, lab, attic):
        node = await c.taken(HOME)
        carry(lab, "1-1", attic, "7-2")
        await c.killed_after(node, steps)
        if ended:
            node.end(pod("p"))
        node.start()
        if not ended:
            assert await c.settle(lambda: node.attached() == {PLACE}, 30)
            await c.becomes(node, HOME, healthy=True, within=10)
            node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HOME) == c.holder(PLACE) == "", ALLOCATION_GRACE + 10)
        assert not node.attached()
        assert not node.kernel.records["node-a"]
        assert not lab.violations + attic.violations


@pytest.mark.parametrize("which", ["own", "place"])
@stepped
async def test_either_lock_taken_away_detaches(which: str) -> None:
    async with red_followed() as (c, _lab, attic):
        node = c["node-a"]
        lost = HOME if which == "own" else PLACE
        c.steal(lost)
        assert await c.settle(lambda: not node.attached() and attic.importers("7-2") == 0, 5)
        assert c.holder(lost) == "node-z"
        if which == "own":
            assert await c.settle(lambda: c.holder(PLACE) == "", 5)
