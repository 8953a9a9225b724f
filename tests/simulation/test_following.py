"""A pod's device that comes back under another bus ID is attached from there, by its serial number."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from tests.simulation.cluster_rig import (
    LOCKS,
    STICK,
    Cluster,
    agent,
    carry,
    cluster,
    detail,
    hearing,
    offered,
    pod,
    reason,
    replug,
    server,
    spec,
    stick,
)
from tests.simulation.following_rig import (
    FOUND_S,
    HERE,
    HOME,
    LAB,
    SOON_S,
    THERE,
    Taken,
    found_again,
    red_followed,
    red_taken,
    until_step,
)
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.claims import ClaimState
from usbip_plugin.config.schema import DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import ClaimBusy
from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Reason
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped

AT_ONCE_S = 1.0
"""Virtual seconds for an attach without a wait between two tries."""


@stepped
async def test_a_device_that_comes_back_under_another_busid_is_attached_from_there_for_the_same_pod() -> None:
    async with red_taken(nodes=3) as (c, lab, node):
        epoch = c.backend.leases[HOME.id].transitions
        carry(lab, "1-1", lab, "1-2")
        await found_again(c, node)
        assert node.attached() == {HERE}
        assert reason(node, HOME) is Reason.ATTACHED
        assert "1-2" in detail(node, HOME)
        await c.becomes(node, HERE, healthy=False)
        assert reason(node, HERE) is Reason.IN_PLACE_OF
        assert (c.holder(HOME), c.holder(HERE)) == ("node-a", "node-a")
        assert c.backend.leases[HOME.id].transitions == epoch, "the claim has not changed"
        assert c.backend.leases[HERE.id].annotations[record.IN_PLACE_OF] == HOME.id
        await c.noted(HERE, "p")
        for other in (c["node-b"], c["node-c"]):
            for device in (HOME, HERE):
                await c.becomes(other, device, healthy=False)
                assert reason(other, device) is Reason.HELD_ELSEWHERE
        assert not lab.violations


@stepped
async def test_a_moved_device_is_attached_within_five_seconds_of_being_listed() -> None:
    lab = server("lab", stick("1-1", "RED"), stick("1-3", "BLUE"))
    async with cluster(spec([lab], nodes=1)) as c:
        lab.unplug("1-3")
        node = await c.taken(HOME)
        lab.plug(stick("1-3", "BLUE"))
        lab.unplug("1-1")
        await c.becomes(node, HOME, healthy=False)
        await asyncio.sleep(120)  # attempts are as far apart as possible now
        lab.plug(stick("1-2", "RED"))
        poller = agent(node).poller
        assert await c.settle(lambda: any(d.busid == "1-2" for d in poller.views[LAB].devices), 10)
        await c.becomes(node, HOME, healthy=True, within=SOON_S)
        assert node.attached() == {HERE}


@stepped
async def test_a_moved_device_that_another_node_reads_is_attached_as_soon_as_it_is_read() -> None:
    async with red_taken() as (c, lab, node):
        notes = {record.SERVER: str(LAB), record.BUSID: "1-2", record.USB_ID: str(STICK)}
        c.backend.create(Lease(HERE.id, "node-z", 40, annotations=notes, labels=record.LOCK_LABELS))
        carry(lab, "1-1", lab, "1-2")
        await c.becomes(node, HOME, healthy=False)
        await asyncio.sleep(8)  # attempts are 3.5 s apart now
        assert node.attached() == frozenset()
        listed = agent(node).poller.view(LAB).find("1-2")
        assert listed is not None
        lease = c.backend.leases[HERE.id]
        notes |= {record.SERIAL: "RED", record.READ_FROM: str(listed.devid)}
        c.backend.replace(replace(lease, holder="", annotations=notes))
        await c.becomes(node, HOME, healthy=True, within=AT_ONCE_S)
        assert node.attached() == {HERE}


@stepped
async def test_a_pods_end_frees_both_places() -> None:
    async with red_followed() as (c, _lab, node):
        node.end(pod("p"))
        await until_step(lambda: c.holder(HOME) == "")
        assert c.holder(HERE) == "", "released before the claim is deleted"
        assert node.attached() == frozenset()
        assert not node.kernel.records["node-a"]
        assert record.IN_PLACE_OF not in c.backend.leases[HERE.id].annotations
        for each in c.nodes.values():
            await c.becomes(each, HERE, healthy=True)
            await c.becomes(each, HOME, healthy=False)
            assert reason(each, HOME) is Reason.NOT_LISTED
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c["node-b"].attached() == {HERE}


@stepped
async def test_a_device_is_not_followed_to_one_of_two_places_with_its_serial_number() -> None:
    lab = server("lab", stick("1-1", "SAME"))
    notices: list[DeviceEvent] = []
    async with cluster(hearing(spec([lab], nodes=1), notices)) as c:
        node = await c.taken(HOME)
        lab.unplug("1-1")
        lab.plug(stick("1-2", "SAME"))
        lab.plug(stick("1-3", "SAME"))
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert reason(node, HOME) is Reason.LOST
        assert "serial number SAME was found at 1-2 and 1-3" in detail(node, HOME)
        assert [n.text for n in notices if n.what is EventKind.NOT_REATTACHED] == [
            "serial number SAME was found at 1-2 and 1-3; neither is used"
        ], "one event"
        granted = lab.table.granted
        await asyncio.sleep(60)
        assert lab.table.granted == granted, "each was read once"
        lab.unplug("1-3")
        await c.becomes(node, HOME, healthy=True, within=FOUND_S)
        assert node.attached() == {HERE}


@contextlib.asynccontextmanager
async def red_beside_another() -> AsyncIterator[Taken]:
    """Runs a cluster where pod p has RED, and the free lock of HERE has the serial number of a former device."""
    lab = server("lab", stick("1-2", "OLD"))
    async with cluster(spec([lab])) as c:
        node = await c.admitted(HERE)
        assert await c.settle(lambda: record.SERIAL in c.backend.leases[HERE.id].annotations, 5)
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HERE) == "", ALLOCATION_GRACE + 5)
        lab.unplug("1-2")
        await c.becomes(node, HERE, healthy=False)
        lab.plug(stick("1-1", "RED"))
        yield c, lab, await c.taken(HOME)


@pytest.mark.parametrize("there", ["BLUE", ""], ids=["another", "none"])
@stepped
async def test_a_wrong_serial_number_on_a_lock_attaches_no_other_device(there: str) -> None:
    async with red_beside_another() as (c, lab, node):
        c.mislead(HERE, "RED")
        lab.unplug("1-1")
        lab.plug(replace(stick("1-2"), serial=there))
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: c.health(node)[HOME.id], 60), "the pod gets no device"
        assert c.holder(HERE) == "", "other nodes can acquire it"
        assert node.attached() == frozenset()
        assert c.backend.leases[HERE.id].annotations.get(record.SERIAL, "") == there, "the serial number is corrected"
        granted = lab.table.granted
        await asyncio.sleep(60)
        assert lab.table.granted == granted, "it is read once"


@stepped
async def test_a_serial_number_of_an_earlier_device_hides_nothing() -> None:
    async with red_beside_another() as (c, lab, node):
        carry(lab, "1-1", lab, "1-2")
        await found_again(c, node)
        assert node.attached() == {HERE}
        assert await c.settle(lambda: c.backend.leases[HERE.id].annotations[record.SERIAL] == "RED", 5)


@stepped
async def test_while_a_device_stays_away_a_free_one_of_its_kind_is_read_once() -> None:
    """A read makes the device unavailable for a moment, so it is not repeated while the server lists the device."""
    async with red_taken() as (c, lab, node):
        lab.plug(stick("1-2", "BLUE"))
        lab.unplug("1-1")
        assert await c.settle(lambda: HERE.id in c.backend.leases and c.holder(HERE) == "", FOUND_S)
        epoch = c.backend.leases[HERE.id].transitions
        await asyncio.sleep(3000)
        assert c.backend.leases[HERE.id].transitions == epoch
        # the next device at this bus ID is read
        lab.unplug("1-2")
        await c.becomes(c["node-b"], HERE, healthy=False, within=FOUND_S)
        lab.plug(stick("1-2", "RED"))
        assert await c.settle(lambda: node.attached() == {HERE}, FOUND_S)


@stepped
async def test_another_device_of_its_kind_under_its_own_busid_is_not_taken_for_it() -> None:
    async with red_taken(nodes=1) as (c, lab, node):
        replug(lab, stick("1-1", "BLUE"))
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: c.health(node)[HOME.id], 30)
        assert "expected serial number RED, got BLUE" in detail(node, HOME)
        lab.plug(stick("1-2", "RED"))
        await c.becomes(node, HOME, healthy=True, within=FOUND_S)
        assert node.attached() == {HERE}
        lab.unplug("1-2")
        replug(lab, stick("1-1", "RED"))
        await found_again(c, node)
        assert node.attached() == {HOME}, "back at its own bus ID"
        assert await c.settle(lambda: c.holder(HERE) == "", 5)


@stepped
async def test_another_device_at_the_former_bus_id_changes_nothing() -> None:
    async with red_followed() as (c, lab, node):
        lab.plug(stick("1-1", "BLUE"))
        assert not await c.settle(lambda: node.attached() != {HERE} or c.holder(HOME) != "node-a", 60)
        assert c.health(c["node-b"])[HOME.id] is False, "the node keeps the lock while the pod runs"
        node.end(pod("p"))
        await c.becomes(c["node-b"], HOME, healthy=True, within=10)


@pytest.mark.parametrize(
    ("serial", "selector", "to"),
    [("", Selector(vendor=STICK.vendor), "1-2"), ("RED", Selector(bus_id="1-*"), "2-1")],
    ids=["no serial number", "outside of the configuration"],
)
@stepped
async def test_a_device_without_a_serial_number_or_outside_of_the_configuration_is_not_followed(
    serial: str, selector: Selector, to: str
) -> None:
    lab = server("lab", replace(stick("1-1"), serial=serial))
    only = ResourceConfig("stick", (DeviceSelector(lab.key, selector),))
    async with cluster(spec([lab], only, nodes=1)) as c:
        node = await c.taken(HOME)
        granted = lab.table.granted
        carry(lab, "1-1", lab, to)
        await c.becomes(node, HOME, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert lab.table.granted == granted


@stepped
async def test_a_place_that_another_pod_has_is_attached_when_it_is_free() -> None:
    async with red_taken() as (c, lab, node):
        node.partition(cut=True)
        carry(lab, "1-1", lab, "1-2")
        await c.becomes(c["node-b"], HERE, healthy=True)
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c["node-b"].attached() == {HERE}
        node.partition(cut=False)
        assert not await c.settle(lambda: bool(node.attached()), 30)
        assert c.holder(HERE) == "node-b"
        c["node-b"].end(pod("q"))
        assert await c.settle(lambda: node.attached() == {HERE}, 60)
        assert (c.holder(HOME), c.holder(HERE)) == ("node-a", "node-a")
        assert not lab.violations


@stepped
async def test_an_allocate_of_the_place_fails_and_names_the_former_bus_id() -> None:
    async with red_followed() as (c, _lab, node):
        with pytest.raises(ClaimBusy, match="it is the device that was allocated as lab:3240/1-1"):
            await c.allocate(node, HERE)
        again = await c.allocate(node, HOME)
        assert again.devices, "the device keeps its former bus ID"
        assert again.envs["USBIP_STICK_0_BUSID"] == "1-1"


@pytest.mark.parametrize("runs", [True, False], ids=["while the plugin runs", "while it is down"])
@stepped
async def test_a_person_who_releases_the_lock_of_the_place_has_the_device_detached_for_good(runs: bool) -> None:
    async with red_followed() as (c, _lab, node):
        if not runs:
            await node.stop()
        c.release_by_hand(HERE)
        if not runs:
            node.start()
        assert await c.settle(lambda: not node.attached(), AT_ONCE_S)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        await node.stop()
        node.start()
        assert not await c.settle(lambda: bool(node.attached()), 60), "nor by the next process"
        await c.becomes(c["node-b"], HERE, healthy=True)
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c["node-b"].attached() == {HERE}
        c["node-b"].end(pod("q"))
        await c.freed(HERE, within=60)
        assert not await c.settle(lambda: bool(node.attached()), 60), "nor when another pod has had it"


@pytest.mark.parametrize("place", [HERE, THERE], ids=["own server", "other server"])
@pytest.mark.parametrize("own", [True, False], ids=["own lock", "lock of the place"])
@stepped
async def test_a_device_is_detached_when_either_of_its_locks_is_taken_away(place: DeviceKey, own: bool) -> None:
    async with red_followed(place) as (c, to, node):
        lost = HOME if own else place
        c.steal(lost)
        await c.becomes(node, HOME, healthy=False)
        assert await c.settle(lambda: not node.attached() and to.importers(place.busid) == 0, 15)
        assert c.holder(lost) == "node-z"
        if own:
            assert await c.settle(lambda: c.holder(place) == "", 5)
            return
        assert node.held_in(ClaimState.REATTACHING) == {HOME}
        c.backend.replace(replace(c.backend.leases[place.id], holder=""))
        assert await c.settle(lambda: node.attached() == {place}, FOUND_S)


@pytest.mark.parametrize("place", [HERE, THERE], ids=["own server", "other server"])
@stepped
async def test_a_restarted_plugin_adopts_a_device_at_the_place_to_which_it_moved(place: DeviceKey) -> None:
    async with red_followed(place) as (c, to, node):
        imports = to.table.granted
        await node.stop()
        seen = len(node.kubelet.seen.lists)
        node.start()
        assert await c.settle(lambda: len(node.kubelet.seen.lists) > seen, 5)
        assert node.kubelet.seen.lists[seen][1][HOME.id] is True, "the first list"
        assert node.held_in(ClaimState.ATTACHED) == {HOME}
        assert node.attached() == {place}
        assert to.table.granted == imports
        third = DeviceKey(LAB, "1-3")
        carry(to, place.busid, c.servers[LAB], third.busid)
        await found_again(c, node)
        assert node.attached() == {third}, "the successor knows its serial number"
        assert await c.settle(lambda: c.holder(place) == "", 5)
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(HOME) == c.holder(third) == "", ALLOCATION_GRACE)


@stepped
async def test_a_place_whose_claim_was_lost_while_the_plugin_was_down_is_released() -> None:
    async with red_followed() as (c, lab, node):
        await node.stop()
        c.steal(HOME)
        node.start()
        assert await c.settle(lambda: c.holder(HERE) == "" and not node.attached(), 15)
        assert lab.importers("1-2") == 0
        assert c.holder(HOME) == "node-z"


@stepped
async def test_a_dead_nodes_place_is_taken_over_as_what_it_is() -> None:
    async with red_followed() as (c, lab, node):
        node.reboot()
        await c.becomes(c["node-b"], HERE, healthy=True, within=3 * LOCKS.duration)
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c["node-b"].attached() == {HERE}
        assert record.IN_PLACE_OF not in c.backend.leases[HERE.id].annotations
        node.start()
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert c.holder(HERE) == "node-b"
        assert not lab.violations


@stepped
async def test_a_server_that_comes_back_with_other_busids_for_all_its_devices() -> None:
    """After a server's reboot its hubs may have another order: 1-1 becomes 2-1, and 2-1 becomes 1-1."""
    async with offered(stick("1-1", "RED"), stick("2-1", "BLUE")) as (c, lab, (red, blue)):
        assert await c["node-a"].admit(pod("p"), "stick") is None
        (held,) = c["node-a"].attached()
        other = blue if held == red else red
        await lab.stop()
        await c.becomes(c["node-a"], held, healthy=False, within=30)
        replug(lab, stick("1-1", "BLUE"), stick("2-1", "RED"))
        await lab.start()
        await c.becomes(c["node-a"], held, healthy=True, within=FOUND_S)
        assert c["node-a"].attached() == {other}, "at the present place of its serial number"
        await c.becomes(c["node-b"], other, healthy=False)


@pytest.mark.parametrize("away", range(60, 90, 6))
@stepped
async def test_a_renumbered_device_is_attached_within_five_seconds_of_its_servers_return(away: int) -> None:
    """away: seconds without the server, after which its polls are half a minute apart."""
    async with red_taken() as (c, lab, node):
        await lab.stop()
        await c.becomes(node, HOME, healthy=False)
        await asyncio.sleep(away)
        carry(lab, "1-1", lab, "1-2")
        granted = lab.table.granted
        await lab.start()
        await c.becomes(node, HOME, healthy=True, within=SOON_S)
        assert node.attached() == {HERE}
        assert lab.table.granted == granted + 2, "read once, and attached"


@stepped
async def test_a_former_bus_id_that_its_server_has_refused_is_not_tried_again_before_the_new_one() -> None:
    lab = server("lab", stick("1-1", "RED"), reset_time=0.0)
    async with cluster(spec([lab], nodes=1)) as c:
        node = await c.taken(HOME)
        carry(lab, "1-1", lab, "1-2")
        await found_again(c, node)
        assert node.attached() == {HERE}
        assert lab.table.refused == 1


@pytest.mark.parametrize("seconds", range(20, 28, 2))
@stepped
async def test_a_device_is_not_followed_to_a_twin_while_its_server_takes_its_connection_for_alive(seconds: int) -> None:
    async with offered(stick("1-1", "SAME"), stick("1-2", "SAME"), nodes=1) as (c, lab, keys):
        node = c["node-a"]
        assert await node.admit(pod("p"), "stick") is None
        (held,) = node.attached()
        (twin,) = set(keys) - {held}
        link = c.network.link(node.name, LAB)
        link.cut()
        await c.becomes(node, held, healthy=False, within=30)
        await asyncio.sleep(seconds)
        link.mend()
        agent(node).poller.poll_soon(LAB)  # the list comes before the next try
        assert lab.importers(held.busid) == 1, "half-open, so the device is not listed"
        await c.becomes(node, held, healthy=True, within=FOUND_S)
        assert node.attached() == {held}
        assert c.holder(twin) == ""


@stepped
async def test_two_held_devices_that_change_places_go_to_no_wrong_pod() -> None:
    async with offered(stick("1-1", "RED"), stick("1-2", "BLUE")) as (c, lab, _keys):
        assert await c["node-a"].admit(pod("p"), "stick", 1) is None
        assert await c["node-b"].admit(pod("q"), "stick", 1) is None
        (first,) = c["node-a"].attached()
        (second,) = c["node-b"].attached()
        replug(lab, stick("1-1", "BLUE"), stick("1-2", "RED"))
        assert await c.settle(lambda: not c["node-a"].attached() | c["node-b"].attached(), 5)
        assert not await c.settle(lambda: c.health(c["node-a"])[first.id] or c.health(c["node-b"])[second.id], 60)
        c["node-b"].end(pod("q"))
        await c.becomes(c["node-a"], first, healthy=True, within=20)
        assert c["node-a"].attached() == {second}
        assert not lab.violations


MOMENTS: dict[str, Callable[[Cluster, ClusterNode, DeviceKey], bool]] = {
    "lock written": lambda c, _node, place: c.has_note(place, record.IN_PLACE_OF),
    "imported": lambda c, _node, place: (
        c.servers[place.server].importers(place.busid) == 1 and c.has_note(place, record.IN_PLACE_OF)
    ),
    "attached": lambda _c, node, place: node.attached() == {place},
}


@pytest.mark.parametrize("place", [HERE, THERE], ids=["own server", "other server"])
@pytest.mark.parametrize("when", [*MOMENTS, *range(40, 361, 40)])
@pytest.mark.parametrize("ended", [False, True], ids=["pod runs", "pod ended"])
@stepped
async def test_the_successor_of_a_plugin_killed_while_it_follows_goes_on_or_cleans_up(
    place: DeviceKey, when: str | int, ended: bool
) -> None:
    """when: a moment, or a number of steps."""
    async with red_taken(place) as (c, to, node):
        carry(c.servers[LAB], "1-1", to, place.busid)
        if isinstance(when, int):
            await c.killed_after(node, when)
        else:
            await until_step(lambda: MOMENTS[when](c, node, place))
            node.kill()
        if ended:
            node.end(pod("p"))
        node.start()
        if not ended:
            assert await c.settle(lambda: node.attached() == {place}, 30)
            await c.becomes(node, HOME, healthy=True, within=10)
            assert (c.holder(HOME), c.holder(place)) == ("node-a", "node-a")
            node.end(pod("p"))
        await c.freed(HOME, place, within=ALLOCATION_GRACE + 10)
        assert not node.kernel.records["node-a"]
        await c.becomes(c["node-b"], place, healthy=True, within=FOUND_S)
        assert not any(server.violations for server in c.servers.values())
