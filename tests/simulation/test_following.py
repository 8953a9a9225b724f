"""A device that a pod has comes back under another bus id: it is known by its serial number, and followed."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from cluster_rig import LOCKS, all_healthy, becomes, health, key, pod, reason, server, spec, stick

from usbip_plugin.agent import Observer
from usbip_plugin.claims import ALLOCATION_GRACE, State
from usbip_plugin.config import DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import ClaimBusy
from usbip_plugin.locks import record
from usbip_plugin.model import Reason
from usbip_plugin.notices import Notice, What
from usbip_plugin.sim.cluster import Cluster, ClusterNode, cluster
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.steploop import loop_of, stepped
from usbip_plugin.sim.usbdevice import VirtualDevice

SOON = 5.0
"""Virtual seconds after a poll has listed the device."""
POLLED = SOON + 4.0


def claim_of(node: ClusterNode, busid: str = "1-1") -> object:
    claims = node.agent.attacher.claims if node.agent is not None else {}
    return next((claim for claim in claims.values() if claim.key.busid == busid), None)


async def taken(c: Cluster, lab: VirtualServer, node: ClusterNode, busid: str = "1-1") -> None:
    """A pod of the node has the device."""
    await all_healthy(c, key(lab, busid))
    assert await node.admit(pod("p"), "stick") is None
    assert node.attached() == {key(lab, busid)}
    assert await c.settle(lambda: c.pod_of(key(lab, busid)) == pod("p"), 5)


def move(lab: VirtualServer, device: VirtualDevice, busid: str) -> None:
    lab.unplug(device.busid)
    lab.plug(replace(device, busid=busid))


@stepped
async def test_a_device_that_comes_back_under_another_busid_is_attached_from_there_for_the_same_pod() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab], nodes=3)) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        epoch = c.backend.leases[old.id].transitions
        move(lab, stick("1-1", "RED"), "1-2")
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        assert node.attached() == {new}
        assert reason(node, old) is Reason.ATTACHED
        assert "1-2" in node.agent.advertiser.health()[old.id].detail  # type: ignore[union-attr]
        await becomes(c, node, new, healthy=False)
        assert reason(node, new) is Reason.IN_PLACE_OF
        assert (c.holder(old), c.holder(new)) == ("node-a", "node-a")
        assert c.backend.leases[old.id].transitions == epoch, "the same claim under the same lock"
        assert c.backend.leases[new.id].annotations[record.IN_PLACE_OF] == old.id
        assert await c.settle(lambda: c.pod_of(new) == pod("p"), 5)
        for other in (c["node-b"], c["node-c"]):
            for device in (old, new):
                await becomes(c, other, device, healthy=False)
                assert reason(other, device) is Reason.HELD_ELSEWHERE
        assert not lab.violations


@stepped
async def test_within_five_seconds_of_being_listed() -> None:
    lab = server("lab", stick("1-1", "RED"), stick("1-3", "BLUE"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab], nodes=1)) as c:
        node = c["node-a"]
        lab.unplug("1-3")
        await taken(c, lab, node)
        lab.plug(stick("1-3", "BLUE"))
        lab.unplug("1-1")
        await becomes(c, node, old, healthy=False)
        await asyncio.sleep(120)  # by now tries are as far apart as they ever are
        lab.plug(stick("1-2", "RED"))
        agent = node.agent
        assert agent is not None
        listed = lambda: any(d.busid == "1-2" for d in agent.poller.views[lab.key].devices)  # noqa: E731
        assert await c.settle(listed, 10)
        await becomes(c, node, old, healthy=True, within=SOON)
        assert node.attached() == {new}


@stepped
async def test_a_pods_end_frees_both_places() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        move(lab, stick("1-1", "RED"), "1-2")
        assert await c.settle(lambda: node.attached() == {new} and claim_of(node) is not None, POLLED)
        await becomes(c, node, old, healthy=True)
        node.end(pod("p"))
        await until_step(lambda: c.holder(old) == "")
        assert c.holder(new) == "", "let go before the claim is forgotten"
        assert node.attached() == frozenset()
        assert not node.kernel.records["node-a"]
        assert record.IN_PLACE_OF not in c.backend.leases[new.id].annotations
        for each in c.nodes.values():
            await becomes(c, each, new, healthy=True)
            await becomes(c, each, old, healthy=False)
            assert reason(each, old) is Reason.NOT_LISTED
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c["node-b"].attached() == {new}


@stepped
async def test_two_devices_with_its_serial_number_are_none() -> None:
    lab = server("lab", stick("1-1", "SAME"))
    old = key(lab, "1-1")
    told: list[Notice] = []
    async with cluster(replace(spec([lab], nodes=1), observer=lambda _node: Observer(on_notice=told.append))) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        lab.unplug("1-1")
        lab.plug(stick("1-2", "SAME"))
        lab.plug(stick("1-3", "SAME"))
        await becomes(c, node, old, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert reason(node, old) is Reason.LOST
        assert "1-2 and 1-3 both have its serial number SAME" in node.agent.advertiser.health()[old.id].detail  # type: ignore[union-attr]
        assert [n.text for n in told if n.what is What.NOT_REATTACHED] == [
            "1-2 and 1-3 both have its serial number SAME, so neither is taken for it"
        ], "told once"
        granted = lab.table.granted
        await asyncio.sleep(60)
        assert lab.table.granted == granted, "each was asked once"
        lab.unplug("1-3")
        await becomes(c, node, old, healthy=True, within=POLLED)
        assert node.attached() == {key(lab, "1-2")}


def annotated(c: Cluster, device_id: str, serial: str) -> None:
    lease = c.backend.leases[device_id]
    c.backend.replace(replace(lease, annotations={**lease.annotations, record.SERIAL: serial}))


async def known(c: Cluster, lab: VirtualServer, busid: str) -> None:
    """The device gets a lock, by having been used."""
    assert await c["node-a"].admit(pod("first"), "stick") is None
    assert c["node-a"].attached() == {key(lab, busid)}
    assert await c.settle(lambda: record.SERIAL in c.backend.leases[key(lab, busid).id].annotations, 5)
    c["node-a"].end(pod("first"))
    assert await c.settle(lambda: c.holder(key(lab, busid)) == "", ALLOCATION_GRACE + 5)
    lab.unplug(busid)
    await becomes(c, c["node-a"], key(lab, busid), healthy=False)


@pytest.mark.parametrize("there", ["BLUE", ""], ids=["another", "none"])
def test_a_wrong_serial_number_on_a_lock_attaches_no_other_device(there: str) -> None:
    async def play() -> None:
        lab = server("lab", stick("1-2", "OLD"))
        old, new = key(lab, "1-1"), key(lab, "1-2")
        async with cluster(spec([lab])) as c:
            node = c["node-a"]
            await all_healthy(c, new)
            await known(c, lab, "1-2")
            lab.plug(stick("1-1", "RED"))
            await taken(c, lab, node)
            annotated(c, new.id, "RED")
            lab.unplug("1-1")
            lab.plug(replace(stick("1-2"), serial=there))
            await becomes(c, node, old, healthy=False)
            assert not await c.settle(lambda: health(c, node)[old.id], 60), "given to the pod"
            assert c.holder(new) == "", "it can be had by others"
            assert node.attached() == frozenset()
            assert c.backend.leases[new.id].annotations.get(record.SERIAL, "") == there, "and what was wrong is mended"
            granted = lab.table.granted
            await asyncio.sleep(60)
            assert lab.table.granted == granted, "it is asked once"

    stepped(play)()


@stepped
async def test_a_serial_number_of_an_earlier_device_hides_nothing() -> None:
    lab = server("lab", stick("1-2", "OLD"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await all_healthy(c, new)
        await known(c, lab, "1-2")
        lab.plug(stick("1-1", "RED"))
        await taken(c, lab, node)
        move(lab, stick("1-1", "RED"), "1-2")
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        assert node.attached() == {new}
        assert await c.settle(lambda: c.backend.leases[new.id].annotations[record.SERIAL] == "RED", 5)


@stepped
async def test_while_a_device_stays_away_a_free_one_of_its_kind_is_read_once() -> None:
    """Reading takes it from every node for a moment, so it is not done again as long as its server lists it."""
    lab = server("lab", stick("1-1", "RED"))
    twin = key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        await taken(c, lab, c["node-a"])
        lab.plug(stick("1-2", "BLUE"))
        lab.unplug("1-1")
        assert await c.settle(lambda: twin.id in c.backend.leases and c.holder(twin) == "", POLLED)
        epoch = c.backend.leases[twin.id].transitions
        await asyncio.sleep(3000)
        assert c.backend.leases[twin.id].transitions == epoch
        # another device that is plugged in there is read
        lab.unplug("1-2")
        await becomes(c, c["node-b"], twin, healthy=False, within=POLLED)
        lab.plug(stick("1-2", "RED"))
        assert await c.settle(lambda: c["node-a"].attached() == {twin}, POLLED)


@stepped
async def test_another_device_of_its_kind_under_its_own_busid_is_not_taken_for_it() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old = key(lab, "1-1")
    async with cluster(spec([lab], nodes=1)) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        lab.unplug("1-1")
        lab.plug(stick("1-1", "BLUE"))
        await becomes(c, node, old, healthy=False)
        assert not await c.settle(lambda: health(c, node)[old.id], 30)
        assert "its serial number is BLUE" in node.agent.advertiser.health()[old.id].detail  # type: ignore[union-attr]
        lab.plug(stick("1-2", "RED"))
        await becomes(c, node, old, healthy=True, within=POLLED)
        assert node.attached() == {key(lab, "1-2")}
        lab.unplug("1-2")
        lab.unplug("1-1")
        lab.plug(stick("1-1", "RED"))
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        assert node.attached() == {old}, "and home again"
        assert await c.settle(lambda: c.holder(key(lab, "1-2")) == "", 5)


@stepped
async def test_its_own_busid_coming_back_changes_nothing() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        move(lab, stick("1-1", "RED"), "1-2")
        assert await c.settle(lambda: node.attached() == {new}, POLLED)
        lab.plug(stick("1-1", "BLUE"))
        assert not await c.settle(lambda: node.attached() != {new} or c.holder(old) != "node-a", 60)
        assert health(c, c["node-b"])[old.id] is False, "it is this node's as long as the pod runs"
        node.end(pod("p"))
        await becomes(c, c["node-b"], old, healthy=True, within=10)


@stepped
async def test_a_device_without_a_serial_number_is_not_followed() -> None:
    bare = VirtualDevice("1-1", stick("1-1").usb_id, configured=True)
    lab = server("lab", bare)
    old = key(lab, "1-1")
    async with cluster(spec([lab], nodes=1)) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        granted = lab.table.granted
        move(lab, bare, "1-2")
        await becomes(c, node, old, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert lab.table.granted == granted


@stepped
async def test_nothing_is_looked_at_that_the_configuration_does_not_name() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old = key(lab, "1-1")
    here = ResourceConfig("stick", (DeviceSelector(lab.key, Selector(bus_id="1-*")),))
    async with cluster(spec([lab], here, nodes=1)) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        granted = lab.table.granted
        move(lab, stick("1-1", "RED"), "2-1")
        await becomes(c, node, old, healthy=False)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert lab.table.granted == granted


@stepped
async def test_a_place_that_another_pod_has_is_left_to_it_and_taken_when_it_is_free() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        node.partition(cut=True)
        move(lab, stick("1-1", "RED"), "1-2")
        await becomes(c, c["node-b"], new, healthy=True)
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c["node-b"].attached() == {new}
        node.partition(cut=False)
        assert not await c.settle(lambda: bool(node.attached()), 30)
        assert c.holder(new) == "node-b"
        c["node-b"].end(pod("q"))
        assert await c.settle(lambda: node.attached() == {new}, 60)
        assert (c.holder(old), c.holder(new)) == ("node-a", "node-a")
        assert not lab.violations


@stepped
async def test_an_allocate_of_the_place_is_told_what_it_is() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        move(lab, stick("1-1", "RED"), "1-2")
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        agent = node.agent
        assert agent is not None
        with pytest.raises(ClaimBusy, match="it is what was lab:3240/1-1"):
            await agent.allocator.allocate_all(c.full("stick"), ((new.id,),))
        again = await agent.allocator.allocate_all(c.full("stick"), ((old.id,),))
        assert again[0].devices, "the device itself is what it always was"
        assert again[0].envs["USBIP_STICK_0_BUSID"] == "1-1"


@pytest.mark.parametrize("which", ["own", "place"])
def test_either_lock_taken_away_detaches(which: str) -> None:
    async def play() -> None:
        lab = server("lab", stick("1-1", "RED"))
        old, new = key(lab, "1-1"), key(lab, "1-2")
        async with cluster(spec([lab])) as c:
            node = c["node-a"]
            await taken(c, lab, node)
            move(lab, stick("1-1", "RED"), "1-2")
            await becomes(c, node, old, healthy=False)
            await becomes(c, node, old, healthy=True, within=POLLED)
            lost = c.backend.leases[(old if which == "own" else new).id]
            c.backend.replace(replace(lost, holder="node-z", transitions=lost.transitions + 1))
            await becomes(c, node, old, healthy=False)
            assert await c.settle(lambda: not node.attached() and lab.importers("1-2") == 0, 5)
            assert c.holder(old if which == "own" else new) == "node-z"
            if which == "own":
                assert await c.settle(lambda: c.holder(new) == "", 5)
                return
            assert node.held_in(State.REATTACHING) == {old}
            lease = c.backend.leases[new.id]
            c.backend.replace(replace(lease, holder=""))
            assert await c.settle(lambda: node.attached() == {new}, POLLED)

    stepped(play)()


@stepped
async def test_a_restarted_plugin_adopts_a_device_where_it_was_followed_to() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        move(lab, stick("1-1", "RED"), "1-2")
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        imports = lab.table.granted
        await node.stop()
        seen = len(node.kubelet.seen.lists)
        node.start()
        assert await c.settle(lambda: len(node.kubelet.seen.lists) > seen, 5)
        assert node.kubelet.seen.lists[seen][1][old.id] is True, "the very first list"
        assert node.held_in(State.ATTACHED) == {old}
        assert node.attached() == {new}
        assert lab.table.granted == imports
        move(lab, stick("1-2", "RED"), "1-3")
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        assert node.attached() == {key(lab, "1-3")}, "its serial number is known to the successor"
        assert c.holder(new) == ""
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(old) == c.holder(key(lab, "1-3")) == "", 10)


async def until_step(reached: Callable[[], bool]) -> None:
    """Until it is so after some step of the loop."""
    loop, so = loop_of(), asyncio.Event()

    def look() -> None:
        if reached():
            loop.after_step = None
            so.set()

    loop.after_step = look
    async with asyncio.timeout(POLLED):
        await so.wait()


def moments(c: Cluster, node: ClusterNode, lab: VirtualServer) -> dict[str, Callable[[], bool]]:
    new = key(lab, "1-2")
    return {
        "the lock of its place is written": lambda: record.IN_PLACE_OF in _notes(c, new.id),
        "its place is imported": lambda: lab.importers("1-2") == 1 and record.IN_PLACE_OF in _notes(c, new.id),
        "the kernel has it": lambda: node.attached() == {new},
    }


def _notes(c: Cluster, device_id: str) -> dict[str, str]:
    lease = c.backend.leases.get(device_id)
    return dict(lease.annotations) if lease is not None else {}


@pytest.mark.parametrize("ended", [False, True], ids=["pod runs", "pod ended"])
@pytest.mark.parametrize(
    "moment", ["the lock of its place is written", "its place is imported", "the kernel has it"], ids=lambda m: m[4:]
)
def test_killed_while_it_follows_its_successor_goes_on_or_cleans_up(moment: str, ended: bool) -> None:
    async def play() -> None:
        lab = server("lab", stick("1-1", "RED"))
        old, new = key(lab, "1-1"), key(lab, "1-2")
        async with cluster(spec([lab])) as c:
            node = c["node-a"]
            await taken(c, lab, node)
            move(lab, stick("1-1", "RED"), "1-2")
            reached = moments(c, node, lab)[moment]
            await until_step(reached)
            node.kill()
            if ended:
                node.end(pod("p"))
            node.start()
            if ended:
                assert await c.settle(lambda: c.holder(old) == c.holder(new) == "", ALLOCATION_GRACE + 10)
                assert node.attached() == frozenset()
                assert lab.importers("1-2") == 0
                await becomes(c, c["node-b"], new, healthy=True)
            else:
                assert await c.settle(lambda: node.attached() == {new}, 30)
                await becomes(c, node, old, healthy=True, within=10)
                assert (c.holder(old), c.holder(new)) == ("node-a", "node-a")
            assert not lab.violations

    stepped(play)()


@stepped
async def test_a_place_whose_claim_was_lost_while_the_plugin_was_down_is_let_go() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        move(lab, stick("1-1", "RED"), "1-2")
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        await node.stop()
        lease = c.backend.leases[old.id]
        c.backend.replace(replace(lease, holder="node-z", transitions=lease.transitions + 1))
        node.start()
        assert await c.settle(lambda: c.holder(new) == "" and not node.attached(), 10)
        assert lab.importers("1-2") == 0
        assert c.holder(old) == "node-z"


@stepped
async def test_a_dead_nodes_place_is_taken_over_as_what_it_is() -> None:
    lab = server("lab", stick("1-1", "RED"))
    old, new = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await taken(c, lab, node)
        move(lab, stick("1-1", "RED"), "1-2")
        await becomes(c, node, old, healthy=False)
        await becomes(c, node, old, healthy=True, within=POLLED)
        node.reboot()
        await becomes(c, c["node-b"], new, healthy=True, within=3 * LOCKS.duration)
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c["node-b"].attached() == {new}
        assert record.IN_PLACE_OF not in c.backend.leases[new.id].annotations
        node.start()
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert c.holder(new) == "node-b"
        assert not lab.violations


@stepped
async def test_a_server_that_comes_back_with_other_busids_for_all_its_devices() -> None:
    """As after a reboot, when hubs were found in another order: what was 1-1 is 2-1 now, and the other way round."""
    lab = server("lab", stick("1-1", "RED"), stick("2-1", "BLUE"))
    red, blue = key(lab, "1-1"), key(lab, "2-1")
    async with cluster(spec([lab])) as c:
        await all_healthy(c, red, blue)
        assert await c["node-a"].admit(pod("p"), "stick") is None
        (held,) = c["node-a"].attached()
        other = blue if held == red else red
        await lab.stop()
        await becomes(c, c["node-a"], held, healthy=False, within=30)
        lab.unplug("1-1")
        lab.unplug("2-1")
        lab.plug(stick("1-1", "BLUE"))
        lab.plug(stick("2-1", "RED"))
        await lab.start()
        await becomes(c, c["node-a"], held, healthy=True, within=60)  # of which a poll of a dead server takes up to 36
        assert c["node-a"].attached() == {other}, "where its serial number is now"
        await becomes(c, c["node-b"], other, healthy=False)


@stepped
async def test_two_held_devices_that_change_places_go_to_no_wrong_pod() -> None:
    lab = server("lab", stick("1-1", "RED"), stick("1-2", "BLUE"))
    red, blue = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab])) as c:
        await all_healthy(c, red, blue)
        assert await c["node-a"].admit(pod("p"), "stick", 1) is None
        assert await c["node-b"].admit(pod("q"), "stick", 1) is None
        (first,) = c["node-a"].attached()
        (second,) = c["node-b"].attached()
        lab.unplug("1-1")
        lab.unplug("1-2")
        lab.plug(stick("1-1", "BLUE"))
        lab.plug(stick("1-2", "RED"))
        assert await c.settle(lambda: not c["node-a"].attached() | c["node-b"].attached(), 5)
        assert not await c.settle(lambda: health(c, c["node-a"])[first.id] or health(c, c["node-b"])[second.id], 60)
        c["node-b"].end(pod("q"))
        await becomes(c, c["node-a"], first, healthy=True, within=20)
        assert c["node-a"].attached() == {second}
        assert not lab.violations


@pytest.mark.parametrize("steps", [40, 80, 120, 160, 200, 240, 280, 320])
def test_killed_at_any_step_nothing_is_left_when_the_pod_has_ended(steps: int) -> None:
    async def play() -> None:
        lab = server("lab", stick("1-1", "RED"))
        old, new = key(lab, "1-1"), key(lab, "1-2")
        async with cluster(spec([lab])) as c:
            node = c["node-a"]
            await taken(c, lab, node)
            move(lab, stick("1-1", "RED"), "1-2")
            process = node.process
            assert process is not None
            process.after_steps(steps, node.kill)
            assert await c.settle(lambda: node.process is None, 60)
            node.start()
            assert await c.settle(lambda: node.attached() == {new}, 30)
            await becomes(c, node, old, healthy=True, within=10)
            node.end(pod("p"))
            assert await c.settle(lambda: c.holder(old) == c.holder(new) == "", ALLOCATION_GRACE + 10)
            assert not node.attached()
            assert not node.kernel.records["node-a"]
            assert not lab.violations

    stepped(play)()
