"""The promises of the README for one or more agents in virtual time, one test each."""

import asyncio
from dataclasses import replace
from unittest.mock import patch

import pytest

from tests.simulation.cluster_rig import (
    DONGLE,
    LOCKS,
    SETTLE,
    STICK,
    Cluster,
    agent,
    by_serial,
    cluster,
    detail,
    dongle,
    key,
    one_stick,
    pod,
    port_of,
    reason,
    replug,
    resource,
    server,
    spec,
    stick,
    two_sticks,
)
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.monitor import PORT_CHECK_INTERVAL
from usbip_plugin.attach.usage import ALLOCATION_GRACE, BOUND_POD_S, COMPLETED_POD_S
from usbip_plugin.claims import ClaimState
from usbip_plugin.config.schema import Config, OnLoss
from usbip_plugin.errors import ClaimBusy, KubeError, KubeForbidden, KubeNotFound, KubeServerError
from usbip_plugin.inventory.handover import RESET_GRACE
from usbip_plugin.inventory.health import API_GRACE
from usbip_plugin.kubelet.pod_resources import HINTED_INTERVAL
from usbip_plugin.locks import record
from usbip_plugin.locks.protocol import Rules
from usbip_plugin.model import Attachment, DeviceKey, Reason
from usbip_plugin.node.agent import LOCKS_WAIT
from usbip_plugin.usbip.poller import ServerFlaw
from usbip_sim.kubelet.device_manager import ContainerSpec
from usbip_sim.leases import FINE, Fate, Operation
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped
from usbip_sim.virtual.surroundings import ClusterSpec


@stepped
async def test_an_allocate_attaches_here_and_withdraws_everywhere_else() -> None:
    async with one_stick(nodes=3) as (c, _lab, device):
        node = await c.admitted(device)
        assert node.attached() == {device}
        assert c.holder(device) == "node-a"
        for name in ("node-b", "node-c"):
            await c.becomes(c[name], device, healthy=False)
            assert reason(c[name], device) is Reason.HELD_ELSEWHERE
        assert c.health(node) == {device.id: True}


@stepped
async def test_the_loser_of_a_race_hears_who_holds_the_device() -> None:
    async with one_stick() as (c, _lab, device):
        results = await asyncio.gather(*(node.admit(pod(node.name), "stick") for node in c.nodes.values()))
        winner, loser = ("node-a", "node-b") if results[0] is None else ("node-b", "node-a")
        message = results[1] if results[0] is None else results[0]
        assert message is not None
        assert f"{device} is held by node {winner}" in message
        assert c.holder(device) == winner
        assert c[winner].attached() == {device}
        assert c[loser].attached() == frozenset()
        assert c.health(c[loser]) == {device.id: False}, "the loser's kubelet knew before its Allocate failed"


@stepped
async def test_a_pods_end_frees_the_device_for_the_others_and_keeps_the_lease() -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.taken(device)
        await c.becomes(c["node-b"], device, healthy=False)
        node.end(pod("p"))
        await c.becomes(c["node-b"], device, healthy=True)
        assert c.holder(device) == ""
        assert device.id in c.backend.leases
        assert node.attached() == frozenset()
        assert await c["node-b"].admit(pod("q"), "stick") is None


@stepped
async def test_a_device_allocated_for_a_pod_that_never_came_is_released_after_the_grace() -> None:
    async with one_stick() as (c, _lab, device):
        await c.allocate(c["node-a"], device)
        assert not await c.settle(lambda: c.holder(device) == "", ALLOCATION_GRACE - 1), "released within the grace"
        assert await c.settle(lambda: c.holder(device) == "", 5)
        assert c["node-a"].attached() == frozenset()


@stepped
async def test_the_same_allocate_again_returns_the_live_attachment() -> None:
    async with one_stick() as (c, lab, device):
        first = await c.allocate(c["node-a"], device)
        imports = lab.connections
        assert await c.allocate(c["node-a"], device) == first
        assert lab.importers("1-1") == 1
        assert lab.connections == imports


@stepped
async def test_identical_sticks_are_two_devices_and_go_to_two_pods() -> None:
    async with two_sticks() as (c, lab, one, two):
        assert await c["node-a"].admit(pod("p"), "stick") is None
        assert await c["node-a"].admit(pod("q"), "stick") is None
        assert c["node-a"].attached() == {one, two}
        assert (lab.importers("1-1"), lab.importers("1-2")) == (1, 1)


@stepped
async def test_a_device_of_two_resources_is_still_one_device() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], resource("stick", [lab]), resource("any", [lab]))) as c:
        node = c["node-a"]
        await c.all_healthy(device)
        await c.all_healthy(device, name="any")
        assert await node.admit(pod("p"), "stick") is None
        assert await c.settle(lambda: not c.health(node, "any")[device.id], 1)
        assert c.health(node, "stick")[device.id]
        assert "no healthy devices" in str(await node.admit(pod("q"), "any"))
        with pytest.raises(ClaimBusy, match="through resource stick"):  # a kubelet without the new list
            await c.allocate(node, device, name="any")
        await node.stop()
        node.start()
        assert await c.settle(lambda: c.health(node, "stick").get(device.id, False), 5)
        assert await c.settle(lambda: device.id in c.health(node, "any"), 1)
        assert not c.health(node, "any")[device.id], "also after a restart"
        node.end(pod("p"))
        await c.all_healthy(device, name="any")


@stepped
async def test_two_devices_for_one_pod_are_all_or_nothing() -> None:
    lab, attic = server("lab", stick("1-1")), server("attic", stick("1-1"))
    one, two = key(lab, "1-1"), key(attic, "1-1")
    async with cluster(spec([lab, attic])) as c:
        await c.all_healthy(one, two)
        attic.freeze()
        assert "attic:3240" in str(await c["node-a"].admit(pod("p"), "stick", 2))
        assert await c.settle(lambda: c.holder(one) == c.holder(two) == "", 20)
        assert c["node-a"].attached() == frozenset()
        assert lab.importers("1-1") == 0


@stepped
async def test_a_silent_server_costs_its_own_allocate_no_more_than_the_timeout_and_others_nothing() -> None:
    lab, attic = server("lab", stick("1-1")), server("attic", dongle("1-1"))
    good, dead = key(lab, "1-1"), key(attic, "1-1")
    resources = resource("stick", [lab]), resource("dongle", [attic], DONGLE)
    async with cluster(spec([lab, attic], *resources)) as c:
        await c.all_healthy(good)
        await c.all_healthy(dead, name="dongle")
        node, loop = c["node-a"], asyncio.get_running_loop()
        attic.freeze()
        began = loop.time()
        stuck = asyncio.create_task(c.allocate(node, dead, name="dongle"))
        await asyncio.sleep(0.1)
        before = loop.time()
        await c.allocate(node, good)
        assert loop.time() - before < 0.5, "an Allocate on another server waited"
        results = await asyncio.gather(stuck, return_exceptions=True)
        assert loop.time() - began <= 10
        assert "attic:3240" in str(results[0])
        await c.becomes(node, dead, healthy=False, within=30)
        assert reason(node, dead) is Reason.SERVER_UNREACHABLE


@stepped
async def test_a_server_that_is_gone_makes_its_devices_unhealthy_and_drops_none() -> None:
    async with one_stick() as (c, lab, device):
        await lab.stop()
        await c.becomes(c["node-a"], device, healthy=False, within=30)
        assert reason(c["node-a"], device) is Reason.SERVER_UNREACHABLE
        await lab.start()
        await c.becomes(c["node-a"], device, healthy=True, within=60)


@stepped
async def test_an_unplugged_device_stays_in_the_list_as_unhealthy() -> None:
    async with two_sticks() as (c, lab, gone, stays):
        lab.unplug("1-1")
        await c.becomes(c["node-a"], gone, healthy=False)
        assert reason(c["node-a"], gone) is Reason.NOT_LISTED
        assert c.health(c["node-a"])[stays.id] is True


@stepped
async def test_another_device_behind_a_known_busid_is_unhealthy() -> None:
    async with one_stick() as (c, lab, device):
        replug(lab, dongle("1-1"))
        await c.becomes(c["node-a"], device, healthy=False)
        assert reason(c["node-a"], device) is Reason.LISTED_WRONG


@stepped
async def test_a_device_with_another_usb_id_than_listed_fails_the_allocate_and_is_released() -> None:
    async with one_stick() as (c, lab, device):
        lab.lie("1-1", said=DONGLE)
        assert "expected USB ID 0951:1666, got 1050:0407" in str(await c["node-a"].admit(pod("p"), "stick"))
        await c.freed(device)


@stepped
async def test_a_restarted_plugin_adopts_what_is_attached_and_its_first_list_is_healthy() -> None:
    async with two_sticks() as (c, lab, _one, _two):
        node = c["node-a"]
        await node.admit(pod("p"), "stick")
        held = next(iter(node.attached()))
        lists = len(node.kubelet.seen.lists)
        await node.stop()
        assert node.attached() == {held}
        assert c.holder(held) == "node-a"
        node.start()
        assert await c.settle(lambda: len(node.kubelet.seen.lists) > lists, 5)
        assert node.kubelet.seen.lists[lists][1][held.id] is True, "the very first list"
        assert node.held_in(ClaimState.ATTACHED) == {held}
        assert (await c.allocate(node, held)).devices
        assert lab.importers(held.busid) == 1
        await c.knows_its_pod(node, held)
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(held) == "", 5), "the release still happens"


@stepped
async def test_an_allocate_while_the_plugin_ends_fails_with_claim_busy() -> None:
    async with two_sticks() as (c, _lab, one, two):
        node = c["node-a"]
        allocator = agent(node).allocator
        calls = [asyncio.create_task(allocator.allocate_all(c.full("stick"), ((one.id,),)))]
        await asyncio.sleep(0.1)  # attaching: there is something to end
        node.terminate(lambda _ended: None)
        for _ in range(12):
            calls.append(asyncio.create_task(allocator.allocate_all(c.full("stick"), ((two.id,),))))
            await asyncio.sleep(0)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {ClaimBusy}, results


@stepped
async def test_a_pod_that_ended_while_the_plugin_was_down_is_released_by_the_next_process() -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.taken(device)
        await node.stop()
        node.end(pod("p"))
        node.start()
        assert await c.settle(lambda: c.holder(device) == "" and not node.attached(), ALLOCATION_GRACE + 5)


@stepped
async def test_a_lost_connection_is_re_attached_under_the_same_lock() -> None:
    async with one_stick() as (c, lab, device):
        node = await c.admitted(device)
        epoch = c.backend.leases[device.id].transitions
        lab.drop("1-1")
        await c.becomes(node, device, healthy=False)
        assert reason(node, device) is Reason.LOST
        await c.becomes(node, device, healthy=True)
        assert node.attached() == {device}
        assert c.backend.leases[device.id].transitions == epoch
        assert not lab.violations


@pytest.mark.parametrize(
    ("on_loss", "restarted"), [(OnLoss.EVICT, False), (OnLoss.EVICT, True), (OnLoss.KEEP, False)], ids=str
)
@stepped
async def test_a_pod_whose_device_came_back_with_other_nodes_is_evicted_if_its_resource_says_so(
    on_loss: OnLoss, restarted: bool
) -> None:
    """restarted: the previous process made the claim, and the claim has no resource."""
    async with one_stick(on_loss=on_loss) as (c, _lab, device):
        node = await c.taken(device)
        if restarted:
            await node.stop()
            node.start()
            await c.becomes(node, device, healthy=True)
        assert node.evicted == []
        await c.lost_and_back(node, device)
        assert node.evicted == ([pod("p")] if on_loss is OnLoss.EVICT else [])
        assert node.eviction_causes in ([], [f"{device} was re-attached with other device nodes"])
        assert node.attached() == {device}, "until the pod is gone"


@pytest.mark.parametrize("on_loss", [OnLoss.EVICT, OnLoss.KEEP], ids=str)
@stepped
async def test_a_pod_that_becomes_known_after_its_device_came_back_with_other_nodes_is_evicted_then(
    on_loss: OnLoss,
) -> None:
    async with one_stick(on_loss=on_loss) as (c, lab, device):
        node = await c.admitted(device)
        node.kubelet_restart(down=True)  # the device's pod stays unknown
        claims = agent(node).claims.view
        given = claims[device.id].attachment
        lab.drop("1-1")
        assert await c.settle(lambda: claims[device.id].attachment not in (None, given), 60)
        assert claims[device.id].pod is None
        await asyncio.sleep(5)
        assert node.evicted == []
        node.kubelet_restart(down=False)
        await c.knows_its_pod(node, device)
        assert node.evicted == ([pod("p")] if on_loss is OnLoss.EVICT else [])


@stepped
async def test_a_pod_that_becomes_known_while_its_device_is_lost_gets_only_that_event() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices) as (c, lab, device):
        node = await c.admitted(device)
        node.kubelet_restart(down=True)
        lab.unplug("1-1")
        await asyncio.sleep(5)
        assert {notice.what for notice in notices if notice.pod is not None} == set()
        node.kubelet_restart(down=False)
        await c.knows_its_pod(node, device)
        assert [notice.what for notice in notices if notice.pod == pod("p")] == [EventKind.LOST]
        lab.plug(stick("1-1"))
        assert await c.settle(lambda: notices[-1].pod == pod("p") and notices[-1].what is not EventKind.LOST, 60)
        assert notices[-1].what in (EventKind.REATTACHED, EventKind.NODES_CHANGED)


@stepped
async def test_the_pod_of_a_second_device_is_known_soon() -> None:
    async with two_sticks() as (c, _lab, _one, _two):
        node = c["node-a"]
        assert await node.admit(pod("p"), "stick") is None
        assert await c.settle(lambda: {one.pod for one in agent(node).claims.view.values()} == {pod("p")}, 5)
        await asyncio.sleep(0.1)  # the next list is not due yet
        assert await node.admit(pod("q"), "stick") is None
        claims = agent(node).claims.view
        assert await c.settle(lambda: {one.pod for one in claims.values()} == {pod("p"), pod("q")}, 1)


@stepped
async def test_an_attachment_that_was_lost_leaves_no_port_record() -> None:
    async with one_stick() as (c, lab, device):
        node = await c.admitted(device)
        (port,) = node.kernel.records["node-a"]
        lab.drop("1-1")
        await c.becomes(node, device, healthy=False)
        node.kernel.fill_ports("hs", leave=3)  # at the re-attach another device may have its port
        await c.becomes(node, device, healthy=True)
        assert set(node.kernel.records["node-a"]) == {agent(node).claims.view[device.id].port}
        node.end(pod("p"))
        assert await c.settle(lambda: not node.kernel.records["node-a"], 30), port


@stepped
async def test_an_allocate_before_the_adoption_does_not_get_a_lost_device_of_a_pod() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    down = False

    def fate(_node: str, operation: Operation) -> Fate:
        failed = KubeServerError(operation.verb, "leases", "503")
        return Fate(refused=failed) if down and operation.verb in ("list", "watch") else FINE

    made = spec([lab], resource("stick", [lab]), resource("any", [lab]))
    async with cluster(replace(made, faults=fate)) as c:
        node = await c.taken(device)
        lab.unplug("1-1")
        await c.becomes(node, device, healthy=False)
        node.kill()
        lab.plug(stick("1-1"))
        down = True
        node.start()
        await asyncio.sleep(LOCKS_WAIT + 1)
        assert reason(node, device) is Reason.API_UNREACHABLE
        early = asyncio.create_task(c.allocate(node, device, name="any"))
        await asyncio.sleep(1)
        assert not early.done()
        down = False
        with pytest.raises(ClaimBusy):
            await early
        assert await c.settle(lambda: node.attached() == {device}, 30)
        assert (c.holder(device), c.pod_of(device)) == ("node-a", pod("p"))


@stepped
async def test_an_attachment_that_ends_before_it_can_be_adopted_leaves_no_port_record() -> None:
    async with one_stick() as (c, lab, device):
        node = await c.admitted(device)
        await node.stop()
        node.end(pod("p"))
        node.partition(cut=True)
        node.start()
        await asyncio.sleep(1)  # the plugin has not read its lock yet
        lab.drop("1-1")
        node.partition(cut=False)
        assert await c.settle(lambda: c.holder(device) == "", ALLOCATION_GRACE + 30)
        assert not node.kernel.records["node-a"]


@stepped
async def test_an_attachment_lost_while_the_ports_cannot_be_read_is_found_when_they_can() -> None:
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        node.kernel.loaded = False
        lab.drop("1-1")
        await asyncio.sleep(2 * PORT_CHECK_INTERVAL)
        node.alive()
        assert c.holder(device) == "node-a"
        node.kernel.loaded = True
        assert await c.settle(lambda: node.attached() == {device}, 2 * PORT_CHECK_INTERVAL)
        await c.becomes(node, device, healthy=True)


@stepped
async def test_a_device_attached_while_others_are_checked_does_not_count_as_lost() -> None:
    """A check's table of ports may be older than an attachment that is made during the check."""
    async with two_sticks() as (c, _lab, one, two):
        node = c["node-a"]
        await c.allocate(node, one)
        driver = agent(node).driver
        inspect, checked = driver.inspect, asyncio.Event()
        claims, states = agent(node).claims, set[ClaimState]()
        claims.subscribe(lambda _device_id: states.update(claim.state for claim in claims.view.values()))

        async def slow(key: DeviceKey, port: int) -> Attachment | None:
            if key == one and not checked.is_set():
                checked.set()
                await asyncio.sleep(2)
            return await inspect(key, port)

        with patch.object(driver, "inspect", slow):
            allocating = asyncio.create_task(c.allocate(node, two))
            await claims.changed.until(lambda: claims.get(two.id) is not None)
            node.kernel.changed.fire()
            await checked.wait()
            assert claims[two.id].port is None, "not on a port when the table was read"
            await allocating
            await asyncio.sleep(3)
        assert claims[two.id].state is ClaimState.ATTACHED
        assert ClaimState.REATTACHING not in states


@pytest.mark.parametrize("lock", ["kept", "taken over"])
@stepped
async def test_a_plugin_that_starts_when_ports_cannot_be_read_releases_nothing_until_they_can(lock: str) -> None:
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        await node.stop()
        node.kernel.loaded = False
        if lock == "taken over":
            c.steal(device)
        node.start()
        await asyncio.sleep(60)
        node.alive()
        assert c.holder(device) == ("node-a" if lock == "kept" else "node-z")
        node.kernel.loaded = True
        if lock == "kept":
            await c.becomes(node, device, healthy=True, within=60)
            assert node.attached() == {device}
        else:
            assert await c.settle(lambda: not node.attached(), 60)
        assert lab.importers("1-1") == len(node.attached())


@stepped
async def test_a_lost_device_is_re_attached_as_soon_as_its_server_lists_it_again() -> None:
    async with one_stick() as (c, lab, device):
        node = await c.admitted(device)
        lab.unplug("1-1")
        await c.becomes(node, device, healthy=False)
        await asyncio.sleep(60)  # attempts are REATTACH_MAX_WAIT apart now
        connections = lab.connections
        lab.plug(stick("1-1"))
        agent(node).poller.poll_soon(lab.key)
        await c.becomes(node, device, healthy=True, within=0.5)
        assert lab.connections - connections <= 3, "a poll and one import"


@stepped
async def test_a_dead_nodes_device_is_taken_over_after_the_locks_duration_and_not_before() -> None:
    async with one_stick() as (c, _lab, device):
        await c.admitted(device)
        await c.becomes(c["node-b"], device, healthy=False)
        died = asyncio.get_running_loop().time()
        c["node-a"].reboot()
        await c.becomes(c["node-b"], device, healthy=True, within=3 * LOCKS.duration)
        assert asyncio.get_running_loop().time() - died >= LOCKS.duration * 0.75
        assert reason(c["node-b"], device) is Reason.HOLDER_EXPIRED
        assert await c["node-b"].admit(pod("q"), "stick") is None
        assert c.holder(device) == "node-b"
        c["node-a"].start()
        await c.becomes(c["node-a"], device, healthy=False)
        assert c["node-a"].attached() == frozenset()


@stepped
async def test_a_server_is_asked_once_more_before_an_expired_lock_is_taken() -> None:
    """The device is unplugged between the last poll and the Allocate."""
    async with one_stick() as (c, lab, device):
        await c.admitted(device)
        await c.becomes(c["node-b"], device, healthy=False)
        c["node-a"].reboot()
        await c.becomes(c["node-b"], device, healthy=True, within=3 * LOCKS.duration)
        lab.unplug("1-1")
        assert "node-a" in str(await c["node-b"].admit(pod("q"), "stick"))
        lease = c.backend.leases[device.id]
        assert (lease.holder, lease.transitions) == ("node-a", 1)


@stepped
async def test_the_lock_of_a_silent_plugin_whose_kernel_has_the_device_is_never_taken_over() -> None:
    async with one_stick() as (c, _lab, device):
        await c.admitted(device)
        await c["node-a"].stop()  # the kernel keeps the device attached
        assert not await c.settle(lambda: c.health(c["node-b"])[device.id], 4 * LOCKS.duration)
        assert c.holder(device) == "node-a"


@stepped
async def test_without_the_api_server_pods_keep_their_devices_and_no_other_is_offered() -> None:
    async with two_sticks() as (c, _lab, one, two):
        node = c["node-a"]
        await node.admit(pod("p"), "stick")
        held = next(iter(node.attached()))
        other = two if held == one else one
        for each in c.nodes.values():
            each.partition(cut=True)
        await c.becomes(node, other, healthy=False, within=API_GRACE + 10)
        assert reason(node, other) is Reason.API_UNREACHABLE
        assert c.health(node)[held.id] is True
        await asyncio.sleep(5 * LOCKS.duration)
        assert node.attached() == {held}
        for each in c.nodes.values():
            each.partition(cut=False)
        await c.becomes(node, other, healthy=True, within=60)
        assert c.holder(held) == "node-a"


@stepped
async def test_an_allocate_without_the_api_server_fails_in_time_and_says_so() -> None:
    async with one_stick() as (c, lab, device):
        node = c["node-a"]
        node.partition(cut=True)
        began = asyncio.get_running_loop().time()
        message = await node.admit(pod("p"), "stick")
        assert asyncio.get_running_loop().time() - began <= 10.1
        assert message is not None
        assert "leases.coordination.k8s.io" in message
        assert lab.importers("1-1") == 0
        node.partition(cut=False)
        await c.becomes(node, device, healthy=True, within=60)


@stepped
async def test_a_lock_taken_away_is_withdrawn_and_detached() -> None:
    async with one_stick() as (c, lab, device):
        node = await c.admitted(device)
        c.steal(device)
        await c.becomes(node, device, healthy=False)
        assert not await c.settle(lambda: not node.attached(), LOCKS.import_window - 1), "node-z may let the lock go"
        assert await c.settle(lambda: node.attached() == frozenset(), 5)
        assert await c.settle(lambda: lab.importers("1-1") == 0, 1)
        assert c.holder(device) == "node-z", "another holder's lock stays"


@stepped
async def test_a_lock_that_its_taker_lets_go_is_taken_again_without_a_detach() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices) as (c, lab, device):
        node = await c.admitted(device)
        c.steal(device)
        await c.becomes(node, device, healthy=False)
        c.backend.replace(replace(c.backend.leases[device.id], holder=""))
        await c.becomes(node, device, healthy=True)
        await asyncio.sleep(2 * LOCKS.import_window)
        assert (c.holder(device), lab.table.granted, node.attached()) == ("node-a", 1, frozenset({device}))
        assert EventKind.LOCK_LOST not in [notice.what for notice in notices]


@stepped
async def test_a_lock_lost_while_its_device_enumerates_fails_the_allocate_and_leaves_nothing_attached() -> None:
    async with one_stick() as (c, _lab, device):
        node = c["node-a"]
        asking = asyncio.create_task(node.admit(pod("p"), "stick"))
        assert await c.settle(lambda: node.held_in(ClaimState.ATTACHING) == {device}, 1)
        c.steal(device)
        assert f"lock of {device} lost: node node-z holds it now" in str(await asking)
        assert await c.settle(lambda: not node.attached(), 5)
        assert c.holder(device) == "node-z", "another holder's lock stays"


async def away_and_taken_over(c: Cluster, device: DeviceKey) -> tuple[ClusterNode, ClusterNode]:
    """Isolates node-a, whose pod p has the device, until pod q of node-b gets it. Returns both nodes."""
    a, b = c["node-a"], c["node-b"]
    await c.taken(device)
    a.silence(silent=True)
    link = c.network.link("node-a", device.server)
    link.cut()
    await c.becomes(b, device, healthy=True, within=3 * LOCKS.duration)
    assert await b.admit(pod("q"), "stick") is None
    link.mend()
    a.silence(silent=False)
    await c.becomes(a, device, healthy=False, within=15)
    assert await c.settle(lambda: reason(a, device) is Reason.LOCK_LOST, 15)
    return a, b


@stepped
async def test_a_pod_that_lost_its_device_gets_it_back_when_it_is_free() -> None:
    async with one_stick(keepalive=True) as (c, _lab, device):
        a, b = await away_and_taken_over(c, device)
        assert not await c.settle(lambda: reason(a, device) is not Reason.LOCK_LOST, 60)
        b.end(pod("q"))
        await c.becomes(a, device, healthy=True, within=10)
        assert a.attached() == {device}
        assert c.holder(device) == "node-a"
        await c.noted(device, "p")
        a.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", 5)


@stepped
async def test_a_pod_that_ends_without_its_lost_device_leaves_the_new_holder_alone() -> None:
    async with one_stick(keepalive=True) as (c, _lab, device):
        a, b = await away_and_taken_over(c, device)
        a.end(pod("p"))
        assert await c.settle(lambda: reason(a, device) is Reason.HELD_ELSEWHERE, 10)
        assert c.holder(device) == "node-b"
        assert b.attached() == {device}


@pytest.mark.parametrize("freed", [False, True], ids=["still held", "free again"])
@stepped
async def test_a_pod_that_lost_its_device_while_its_node_was_down_is_found_by_the_next_process(freed: bool) -> None:
    async with one_stick(keepalive=True) as (c, _lab, device):
        a, b = c["node-a"], c["node-b"]
        await c.admitted(device)
        a.lose_power()
        await c.becomes(b, device, healthy=True, within=3 * LOCKS.duration)
        assert await b.admit(pod("q"), "stick") is None
        await c.noted(device, "q")
        if freed:
            b.end(pod("q"))
            assert await c.settle(lambda: c.holder(device) == "", 10)
        a.start()
        if not freed:
            assert await c.settle(lambda: reason(a, device) is Reason.LOCK_LOST, 5)
            b.end(pod("q"))
        assert await c.settle(lambda: a.attached() == {device}, 10)
        await c.becomes(a, device, healthy=True)


@stepped
async def test_an_attachment_that_ended_when_its_lock_was_not_known_leaves_no_port_record() -> None:
    """A plugin that starts without the API server knows no locks, and no devices of its own."""
    async with one_stick(keepalive=True) as (c, lab, device):
        a, b = c["node-a"], c["node-b"]
        await c.admitted(device)
        a.silence(silent=True)
        c.network.link("node-a", lab.key).cut()
        await a.stop()
        a.start()
        a.end(pod("p"))
        await c.becomes(b, device, healthy=True, within=3 * LOCKS.duration)
        assert await b.admit(pod("q"), "stick") is None
        assert a.kernel.records["node-a"]
        a.silence(silent=False)
        c.network.link("node-a", lab.key).mend()
        assert await c.settle(lambda: not a.kernel.records["node-a"], 15)


@pytest.mark.parametrize("restarted", [False, True])
@stepped
async def test_a_deleted_lease_is_written_again_and_its_device_stays_attached(restarted: bool) -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices) as (c, lab, device):
        node = await c.taken(device)
        if restarted:
            node.kill()
        c.backend.delete(device.id, c.backend.leases[device.id].resource_version)
        if restarted:
            node.start()
        assert await c.settle(lambda: c.holder(device) == "node-a", 5)
        assert await c.settle(lambda: c.pod_of(device) == pod("p"), 10), "the new Lease names the pod"
        await c.becomes(node, device, healthy=True)
        assert (lab.table.granted, node.attached()) == (1, frozenset({device}))
        assert EventKind.LOCK_LOST not in [notice.what for notice in notices]


@stepped
async def test_what_a_lock_says_of_pod_and_serial_number_is_written_once_the_api_server_takes_it() -> None:
    refusing = True
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")

    def fate(_node: str, operation: Operation) -> Fate:
        refused = refusing and operation.verb == "update" and operation.name == device.id
        return Fate(refused=KubeForbidden("update", "leases", "for now")) if refused else FINE

    async with cluster(replace(spec([lab], resource("stick", [lab])), faults=fate)) as c:
        node = await c.admitted(device)
        await c.knows_its_pod(node, device)
        await asyncio.sleep(10)
        assert (c.note(device, record.POD), c.note(device, record.SERIAL)) == (None, None)
        refusing = False
        await c.noted(device, "p")
        assert await c.settle(lambda: c.note(device, record.SERIAL) is not None, SETTLE)


@stepped
async def test_a_device_stays_attached_while_the_namespace_of_its_lease_is_deleted() -> None:
    """The API server creates nothing in a namespace that is being deleted (NamespaceLifecycle), and 404 follows."""
    refusals: list[KubeError] = [KubeForbidden("create", "leases", "the namespace is being terminated")]
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")

    def fate(_node: str, operation: Operation) -> Fate:
        return Fate(refused=refusals[0]) if refusals and operation.verb == "create" else FINE

    async with cluster(replace(spec([lab], resource("stick", [lab])), faults=fate)) as c:
        refused, refusals[:] = refusals[0], []
        node = await c.taken(device)
        refusals.append(refused)
        for name, lease in tuple(c.backend.leases.items()):
            c.backend.delete(name, lease.resource_version)
        await c.becomes(node, device, healthy=False)
        assert not await c.settle(lambda: not node.attached(), 60)
        refusals[:] = [KubeNotFound("create", "leases", "the namespace does not exist")]
        assert not await c.settle(lambda: not node.attached(), 60)
        refusals.clear()
        assert await c.settle(lambda: c.holder(device) == node.name, 60), "the plugin is installed again"
        await c.becomes(node, device, healthy=True)
        assert lab.table.granted == 1


@stepped
async def test_a_lock_released_by_hand_is_not_taken_back_for_the_pod_that_had_it() -> None:
    async with one_stick() as (c, _lab, device):
        a, b = await c.taken(device), c["node-b"]
        c.release_by_hand(device)
        await c.becomes(a, device, healthy=False)
        await c.becomes(b, device, healthy=True)
        assert not await c.settle(lambda: bool(a.attached()), 60)
        await a.stop()
        a.start()
        assert not await c.settle(lambda: bool(a.attached()), 60), "nor by the next process"
        assert reason(a, device) is Reason.LOCK_LOST
        assert await b.admit(pod("q"), "stick") is None
        b.end(pod("q"))
        await c.freed(device, within=60)
        assert not await c.settle(lambda: bool(a.attached()), 60), "nor when another pod has had it"
        assert "released by a person" in detail(a, device)
        await a.stop()
        a.start()
        assert not await c.settle(lambda: bool(a.attached()), 60), "nor by the next process then"
        a.end(pod("p"))
        await c.becomes(a, device, healthy=True, within=60)
        assert await a.admit(pod("r"), "stick") is None


@stepped
async def test_a_lock_released_by_hand_unseen_is_not_taken_back() -> None:
    """The node has no API server while a person releases the lock, and another node has the device."""
    async with one_stick() as (c, _lab, device):
        a, b = c["node-a"], c["node-b"]
        await c.taken(device)
        a.silence(silent=True)
        c.release_by_hand(device)
        c.servers[device.server].drop(device.busid)
        c.network.link(a.name, device.server).cut()
        await c.becomes(b, device, healthy=True)
        assert await b.admit(pod("q"), "stick") is None
        b.end(pod("q"))
        await c.freed(device, within=60)
        c.network.link(a.name, device.server).mend()
        a.silence(silent=False)
        assert not await c.settle(lambda: bool(a.attached()), 60)
        assert reason(a, device) is Reason.LOCK_LOST


async def reattach_begins(c: Cluster, node: ClusterNode, device: DeviceKey) -> None:
    """Enumerates the device again on its port, which the re-attach detaches first, and waits for the re-attach."""
    node.kernel.enumerate_anew(port_of(node, device))
    await agent(node).claims.changed.until(lambda: node.held_in(ClaimState.REATTACHING) == {device})
    assert node.attached() == {device}


@stepped
async def test_a_lock_released_by_hand_while_its_device_is_detached_for_a_re_attach_is_not_taken_back() -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.taken(device)
        await reattach_begins(c, node, device)
        c.release_by_hand(device)
        await agent(node).claims.changed.until(lambda: node.held_in(ClaimState.LOST) == {device})
        assert node.attached() == {device}, "the detach goes on"
        assert await c.settle(lambda: not node.attached(), 5)
        await asyncio.sleep(60)
        node.alive()
        assert c.holder(device) == ""
        assert not node.attached()


@stepped
async def test_a_lock_that_is_lost_and_back_while_its_device_enumerates_costs_another_attach_only() -> None:
    """The lock is edited by hand twice."""
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        lab.drop("1-1")
        assert await c.settle(
            lambda: node.held_in(ClaimState.REATTACHING) == {device} and node.attached() == {device}, 5
        )
        lease = c.backend.leases[device.id]
        c.steal(device)
        assert await c.settle(lambda: node.held_in(ClaimState.LOST) == {device}, 0.1)
        c.backend.replace(replace(lease, resource_version=c.backend.leases[device.id].resource_version))
        assert await c.settle(lambda: not node.attached(), 5)
        await c.becomes(node, device, healthy=True)
        node.alive()
        assert node.attached() == {device}
        assert c.holder(device) == "node-a"


@stepped
@pytest.mark.parametrize("released", [True, False])
async def test_an_attachment_without_lock_and_pod_is_detached_by_the_next_process(released: bool) -> None:
    """While the plugin is down, the lock is released by hand or taken, and the pod ends."""
    async with one_stick() as (c, lab, device):
        a, b = c["node-a"], c["node-b"]
        await c.admitted(device)
        a.kill()
        (c.release_by_hand if released else c.steal)(device)
        a.end(pod("p"))
        a.start()
        within = SETTLE if released else LOCKS.import_window + SETTLE
        assert await c.settle(lambda: not a.attached() and not lab.importers(device.busid), within)
        assert await c.settle(lambda: not a.held_in(ClaimState.LOST), 60), "no pod waits for it"
        assert c.holder(device) == ("" if released else "node-z")
        assert not released or await b.admit(pod("q"), "stick") is None


@stepped
async def test_a_pod_that_lost_its_device_to_another_is_evicted_if_its_resource_says_so() -> None:
    async with one_stick(keepalive=True, on_loss=OnLoss.EVICT) as (c, _lab, device):
        a, _b = await away_and_taken_over(c, device)
        assert a.evicted == [pod("p")]
        assert a.eviction_causes == [f"node node-b took {device}"]


@stepped
async def test_a_rebooted_node_takes_its_own_lock_again_for_a_pod_that_is_still_there() -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.admitted(device)
        epoch = c.backend.leases[device.id].transitions
        node.reboot()
        node.start()
        assert await c.settle(lambda: node.attached() == {device}, SETTLE)
        assert c.holder(device) == "node-a"
        assert c.backend.leases[device.id].transitions == epoch + 1, "another boot is another epoch (R3)"


@stepped
async def test_a_device_goes_on_to_the_next_pod_of_its_node_as_it_is_attached() -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.taken(device)
        epoch = c.backend.leases[device.id].transitions
        node.known_pods.bound[pod("q")] = (ContainerSpec("app", {c.full("stick"): 1}),)
        node.end(pod("p"))
        await asyncio.sleep(BOUND_POD_S / 2)
        assert await node.admit(pod("q"), "stick") is None
        del node.known_pods.bound[pod("q")]
        await c.noted(device, "q")
        assert node.attached() == {device}
        assert c.backend.leases[device.id].transitions == epoch


@stepped
async def test_the_device_of_a_pod_that_ended_by_itself_is_released_after_the_time_of_a_next_pod() -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.taken(device)
        node.known_pods.over.add(pod("p"))
        node.end(pod("p"))
        assert not await c.settle(lambda: c.holder(device) == "", COMPLETED_POD_S)
        assert await c.settle(lambda: c.holder(device) == "", 2 * HINTED_INTERVAL)


async def rebooted_without_pod(c: Cluster, lab: VirtualServer, device: DeviceKey) -> ClusterNode:
    """Reboots node-a, whose pod has ended meanwhile, and whose device is unplugged."""
    node = await c.taken(device)
    node.reboot()
    node.end(pod("p"))
    lab.unplug(device.busid)
    return node


@stepped
async def test_a_rebooted_node_releases_the_lock_of_a_device_that_is_not_plugged_in_any_more() -> None:
    async with one_stick() as (c, lab, device):
        node = await rebooted_without_pod(c, lab, device)
        node.start()
        assert await c.settle(lambda: c.holder(device) == "", 10)
        unlisted = c.settle(lambda: reason(node, device) is Reason.NOT_LISTED, RESET_GRACE / 2)
        assert await unlisted, "it is not offered as a device that its holder has detached"
        lab.plug(stick("1-1"))
        await c.all_healthy(device)
        assert await c["node-b"].admit(pod("q"), "stick") is None


@stepped
async def test_a_machine_that_takes_back_a_lock_that_was_left_keeps_it() -> None:
    """Two machines have one name, and each has an API server."""
    async with one_stick() as (c, lab, device):
        node = await rebooted_without_pod(c, lab, device)
        held = c.backend.leases[device.id]
        node.start()
        assert await c.settle(lambda: c.holder(device) == "", 10)
        left = c.backend.leases[device.id]
        c.backend.replace(replace(held, resource_version=left.resource_version, transitions=left.transitions + 1))
        assert not await c.settle(lambda: c.holder(device) == "", 60)


@stepped
async def test_a_kubelet_restart_loses_no_device_and_no_update() -> None:
    async with one_stick() as (c, _lab, device):
        node = c["node-b"]
        node.kubelet_restart(down=True)
        assert await c["node-a"].admit(pod("p"), "stick") is None
        node.kubelet_restart(down=False)
        await c.becomes(node, device, healthy=False)


@pytest.mark.parametrize("seen", [True, False], ids=["pod seen", "pod not seen yet"])
@stepped
async def test_a_kubelet_that_starts_and_lists_no_pods_yet_ends_no_claim(seen: bool) -> None:
    """For about a second after its start, a kubelet lists none of its running pods."""
    async with one_stick() as (c, _lab, device):
        node = await c.admitted(device)
        if seen:
            await c.knows_its_pod(node, device)
        epoch = c.backend.leases[device.id].transitions
        node.kubelet_restart(down=True)
        await asyncio.sleep(2 * ALLOCATION_GRACE)
        node.kubelet_restart(down=False)
        assert not await c.settle(lambda: c.holder(device) != "node-a" or node.attached() != {device}, 10)
        assert c.backend.leases[device.id].transitions == epoch
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", 3)


@stepped
async def test_a_full_port_table_makes_devices_unhealthy_until_a_port_is_free() -> None:
    async with one_stick() as (c, _lab, device):
        node = c["node-a"]
        numbers = node.kernel.fill_ports()
        await c.becomes(node, device, healthy=False)
        assert reason(node, device) is Reason.NO_PORT
        for number in numbers:
            node.kernel.free_port(number)
        await c.becomes(node, device, healthy=True)


@stepped
async def test_a_foreign_attachment_is_never_touched() -> None:
    async with one_stick() as (c, _lab, device):
        node = c["node-a"]
        foreign = node.kernel.fill_ports("hs", leave=1)
        await node.admit(pod("p"), "stick")
        await node.stop()
        node.start()
        await c.becomes(node, device, healthy=True)
        await c.knows_its_pod(node, device)
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", 5)
        assert all(node.kernel.occupant(number) is not None for number in foreign)


@stepped
async def test_a_port_stuck_in_005_is_tried_once_more() -> None:
    async with one_stick() as (c, _lab, device):
        node = c["node-a"]
        node.kernel.stuck_next()
        assert await node.admit(pod("p"), "stick") is None
        assert node.attached() == {device}


@stepped
async def test_a_refused_attach_leaves_no_lock_no_port_and_no_import() -> None:
    async with one_stick() as (c, _lab, device):
        node = c["node-a"]
        node.kernel.refuse_next()
        assert "refused" in str(await node.admit(pod("p"), "stick"))
        await c.freed(device)


@stepped
async def test_an_import_whose_window_passed_before_the_attach_is_given_up() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    windows: list[float] = []

    def before_the_import_only(deadline: float, now: float) -> bool:
        windows.append(deadline - now)
        return len(windows) == 1

    async with cluster(replace(spec([lab]), rules=Rules(may_import=before_the_import_only))) as c:
        node = c["node-a"]
        await c.all_healthy(device)
        assert "in time after the lock was written" in str(await node.admit(pod("p"), "stick"))
        assert len(windows) == 2
        await c.freed(device)


@stepped
async def test_a_device_without_a_serial_number_is_read_once_for_all_nodes() -> None:
    lab = server("lab", stick("1-1", "RED"), VirtualDevice("1-2", STICK, configured=True))
    async with cluster(spec([lab], by_serial(lab), nodes=3)) as c:
        await c.all_healthy(key(lab, "1-1"))
        bare = key(lab, "1-2")
        assert await c.settle(lambda: bare.id in c.backend.leases and c.holder(bare) == "", 10)
        granted, version = lab.table.granted, c.backend.version
        await asyncio.sleep(60)
        assert (lab.table.granted, c.backend.version) == (granted, version)


@stepped
async def test_a_serial_number_is_not_read_after_the_import_window() -> None:
    lab = server("lab", stick("1-1", "RED"))
    device = key(lab, "1-1")
    windows: list[float] = []

    def before_imports_only(deadline: float, now: float) -> bool:
        windows.append(deadline - now)
        return len(windows) % 2 == 1

    async with cluster(replace(spec([lab], by_serial(lab), nodes=1), rules=Rules(may_import=before_imports_only))) as c:
        assert await c.settle(lambda: len(windows) >= 4, 120)
        await c.freed(device)
        assert device.id not in c.health(c["node-a"])
        assert record.SERIAL not in c.backend.leases[device.id].annotations


@stepped
async def test_without_resources_a_node_is_ready_and_takes_them_when_they_come() -> None:
    lab = server("lab", stick("1-1"))
    wanted = spec([lab], nodes=1)
    async with cluster(replace(wanted, config=Config(()))) as c:
        node = c["node-a"]
        plugin = agent(node)
        assert not plugin.ready, "the locks are not read yet"
        assert await c.settle(lambda: plugin.ready, 5)
        plugin.reconfigure(wanted.config)
        assert not plugin.ready
        await c.becomes(node, key(lab, "1-1"), healthy=True)
        assert plugin.ready


# servers that list what is in use


def lists_in_use(made: ClusterSpec) -> ClusterSpec:
    for each in made.servers:
        each.table.lists_in_use = True
    return made


@stepped
async def test_a_server_that_lists_devices_in_use_ends_no_lock_of_a_node_without_the_api_server() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices, change=lists_in_use) as (c, lab, device):
        a, b = await c.taken(device), c["node-b"]
        a.partition(cut=True)
        await asyncio.sleep(2 * LOCKS.duration)
        assert reason(b, device) is Reason.HELD_ELSEWHERE
        a.partition(cut=False)
        await asyncio.sleep(3 * LOCKS.duration)
        assert agent(b).poller.view(lab.key).lists_in_use, "proven by the heartbeats of the holder"
        a.partition(cut=True)
        await asyncio.sleep(5 * LOCKS.duration)
        assert (
            "its server lists devices in use, so it is not taken over" in agent(b).inventory.health()[device.id].detail
        )
        a.partition(cut=False)
        await asyncio.sleep(30)
        assert (c.holder(device), lab.table.granted, [n.what for n in notices]) == ("node-a", 1, [EventKind.ATTACHED])


@stepped
async def test_the_device_of_a_holder_that_dies_before_the_next_list_is_taken_over_later() -> None:
    """The server hid the device from no list before the death, so it may be one that lists devices in use."""
    async with one_stick(change=lists_in_use) as (c, lab, device):
        a, b = await c.admitted(device), c["node-b"]
        a.kill()
        lab.drop("1-1")
        assert await c.settle(lambda: reason(b, device) is Reason.HOLDER_EXPIRED, 5 * LOCKS.duration)
        assert await b.admit(pod("q"), "stick") is None


@stepped
async def test_a_heartbeat_shows_a_restarted_plugin_that_a_server_lists_devices_in_use() -> None:
    async with one_stick(change=lists_in_use) as (c, lab, device):
        await c.taken(device)
        await c["node-b"].stop()
        c["node-b"].start()
        b = c["node-b"]
        assert await c.settle(lambda: b.agent is not None and agent(b).poller.view(lab.key).lists_in_use, 90)


@pytest.mark.parametrize("exclusive", [True, False])
@stepped
async def test_a_holder_that_a_restarted_plugin_took_for_dead_has_its_device_after_the_refusal(exclusive: bool) -> None:
    """Without an exclusive server nothing but the locks keeps two nodes apart, and a node says so."""
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices, change=lists_in_use) as (c, lab, device):
        lab.table.exclusive = exclusive
        a, b = await c.taken(device), c["node-b"]
        a.partition(cut=True)
        await b.stop()
        b.start()
        await c.becomes(b, device, healthy=True, within=3 * LOCKS.duration)
        refused = await b.admit(pod("q"), "stick")
        assert (refused is not None) is exclusive
        a.partition(cut=False)
        await asyncio.sleep(LOCKS.import_window + 20)
        lost = EventKind.LOCK_LOST in [notice.what for notice in notices]
        if exclusive:
            assert agent(b).poller.view(lab.key).lists_in_use
            assert (c.holder(device), lab.table.granted, lost) == ("node-a", 1, False)
        else:
            assert ServerFlaw.EXPORTS_TWICE in agent(a).poller.view(lab.key).flaws
            assert (c.holder(device), lost, a.attached()) == ("node-b", True, frozenset())


@stepped
async def test_an_outage_of_the_observer_begins_its_observation_anew() -> None:
    """The API server is away for all: the holder cannot write a heartbeat either."""
    async with one_stick(change=lists_in_use) as (c, _lab, device):
        await c.taken(device)
        b = c["node-b"]
        await b.stop()
        b.start()
        await asyncio.sleep(12)
        for node in c.nodes.values():
            node.partition(cut=True)
        await asyncio.sleep(2 * LOCKS.duration)
        b.partition(cut=False)
        assert not await c.settle(lambda: reason(b, device) is Reason.HOLDER_EXPIRED, LOCKS.duration * 0.75)
        c["node-a"].partition(cut=False)
        assert not await c.settle(lambda: reason(b, device) is Reason.HOLDER_EXPIRED, LOCKS.duration)
        assert c.holder(device) == "node-a"
