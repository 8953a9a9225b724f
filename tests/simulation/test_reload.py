"""A new configuration while pods have devices: pods keep their devices, and no pod gets a removed one."""

import asyncio
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.cluster_rig import (
    DONGLE,
    STICK,
    Cluster,
    agent,
    attachment_of,
    cluster,
    dongle,
    key,
    one_stick,
    pod,
    reason,
    resource,
    server,
    spec,
    stick,
    two_sticks,
)
from tests.simulation.play import task_names
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.reattach import AfterReattach
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, OnLoss, ResourceConfig, Selector
from usbip_plugin.errors import AllocateTimeout, UnknownDevice
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, DeviceStates
from usbip_plugin.kubelet.publish import SENT_TIMEOUT
from usbip_plugin.model import DeviceKey, InterfaceClass, Reason
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import loop_of, stepped
from usbip_sim.world import Setup, running

FREED_S = 5.0
"""Seconds from a pod's end in which its device is free."""


def reload(c: Cluster, *resources: ResourceConfig, allocate_timeout: float = 10.0) -> None:
    """Gives every node a new configuration, also processes that start later."""
    c.spec.config = Config(resources, allocate_timeout=allocate_timeout)
    for node in c.nodes.values():
        if node.agent is not None:
            node.agent.reconfigure(c.spec.config)


def only(name: str, device: DeviceKey, **more: object) -> ResourceConfig:
    """Returns a resource of one bus ID."""
    return ResourceConfig(name, (DeviceSelector(device.server, Selector(bus_id=device.busid)),), **more)  # type: ignore[arg-type]


async def ends(c: Cluster, node: ClusterNode, device: DeviceKey) -> None:
    """Ends pod p and waits until its device is free."""
    node.end(pod("p"))
    assert await c.settle(lambda: c.holder(device) == "" and not node.attached(), FREED_S)


async def undisturbed(c: Cluster, node: ClusterNode, device: DeviceKey, name: str = "stick") -> None:
    """Checks for a while that the kubelet always has the device as healthy, and its import stays."""
    lists, imports = len(node.kubelet.seen.lists), c.servers[device.server].table.granted
    await asyncio.sleep(2 * ALLOCATION_GRACE)
    lists_since = [devices for full, devices in node.kubelet.seen.lists[lists:] if full == c.full(name)]
    assert all(devices.get(device.id) for devices in lists_since)
    assert c.health(node, name)[device.id]
    assert node.attached() == {device}
    assert c.holder(device) == node.name
    assert c.servers[device.server].table.granted == imports


@stepped
async def test_a_resource_that_is_taken_out_keeps_what_a_pod_has_until_its_end_and_is_gone_then() -> None:
    async with two_sticks() as (c, lab, _held, _other):
        node = c["node-a"]
        assert await node.admit(pod("p"), "stick") is None
        (mine,) = node.attached()
        reload(c, resource("dongle", [lab], DONGLE))
        assert await c.settle(lambda: c.health(node) == {mine.id: True}, 1)
        assert await c.settle(lambda: not c["node-b"].kubelet.connected(c.full("stick")), 2)
        assert c.health(c["node-b"]) == {}, "an empty list came before the end, as a kubelet keeps the last count"
        await undisturbed(c, node, mine)
        await ends(c, node, mine)
        assert await c.settle(lambda: not node.kubelet.connected(c.full("stick")), 1 + SENT_TIMEOUT)
        assert c.health(node) == {}
        assert set(agent(node).resources.plugins) == {c.full("dongle")}
        assert (
            await node.admit(pod("q"), "stick")
            == f"no healthy devices present; cannot allocate unhealthy devices {c.full('stick')}"
        )


@stepped
async def test_a_resource_that_comes_back_while_its_plugin_ends_is_offered() -> None:
    async with one_stick(nodes=1) as (c, lab, device):
        node = c["node-a"]
        node.pods.process.freeze()  # the kubelet does not read the last list
        reload(c)
        await asyncio.sleep(SENT_TIMEOUT / 2)
        reload(c, resource("stick", [lab]))
        await asyncio.sleep(2 * SENT_TIMEOUT)
        node.pods.process.thaw()
        await c.all_healthy(device)
        assert await c.settle(lambda: agent(node).ready, 5)
        assert len(node.kubelet.seen.registrations) == 2


@pytest.mark.parametrize("how", ["another selector", "another server", "another resource"])
@stepped
async def test_a_removed_device_stays_with_its_pod_and_goes_to_no_other(how: str) -> None:
    lab, attic = server("lab", stick("1-1"), stick("1-2")), server("attic", stick("1-1"))
    held = key(lab, "1-1")
    async with cluster(spec([lab, attic], only("stick", held))) as c:
        node = await c.taken(held)
        match how:
            case "another selector":
                reload(c, only("stick", key(lab, "1-2")))
            case "another server":
                reload(c, only("stick", key(attic, "1-1")))
            case _:
                reload(c, only("other", held))
        await undisturbed(c, node, held)
        assert await c.settle(lambda: held.id not in c.health(c["node-b"]), 5)
        if how == "another resource":
            assert await c.settle(lambda: c.health(node, "other") == {held.id: False}, 1)
            assert "no healthy devices" in str(await node.admit(pod("q"), "other"))
        await ends(c, node, held)
        assert await c.settle(lambda: held.id not in c.health(node), 1)
        assert await node.admit(pod("q"), "other" if how == "another resource" else "stick") is None
        assert (held in node.attached()) is (how == "another resource")


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("gone", [True, False], ids=["resource gone", "device gone"])
@stepped
async def test_a_lost_device_that_was_removed_is_back_with_the_interfaces_that_it_had(
    gone: bool, restarted: bool
) -> None:
    lab, keyboard, mouse = server("lab", stick("1-1")), InterfaceClass(3, 1, 1), InterfaceClass(3, 1, 2)
    held = key(lab, "1-1")
    async with cluster(spec([lab], only("stick", held, allow_classes=(3,)))) as c:
        c["node-a"].kernel.interfaces[STICK] = (keyboard,)
        node = await c.taken(held)
        reload(c, *(() if gone else (only("stick", key(lab, "1-2")),)))
        if restarted:
            await node.stop()
            node.start()
            await c.becomes(node, held, healthy=True)
        await c.lost_and_back(node, held)
        assert attachment_of(node, held).interfaces == (keyboard,)
        if not (gone and not restarted):  # a resource that is gone keeps its rules until the next start
            node.kernel.interfaces[STICK] = (keyboard, mouse)
            await c.lost_and_back(node, held)
            assert (attachment_of(node, held).interfaces, attachment_of(node, held).withheld) == ((keyboard,), (mouse,))


@pytest.mark.parametrize("gone", [True, False], ids=["resource gone", "device gone"])
@stepped
async def test_the_next_pod_is_refused_a_device_that_was_removed(gone: bool) -> None:
    """The kubelet offers a device as soon as the containers of its pod have ended."""
    lab = server("lab", stick("1-1"), stick("1-2"))
    held, other = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab], only("stick", held))) as c:
        node = await c.taken(held)
        reload(c, *(() if gone else (only("stick", other),)))
        if not gone:
            await c.becomes(node, other, healthy=True)
            with pytest.raises(UnknownDevice, match=r"is no longer in .*: the configuration has changed"):
                await c.allocate(node, held)
            assert await c.settle(lambda: c.health(node)[held.id], 5), "its pod still has it"
        else:
            await undisturbed(c, node, held)
        node.end(pod("p"))
        if gone:
            assert ": the configuration has changed" in str(await node.admit(pod("q"), "stick"))
            assert await c.settle(lambda: c.health(node) == {held.id: False}, 0.02), "published before the failure"
            assert "no healthy devices" in str(await node.admit(pod("r"), "stick"))
        assert await c.settle(lambda: c.holder(held) == "" and held not in node.attached(), FREED_S)


@stepped
async def test_a_starting_kubelet_without_pods_gets_an_unchanged_list_of_a_removed_resource() -> None:
    """A kubelet checks the health of its pods' devices when it admits them again."""
    async with one_stick(nodes=1) as (c, _lab, device):
        node = await c.taken(device)
        reload(c)
        await undisturbed(c, node, device)
        lists = len(node.kubelet.seen.lists)
        node.kubelet_restart(down=True)
        await asyncio.sleep(1)
        node.kubelet_restart(down=False)
        assert await c.settle(lambda: len(node.kubelet.seen.lists) > lists, 5)
        await undisturbed(c, node, device)
        assert all(devices == {device.id: True} for _full, devices in node.kubelet.seen.lists[lists:])
        await ends(c, node, device)


@stepped
async def test_a_pod_in_admission_gets_the_removed_device_of_its_init_container() -> None:
    async with one_stick(nodes=1) as (c, _lab, device):
        first = await c.allocate(c["node-a"], device)
        reload(c)
        await asyncio.sleep(0.1)
        assert await c.allocate(c["node-a"], device) == first


@pytest.mark.parametrize("moment", range(0, 800, 20))
@stepped
async def test_a_device_that_is_taken_out_while_it_is_being_allocated_stays_in_the_list_until_the_answer(
    moment: int,
) -> None:
    """A kubelet looks up the allocated devices in its list, and crashes if one is missing."""
    async with two_sticks(nodes=1) as (c, _lab, one, two):
        node = c["node-a"]
        admission = asyncio.create_task(node.admit(pod("p"), "stick", 2))
        await asyncio.sleep(moment / 1000)  # both are there after 0.7 s
        reload(c)
        failure = await admission
        if moment == 0:  # which comes before the Allocate
            assert "no longer in the configuration" in str(failure)
            assert not node.attached()
            return
        assert failure is None, "an Allocate of before is answered"
        assert node.attached() == {one, two}
        assert await c.settle(lambda: c.health(node) == {one.id: True, two.id: True}, 1)
        node.end(pod("p"))
        assert await c.settle(lambda: not node.attached() and not node.kubelet.connected(c.full("stick")), 20)


@stepped
async def test_a_device_whose_server_was_taken_out_comes_back_to_its_pod_after_a_loss() -> None:
    lab, attic = server("lab", stick("1-1")), server("attic", stick("1-1"))
    device, new = key(lab, "1-1"), key(attic, "1-1")
    async with cluster(spec([lab, attic], resource("stick", [lab]))) as c:
        node = await c.taken(device)
        reload(c, resource("stick", [attic]))
        await c.becomes(node, new, healthy=True)
        lab.unplug("1-1")
        await c.becomes(node, device, healthy=False)
        assert reason(node, device) is Reason.LOST
        await asyncio.sleep(60)
        lab.plug(stick("1-1"))
        await c.becomes(node, device, healthy=True, within=5)
        assert node.attached() == {device}
        connections = lab.connections
        await asyncio.sleep(60)
        assert lab.connections == connections, "it is not polled now"
        await ends(c, node, device)


@stepped
async def test_a_server_under_another_name_does_not_give_out_what_a_pod_has_under_the_old_one() -> None:
    lab = server("lab", stick("1-1"))
    alias = server("10.0.0.5")
    alias.table = lab.table
    old, new = key(lab, "1-1"), key(alias, "1-1")
    async with cluster(spec([lab, alias], resource("stick", [lab]))) as c:
        node = await c.taken(old)
        reload(c, resource("stick", [alias]))
        await undisturbed(c, node, old)
        for one in c.nodes.values():
            assert new.id not in c.health(one), "the server lists it under no name"
        with pytest.raises(UnknownDevice):
            await c.allocate(c["node-b"], new)
        await ends(c, node, old)
        await c.all_healthy(new)
        assert await c.settle(lambda: old.id not in c.health(node), 1)


@stepped
async def test_a_change_of_cdi_leaves_no_moment_without_a_plugin() -> None:
    async with two_sticks(nodes=1) as (c, lab, *_devices):
        node, plain = c["node-a"], resource("stick", [lab])
        gone: list[float] = []

        def look() -> None:
            if not node.kubelet.connected(c.full("stick")) or not any(c.health(node).values()):
                gone.append(loop_of().time())

        loop_of().after_step = look
        for cdi in (True, False, True):
            reload(c, replace(plain, cdi=cdi))
            assert await c.settle(lambda want=cdi: node.kubelet.asks_before_start(c.full("stick")) is want, 5)  # type: ignore[misc]
            assert await node.admit(pod(f"p-{cdi}"), "stick") is None
            node.end(pod(f"p-{cdi}"))
            await asyncio.sleep(FREED_S)
        loop_of().after_step = None
        assert gone == []
        assert node.kubelet.seen.registrations == [c.full("stick")] * 4


@stepped
async def test_a_container_that_got_paths_gets_no_spec_after_a_change_to_cdi() -> None:
    """The kubelet calls PreStartContainer for a CDI resource, but keeps the old answer of the Allocate."""
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices) as (c, lab, device):
        node = await c.taken(device)
        reload(c, replace(resource("stick", [lab]), cdi=True))
        assert await c.settle(lambda: node.kubelet.asks_before_start(c.full("stick")), 5)
        assert not (await node.start_container(pod("p"))).nodes
        assert not node.specs.texts
        await c.lost_and_back(node, device)
        (changed,) = [notice.text for notice in notices if notice.what is EventKind.NODES_CHANGED]
        assert changed == AfterReattach.STALE.value


@pytest.mark.parametrize("cdi", [False, True], ids=["plain", "by CDI"])
@stepped
async def test_a_new_container_path_counts_for_the_next_pod_and_by_cdi_for_the_next_start(cdi: bool) -> None:
    async with one_stick(nodes=1, cdi=cdi, container_paths=("/dev/old",)) as (c, lab, device):
        node = await c.taken(device)
        stored = node.allocation(pod("p"), "stick")
        reload(c, replace(resource("stick", [lab]), cdi=cdi, container_paths=("/dev/new",)))
        await undisturbed(c, node, device)
        assert node.allocation(pod("p"), "stick") == stored
        if cdi:
            assert list((await node.start_container(pod("p"))).nodes) == ["/dev/new"]
        await ends(c, node, device)
        await c.becomes(node, device, healthy=True)
        assert await node.admit(pod("q"), "stick") is None
        answer = node.allocation(pod("q"), "stick")
        got = (await node.start_container(pod("q"))).nodes if cdi else [d.container_path for d in answer.devices]
        assert list(got) == ["/dev/new"]


@stepped
async def test_a_new_on_loss_counts_for_pods_that_run() -> None:
    async with one_stick(nodes=1) as (c, lab, device):
        node = await c.taken(device)
        reload(c, replace(resource("stick", [lab]), on_loss=OnLoss.EVICT))
        await c.lost_and_back(node, device)
        assert node.evicted == [pod("p")]


@stepped
async def test_a_new_allocate_timeout_counts_for_the_next_allocate() -> None:
    async with one_stick(nodes=1) as (c, lab, device):
        reload(c, resource("stick", [lab]), allocate_timeout=2.0)
        lab.freeze()
        began = loop_of().time()
        with pytest.raises(AllocateTimeout):
            await c.allocate(c["node-a"], device)
        assert loop_of().time() - began <= 2.0


@pytest.mark.parametrize("cdi", [False, True], ids=["plain", "by CDI"])
@stepped
async def test_a_new_process_registers_a_resource_that_is_gone_for_as_long_as_a_pod_has_a_device_of_it(
    cdi: bool,
) -> None:
    """A kubelet starts no container with a device of a resource without a plugin."""
    async with one_stick(cdi=cdi) as (c, _lab, device):
        node = await c.taken(device)
        reload(c)
        await node.stop()
        lists = len(node.kubelet.seen.lists)
        node.start()
        assert await c.settle(lambda: node.kubelet.connected(c.full("stick")), 5)
        assert await c.settle(lambda: len(node.kubelet.seen.lists) > lists, 1)
        assert node.kubelet.seen.lists[lists:] == [(c.full("stick"), {device.id: True})]
        assert node.kubelet.asks_before_start(c.full("stick")) is cdi
        got = await node.start_container(pod("p"))
        assert bool(got.nodes) is cdi
        await undisturbed(c, node, device)
        await ends(c, node, device)
        assert await c.settle(lambda: not node.kubelet.connected(c.full("stick")), 1 + SENT_TIMEOUT)
        assert not node.specs.texts
        assert agent(node).ready


@pytest.mark.parametrize("reads", [True, False])
@stepped
async def test_a_slow_kubelet_is_waited_for_within_a_limit(reads: bool) -> None:
    async with cluster(spec([server("lab")], nodes=1)) as c:
        plugin = agent(c["node-a"])
        assert await c.settle(lambda: plugin.ready, 5)
        slow, read = DevicePluginServer("usbip.dev/slow", plugin.allocator), asyncio.Event()

        async def take(_state: DeviceStates) -> None:
            await read.wait()

        stream = asyncio.create_task(slow.follow(take))
        plugin.publisher.attach(slow)
        ending = asyncio.create_task(plugin.publisher.detach(slow))
        await asyncio.sleep(SENT_TIMEOUT / 2)
        assert not ending.done()
        if reads:
            read.set()
        await asyncio.sleep(0.1 if reads else SENT_TIMEOUT)
        assert ending.done()
        stream.cancel()


async def test_on_sockets_the_last_list_of_a_resource_is_empty() -> None:
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        virtual = VirtualServer([stick("1-1")])
        await virtual.start()
        try:
            setup = Setup(Config((resource("stick", [virtual]),)), SystemClock(), domain="usbip.dev")
            async with running(Path(directory), ("node-a",), setup) as world, asyncio.timeout(30):
                node = world["node-a"]
                name, kubelet = node.resource("stick"), node.kubelet
                await kubelet.wait_for(name, lambda now: any(now.values()))
                assert node.agent is not None
                node.agent.reconfigure(Config(()))
                await kubelet.changed.until(lambda: not kubelet.connected(name))
                assert kubelet.health(name) == {}
        finally:
            await virtual.stop()


@stepped
async def test_a_new_process_removes_no_resource_before_it_knows_the_devices_of_pods() -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.taken(device)
        await node.stop()
        node.partition(cut=True)
        seen = len(node.kubelet.seen.lists)
        node.start()
        await asyncio.sleep(1)
        reload(c)
        await asyncio.sleep(1)
        assert node.kubelet.connected(c.full("stick"))
        node.partition(cut=False)
        assert await c.settle(lambda: len(node.kubelet.seen.lists) > seen, 5)
        assert node.kubelet.seen.lists[seen:] == [(c.full("stick"), {device.id: True})]
        await undisturbed(c, node, device)


@stepped
async def test_many_reloads_in_a_row_disturb_no_pod_and_leave_nothing_behind() -> None:
    lab, attic = server("lab", stick("1-1"), dongle("1-2")), server("attic", stick("1-1"))
    device = key(lab, "1-1")
    sticks, dongles = resource("stick", [lab]), resource("dongle", [lab], DONGLE)
    versions = (
        (dongles,),
        (),
        (replace(sticks, cdi=True), dongles),
        (only("other", device), resource("dongle", [attic])),
        *((sticks, resource(f"name-{i}", [attic])) for i in range(10)),
        (sticks,),
    )
    async with cluster(spec([lab, attic], sticks)) as c:
        node = await c.taken(device)
        lists = len(node.kubelet.seen.lists)
        for wait in (0.0, 0.001, 0.5, 3.0, 0.0):
            for version in versions:
                reload(c, *version)
                await asyncio.sleep(wait)
        lists_since = [devices for full, devices in node.kubelet.seen.lists[lists:] if full == c.full("stick")]
        assert lists_since
        assert all(devices.get(device.id) for devices in lists_since)
        await undisturbed(c, node, device)
        await ends(c, node, device)
        await asyncio.sleep(60)
        fresh = c["node-b"]
        await fresh.stop()
        fresh.start()
        await asyncio.sleep(30)
        assert task_names(node) == task_names(fresh)
        assert node.sockets == 0
        assert agent(node).ready
        assert set(agent(node).resources.plugins) == {c.full("stick")}
        assert set(agent(node).poller.views) == {lab.key}
        assert Counter(node.kubelet.health(c.full("stick"))) == Counter({device.id: True})
