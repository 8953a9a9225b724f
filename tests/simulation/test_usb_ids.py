"""Devices that change their USB ID while a pod has them, and devices that do not come back."""

import asyncio
from dataclasses import replace
from unittest.mock import patch

import pytest

from tests.simulation.cluster_rig import (
    SETTLE,
    STICK,
    Cluster,
    agent,
    attachment_of,
    cluster,
    detail,
    hearing,
    key,
    offered,
    one_stick,
    pod,
    port_of,
    reason,
    replug,
    server,
    spec,
    stick,
)
from usbip_plugin.attach import reattach
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.reattach import AfterReattach
from usbip_plugin.config.schema import Config, DeviceSelector, Extra, OnLoss, ResourceConfig, Selector
from usbip_plugin.inventory import inventory
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import DeviceKey, InterfaceClass, PodRef, Reason, UsbId
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped

BOOT, APP = UsbId(0x1A6E, 0x089A), UsbId(0x18D1, 0x9302)
BOTH = Selector(usb_ids=(APP, BOOT))
STORAGE = InterfaceClass(8, 6, 0x50)
BACK = 20.0
"""Virtual seconds in which a device that is back is re-attached."""


def boot(busid: str = "2-1", serial: str = "") -> VirtualDevice:
    return VirtualDevice(busid, BOOT, serial, interface=STORAGE, configured=True)


def app(busid: str = "2-1", serial: str = "") -> VirtualDevice:
    return VirtualDevice(busid, APP, serial, interface=STORAGE, configured=True)


def selecting(lab: VirtualServer, selector: Selector = BOTH, **keys: object) -> ResourceConfig:
    return ResourceConfig("stick", (DeviceSelector(lab.key, selector),), **keys)  # type: ignore[arg-type]


async def becomes_app(c: Cluster, lab: VirtualServer, device: DeviceKey, serial: str = "") -> ClusterNode:
    """Gives pod p the device on node-a, and waits until the device is re-attached there as APP. Returns the node."""
    node = await c.taken(device)
    lab.unplug(device.busid)
    await asyncio.sleep(2)
    lab.plug(app(device.busid, serial))
    assert await c.settle(lambda: node.attached() == {device}, BACK), reason(node, device)
    return node


@pytest.mark.parametrize(
    ("selector", "serials"),
    [
        (BOTH, ("", "")),
        (BOTH, ("OLD", "")),
        (BOTH, ("OLD", "NEW")),
        (Selector(bus_id="2-1"), ("", "")),
        (Selector(serial="RED"), ("RED", "RED")),
        (Selector(class_=8), ("", "")),
    ],
    ids=str,
)
@stepped
async def test_a_device_that_changes_its_usb_id_is_attached_again_as_that(
    selector: Selector, serials: tuple[str, str]
) -> None:
    lab, told = server("pi", boot(serial=serials[0])), list[DeviceEvent]()
    device = key(lab, "2-1")
    async with cluster(hearing(spec([lab], selecting(lab, selector, children=())), told)) as c:
        node = await becomes_app(c, lab, device, serials[1])
        await c.becomes(node, device, healthy=True)
        assert reason(node, device) is Reason.ATTACHED
        (text,) = (event.text for event in told if event.what is EventKind.NODES_CHANGED)
        assert f"USB ID {APP}, was {BOOT}" in text
        assert not [event for event in told if event.what is EventKind.NOT_REATTACHED]
        assert await c.settle(lambda: lock_of(c.backend.leases[device.id]).usb_id == APP, SETTLE)
        assert (lock_of(c.backend.leases[device.id]).serial or "") == serials[1]
        _, members = agent(node).inventory.lookup("stick") or (None, {})
        assert members[device.id].usb_id == APP
        node.end(pod("p"))
        await c.freed(device)
        await c.all_healthy(device)
        await asyncio.sleep(SETTLE)  # a selector with a class needs a newer list
        assert await c["node-b"].admit(pod("q"), "stick") is None


@stepped
async def test_a_device_that_does_not_have_the_selected_serial_number_under_its_new_usb_id_is_not_attached() -> None:
    lab = server("pi", boot(serial="RED"))
    device = key(lab, "2-1")
    async with cluster(spec([lab], selecting(lab, Selector(serial="RED")))) as c:
        node = await c.taken(device)
        replug(lab, app(serial="BLUE"))
        await asyncio.sleep(BACK)
        assert reason(node, device) is Reason.LOST
        assert node.attached() == frozenset()


@pytest.mark.parametrize(
    "other",
    [replace(app(), interface=InterfaceClass(3, 0, 0)), replace(app(), configured=False)],
    ids=["HID", "unknown"],
)
@stepped
async def test_a_device_of_another_or_an_unknown_class_under_its_new_usb_id_is_not_attached(
    other: VirtualDevice,
) -> None:
    lab = server("pi", boot())
    device = key(lab, "2-1")
    async with cluster(spec([lab], selecting(lab, Selector(class_=8)))) as c:
        node = await c.taken(device)
        replug(lab, other)
        await asyncio.sleep(BACK)
        assert reason(node, device) is Reason.LOST
        assert f"expected USB ID {BOOT}, got {APP}" in detail(node, device)
        assert node.attached() == frozenset()


@pytest.mark.parametrize("selected", [True, False])
@stepped
async def test_an_allocate_attaches_a_device_that_changed_its_usb_id_since_the_list_if_it_is_selected(
    selected: bool,
) -> None:
    lab = server("pi", boot(serial="OLD"))
    device = key(lab, "2-1")
    selector = BOTH if selected else Selector(usb_ids=(BOOT,))
    async with cluster(spec([lab], selecting(lab, selector, cdi=True))) as c:
        await c.all_healthy(device)
        node = c["node-a"]
        replug(lab, app())  # no node has polled the server since
        failure = await node.admit(pod("p"), "stick")
        if not selected:
            assert f"expected USB ID {BOOT}, got {APP}" in str(failure)
            await c.freed(device)
            return
        assert failure is None
        assert attachment_of(node, device).usb_id == APP
        (text,) = node.specs.find(device.id)
        assert "USBIP_STICK_0_PRODUCT=9302" in text
        assert await c.settle(lambda: lock_of(c.backend.leases[device.id]).usb_id == APP, SETTLE)


@stepped
async def test_the_extras_are_those_of_the_entry_that_selects_the_attached_device() -> None:
    lab = server("pi", boot())
    device = key(lab, "2-1")
    entries = (
        DeviceSelector(lab.key, Selector(usb_ids=(usb_id,)), (Extra(f"/dev/{name}", f"/dev/{name}"),))
        for usb_id, name in ((BOOT, "boot"), (APP, "app"))
    )
    async with cluster(spec([lab], ResourceConfig("stick", tuple(entries)))) as c:
        await c.all_healthy(device)
        replug(lab, app())
        answer = await c.allocate(c["node-a"], device)
        assert [spec.host_path for spec in answer.devices][1:] == ["/dev/app"]


@pytest.mark.parametrize("on_loss", [OnLoss.EVICT, OnLoss.KEEP], ids=str)
@stepped
async def test_the_pod_of_a_device_that_changed_its_usb_id_is_evicted_if_its_resource_says_so(on_loss: OnLoss) -> None:
    lab = server("pi", boot())
    device = key(lab, "2-1")
    async with cluster(spec([lab], selecting(lab, on_loss=on_loss))) as c:
        node = await becomes_app(c, lab, device)
        assert await c.settle(lambda: bool(node.evicted), SETTLE) is (on_loss is OnLoss.EVICT)


@stepped
async def test_a_pod_goes_on_if_its_children_come_back_under_another_usb_id_of_the_device() -> None:
    """A board that is flashed keeps its tty."""
    lab, told = server("pi", boot()), list[DeviceEvent]()
    device = key(lab, "2-1")
    made = spec([lab], selecting(lab, children=("tty",), on_loss=OnLoss.EVICT), nodes=1)
    async with cluster(hearing(made, told)) as c:
        node = c["node-a"]
        node.kernel.child_kinds = {BOOT: ("tty",), APP: ("tty",)}
        await becomes_app(c, lab, device)
        assert await c.settle(lambda: told[-1].what is EventKind.REATTACHED, SETTLE)
        text = told[-1].text
        assert f"USB ID {APP}, was {BOOT}" in text
        assert node.evicted == []


@stepped
async def test_a_device_may_change_its_usb_id_again_and_back() -> None:
    lab = server("pi", boot(serial="B"))
    device = key(lab, "2-1")
    async with cluster(spec([lab], selecting(lab))) as c:
        node = await becomes_app(c, lab, device, "A")
        for usb_id, serial in ((BOOT, "B"), (APP, ""), (BOOT, "B")):
            replug(lab, VirtualDevice("2-1", usb_id, serial, configured=True))
            await c.becomes(node, device, healthy=False)
            await c.becomes(node, device, healthy=True, within=BACK)
            assert attachment_of(node, device).usb_id == usb_id
        assert c.holder(device) == "node-a"


@pytest.mark.parametrize("noted", [True, False])
@stepped
async def test_the_next_process_has_the_device_under_its_new_usb_id(noted: bool) -> None:
    """noted: whether the lock has the new USB ID. The port record has it in any case."""
    lab = server("pi", boot())
    device = key(lab, "2-1")
    async with cluster(spec([lab], selecting(lab))) as c:
        node = await becomes_app(c, lab, device)
        await asyncio.sleep(SETTLE)
        await node.stop()
        granted = lab.table.granted
        if not noted:
            lease = c.backend.leases[device.id]
            notes = {**lease.annotations, "usbip.dev/usb-id": str(BOOT)}
            c.backend.replace(replace(lease, annotations=notes))
        node.start()
        await c.becomes(node, device, healthy=True, within=BACK)
        await c.knows_its_pod(node, device)
        assert agent(node).claims.view[device.id].usb_id == APP
        assert lab.table.granted == granted


@pytest.mark.parametrize("robbed", [False, True])
@stepped
async def test_the_next_process_keeps_no_device_that_has_changed_on_its_port(robbed: bool) -> None:
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        node.kill()
        occupant = node.kernel.occupant(port_of(node, device))
        assert occupant is not None
        occupant.usb_id = APP  # it has left the bus and enumerated again, as something else
        if robbed:
            c.let_go(device)
        node.start()
        assert await c.settle(lambda: lab.table.granted == 2, BACK)
        await c.becomes(node, device, healthy=True)
        assert attachment_of(node, device).usb_id == STICK
        assert c.holder(device) == "node-a"


@stepped
async def test_a_server_whose_lists_do_not_come_is_not_waited_for() -> None:
    lab = server("pi", boot(serial="OLD"))
    device = key(lab, "2-1")
    async with cluster(spec([lab], selecting(lab))) as c:
        node = await c.taken(device)
        lab.unplug("2-1")
        await asyncio.sleep(2)
        c.network.link(node.name, lab.key).slow = 1.0  # an import has more time than a poll
        lab.plug(app(serial="NEW"))
        assert await c.settle(lambda: node.attached() == {device}, 2 * BACK), reason(node, device)


@stepped
async def test_a_device_that_moved_is_followed_although_another_selected_one_has_its_bus_id() -> None:
    lab = server("pi", boot(serial="MINE"))
    device, place = key(lab, "2-1"), key(lab, "2-2")
    async with cluster(spec([lab], selecting(lab))) as c:
        node = await c.taken(device)
        lab.unplug("2-1")
        lab.plug(boot("2-2", "MINE"))
        lab.plug(app("2-1", "OTHER"))
        await c.becomes(node, device, healthy=False)
        assert await c.settle(lambda: bool(node.attached()), BACK)
        assert node.attached() == {place}
        assert lab.table.importers("2-1") == 0


@stepped
async def test_a_device_is_followed_by_its_selected_serial_number_under_another_usb_id() -> None:
    lab = server("phone", boot("1-5", "RED"), stick("1-7"))
    device, place = key(lab, "1-5"), key(lab, "1-6")
    async with cluster(spec([lab], selecting(lab, Selector(serial="RED")))) as c:
        node = await c.taken(device)
        lab.unplug("1-5")
        await asyncio.sleep(2)
        granted = lab.table.granted
        lab.plug(app("1-6", "RED"))
        assert await c.settle(lambda: node.attached() == {place}, BACK), reason(node, device)
        assert lab.table.granted == granted + 2, "read once, and attached; the other device is left alone"


# evictAfter


def dongle_of(lab: VirtualServer, evict_after: float | None) -> ResourceConfig:
    return selecting(lab, Selector(vendor=STICK.vendor), on_loss=OnLoss.EVICT, evict_after=evict_after)


@pytest.mark.parametrize("evict_after", [60.0, None])
@stepped
async def test_a_pod_whose_device_does_not_come_back_in_time_is_evicted(evict_after: float | None) -> None:
    """The server makes the bus ID of bus and device number, so that the device comes back under another one."""
    lab = server("phone", VirtualDevice("1-5", STICK, configured=True))
    device, again = key(lab, "1-5"), key(lab, "1-6")
    async with cluster(spec([lab], dongle_of(lab, evict_after))) as c:
        node = await c.taken(device)
        lab.unplug("1-5")
        lab.plug(VirtualDevice("1-6", STICK, configured=True))
        await asyncio.sleep(55)
        assert node.evicted == []
        await asyncio.sleep(25)
        assert node.evicted == ([pod("p")] if evict_after else [])
        if evict_after:
            assert node.eviction_causes == [f"{device} did not come back within 60 s"]
            assert await node.admit(pod("q"), "stick") is None
            assert node.attached() == {again}
            await asyncio.sleep(300)
            assert node.evicted == [pod("p")], "once"


@stepped
async def test_a_pod_whose_device_comes_back_in_time_is_not_evicted() -> None:
    async with one_stick(on_loss=OnLoss.EVICT, evict_after=60.0, children=()) as (c, lab, device):
        node = await c.taken(device)
        lab.unplug("1-1")
        await asyncio.sleep(50)
        with patch.object(reattach, "after_reattach", lambda *_args, **_keys: AfterReattach.GOES_ON):
            lab.plug(stick("1-1"))
            await c.becomes(node, device, healthy=True)
        await asyncio.sleep(100)
        assert node.evicted == []


@stepped
async def test_a_time_limit_that_is_configured_during_a_loss_counts_from_the_loss() -> None:
    async with one_stick(on_loss=OnLoss.EVICT) as (c, lab, device):
        node = await c.taken(device)
        lab.unplug("1-1")
        await asyncio.sleep(100)
        (one,) = agent(node).inventory.config.resources
        assert node.evicted == []
        agent(node).reconfigure(Config((replace(one, evict_after=60.0),)))
        assert await c.settle(lambda: node.evicted == [pod("p")], SETTLE)


# devices that are forgotten


@stepped
async def test_a_bus_id_that_is_no_longer_listed_leaves_the_list_a_day_later_unless_it_is_held() -> None:
    with patch.object(inventory, "FORGET_AFTER", 100.0), patch.object(inventory, "FORGET_INTERVAL", 10.0):
        async with offered(stick("1-1"), stick("1-2"), stick("1-3")) as (c, lab, (gone, held, away)):
            a, b = c.nodes.values()
            assert await a.admit(PodRef("default", "p", "uid-of-p"), "stick", 3) is None
            lab.unplug("1-1")
            lab.unplug("1-2")
            await asyncio.sleep(150)
            assert {gone.id, held.id, away.id} <= c.health(b).keys(), "node-a holds them all"
            a.end(pod("p"))
            await c.freed(gone, held, away)
            lab.plug(stick("1-2"))
            await asyncio.sleep(90)
            assert c.health(b).keys() == {gone.id, held.id, away.id}
            lab.running = False
            await asyncio.sleep(300)
            assert c.health(b).keys() == {gone.id, held.id, away.id}, "a server that is away says nothing"
            lab.running = True
            await asyncio.sleep(150)
            for node in (a, b):
                assert c.health(node) == {held.id: True, away.id: True}
            lab.plug(stick("1-1"))
            await c.all_healthy(gone, held, away)
