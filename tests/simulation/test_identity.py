"""Devices selected by the serial number or the class that they report, at any bus ID."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.simulation.cluster_rig import (
    DONGLE,
    LOCKS,
    STICK,
    Cluster,
    by_serial,
    carry,
    cluster,
    detail,
    dongle,
    key,
    offered,
    pod,
    reason,
    replug,
    server,
    spec,
    stick,
)
from usbip_plugin.claims import ClaimState
from usbip_plugin.config.schema import DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import WrongSerial
from usbip_plugin.inventory.handover import MAX_REREADS
from usbip_plugin.locks import record
from usbip_plugin.model import DeviceKey, InterfaceClass, Reason
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped

POLLED = 10.0
"""Virtual seconds in which a server is polled and a serial number is read, by any node."""
STORAGE = InterfaceClass(8, 6, 0x50)


async def everywhere(c: Cluster, device: DeviceKey, why: Reason) -> None:
    """Waits until every node advertises a device with a reason, and its kubelet knows the health."""
    for node in c.nodes.values():
        assert await c.settle(lambda node=node: reason(node, device) is why, POLLED), reason(node, device)  # type: ignore[misc]
        await c.becomes(node, device, healthy=why.healthy)


@contextlib.asynccontextmanager
async def red_by_port() -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey]]:
    """Runs a cluster whose three nodes offer RED by serial number. A replugged device keeps the device number."""
    lab = server("lab", stick("1-1", "RED"))
    lab.table.by_port = True
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_serial(lab), nodes=3)) as c:
        await c.all_healthy(device)
        yield c, lab, device


@stepped
async def test_a_free_device_that_is_plugged_in_elsewhere_is_offered_from_there_and_once() -> None:
    async with offered(stick("1-1", "RED"), serials=("RED",), nodes=3) as (c, lab, (old,)):
        new = key(lab, "1-2")
        granted = lab.table.granted
        carry(lab, "1-1", lab, "1-2")
        await everywhere(c, new, Reason.FREE)
        await everywhere(c, old, Reason.MOVED)
        assert all("RED is now at lab:3240/1-2" in detail(node, old) for node in c.nodes.values())
        assert lab.table.granted == granted + 1, "read once for all nodes"
        assert await c["node-b"].admit(pod("p"), "stick") is None
        assert c["node-b"].attached() == {new}


@stepped
async def test_dongles_that_change_places_are_identified_on_all_nodes() -> None:
    sticks = stick("1-1", "RED"), stick("1-2", "BLUE")
    async with offered(*sticks, serials=("RED",), nodes=3) as (c, lab, (first, second)):
        granted = lab.table.granted
        replug(lab, stick("1-1", "BLUE"), stick("1-2", "RED"))
        assert await c.settle(lambda: reason(c["node-a"], first) is Reason.NOT_READ, POLLED)
        await everywhere(c, second, Reason.FREE)
        await everywhere(c, first, Reason.MOVED)
        assert lab.table.granted == granted + 2
        assert not lab.violations


@stepped
async def test_the_devices_of_a_server_with_new_device_numbers_are_read_once_for_all_nodes() -> None:
    devices = [stick(f"1-{n}", f"S{n}") for n in range(1, 9)]
    async with offered(*devices, serials=[device.serial for device in devices], nodes=4) as (c, lab, keys):
        granted = lab.table.granted
        await lab.stop()
        for each in keys:
            await everywhere(c, each, Reason.SERVER_UNREACHABLE)
        for device in devices:
            lab.unplug(device.busid)
            lab.plug(device)
        await lab.start()
        assert await c.settle(lambda: all(c.health(c["node-a"])[k.id] for k in keys), 60)
        await c.all_healthy(*keys)
        assert lab.table.granted == granted + len(devices)


@stepped
async def test_a_device_with_a_new_number_at_each_import_is_read_a_limited_number_of_times() -> None:
    lab = server("lab", stick("1-1", "RED"))
    lab.table.renumbers = True
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_serial(lab), nodes=3)) as c:
        await asyncio.sleep(60)
        await c.all_healthy(device)
        granted = lab.table.granted
        assert granted <= MAX_REREADS + 1
        await asyncio.sleep(300)
        assert lab.table.granted == granted
        assert await c["node-a"].admit(pod("p"), "stick") is None
        assert c["node-a"].attached() == {device}


@stepped
async def test_a_swapped_dongle_with_an_unchanged_device_number_is_noticed() -> None:
    async with red_by_port() as (c, lab, device):
        number = c.backend.leases[device.id].annotations[record.READ_FROM]
        for serial, why in (("BLUE", Reason.LISTED_WRONG), ("RED", Reason.FREE)):
            granted = lab.table.granted
            lab.unplug("1-1")
            await everywhere(c, device, Reason.NOT_LISTED)
            lab.plug(stick("1-1", serial))
            await everywhere(c, device, why)
            assert c.backend.leases[device.id].annotations[record.READ_FROM] == number
            assert lab.table.granted == granted + 1, "read once for all nodes"
        # a device is not read again because a pod used it
        assert await c["node-b"].admit(pod("p"), "stick") is None
        c["node-b"].end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", 30)
        granted = lab.table.granted
        await everywhere(c, device, Reason.FREE)
        await asyncio.sleep(60)
        assert lab.table.granted == granted


@stepped
async def test_a_dongle_swapped_between_two_polls_fails_the_allocate_and_is_offered_when_it_is_back() -> None:
    async with red_by_port() as (c, lab, device):
        replug(lab, stick("1-1", "BLUE"))
        node = c["node-a"]
        with pytest.raises(WrongSerial):
            await c.allocate(node, device)
        await everywhere(c, device, Reason.LISTED_WRONG)
        lab.unplug("1-1")
        await everywhere(c, device, Reason.NOT_LISTED)
        lab.plug(stick("1-1", "RED"))
        await everywhere(c, device, Reason.FREE)
        assert await node.admit(pod("p"), "stick") is None


@stepped
async def test_a_device_on_a_loose_cable_is_read_a_limited_number_of_times() -> None:
    async with offered(stick("1-1", "RED"), serials=("RED",)) as (c, lab, (device,)):
        granted = lab.table.granted
        for _ in range(20):
            lab.unplug("1-1")
            await everywhere(c, device, Reason.NOT_LISTED)
            lab.plug(stick("1-1", "RED"))
            await asyncio.sleep(8)
        assert lab.table.granted <= granted + MAX_REREADS
        await everywhere(c, device, Reason.FREE)


@stepped
async def test_an_allocate_fails_if_the_device_has_another_serial_number_than_its_lock() -> None:
    lab = server("lab", stick("1-1", "BLUE"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_serial(lab), nodes=3)) as c:
        assert await c.settle(lambda: device.id in c.backend.leases and c.holder(device) == "", POLLED)
        c.mislead(device, "RED")
        await c.all_healthy(device)
        node = c["node-a"]
        with pytest.raises(WrongSerial, match="1-1: expected serial number RED, got BLUE"):
            await c.allocate(node, device)
        await c.freed(device)
        assert not node.kernel.records["node-a"]
        assert c.backend.leases[device.id].annotations[record.SERIAL] == "BLUE", "corrected before the lock is free"
        await everywhere(c, device, Reason.LISTED_WRONG)
        assert "expected serial number RED at lab:3240/1-1, got BLUE" in detail(c["node-b"], device)
        granted = lab.table.granted
        await asyncio.sleep(60)
        assert lab.table.granted == granted


@stepped
async def test_an_allocate_by_vendor_and_product_accepts_any_serial_number() -> None:
    async with offered(stick("1-1", "BLUE"), nodes=1) as (c, lab, (device,)):
        for n, serial in enumerate(("BLUE", "RED")):
            assert await c["node-a"].admit(pod(f"p{n}"), "stick") is None
            assert await c.settle(lambda s=serial: c.backend.leases[device.id].annotations.get(record.SERIAL) == s, 5)  # type: ignore[misc]
            c["node-a"].end(pod(f"p{n}"))
            assert await c.settle(lambda: c.holder(device) == "", 30)
            replug(lab, stick("1-1", "RED"))
            await c.all_healthy(device)


def bare(busid: str, interface: InterfaceClass = STORAGE) -> VirtualDevice:
    """Returns a device that was never configured since usbip-host bound it."""
    return VirtualDevice(busid, STICK, interface=interface)


@stepped
async def test_a_device_that_was_never_configured_is_selected_by_the_class_it_reports() -> None:
    lab = server("lab", bare("1-1"), bare("1-2", InterfaceClass(3, 0, 0)))
    storage, hid = key(lab, "1-1"), key(lab, "1-2")
    by_class = ResourceConfig("stick", (DeviceSelector(lab.key, Selector(class_=8)),))
    async with cluster(spec([lab], by_class, nodes=3)) as c:
        await c.all_healthy(storage)
        assert await c.settle(lambda: hid.id in c.backend.leases and c.holder(hid) == "", POLLED)
        assert all(hid.id not in c.health(node) for node in c.nodes.values())
        assert lab.table.granted == 2, "each was read once for all nodes"
        assert c.backend.leases[storage.id].annotations[record.INTERFACES] == "080650"
        await c["node-b"].stop()
        assert await c["node-a"].admit(pod("p"), "stick") is None
        assert c["node-a"].attached() == {storage}
        c["node-b"].start()
        assert await c.settle(lambda: reason(c["node-b"], storage) is Reason.HELD_ELSEWHERE, 5), (
            "its server does not list it"
        )


@stepped
async def test_a_device_whose_server_lists_its_class_is_not_read() -> None:
    lab = server("lab", replace(bare("1-1"), configured=True))
    by_class = ResourceConfig("stick", (DeviceSelector(lab.key, Selector(class_=8)),))
    async with cluster(spec([lab], by_class)) as c:
        await c.all_healthy(key(lab, "1-1"))
        await asyncio.sleep(60)
        assert lab.table.granted == 0
        await c["node-b"].stop()
        assert await c["node-a"].admit(pod("p"), "stick") is None
        c["node-b"].start()
        device = key(lab, "1-1")
        assert await c.settle(lambda: reason(c["node-b"], device) is Reason.HELD_ELSEWHERE, 5), "its lock says so"


@stepped
async def test_devices_with_a_duplicate_serial_number_are_not_offered_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lab = server("lab", stick("1-1", "0123456789"), stick("1-2", "0123456789"))
    one, other = key(lab, "1-1"), key(lab, "1-2")
    with caplog.at_level(logging.WARNING):
        async with cluster(spec([lab], by_serial(lab, serials=("0123456789",)), nodes=1)) as c:
            node = c["node-a"]
            await everywhere(c, one, Reason.AMBIGUOUS)
            await everywhere(c, other, Reason.AMBIGUOUS)
            assert "also belongs to lab:3240/1-2" in detail(node, one)
            assert await node.admit(pod("p"), "stick") is not None
            await asyncio.sleep(30)
            assert _count(caplog, "duplicate serial number, devices not offered") == 1
            lab.unplug("1-2")
            await everywhere(c, one, Reason.FREE)
            assert await node.admit(pod("q"), "stick") is None
            lab.plug(stick("1-2", "0123456789"))
            assert await c.settle(lambda: reason(node, other) is Reason.AMBIGUOUS, POLLED)
            assert "(held by node node-a)" in detail(node, other)
            assert reason(node, one) is Reason.ATTACHED, "a pod keeps its device"


def _count(caplog: pytest.LogCaptureFixture, message: str) -> int:
    return sum(line.getMessage() == message for line in caplog.records)


@stepped
async def test_a_device_that_two_resources_offer_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    lab = server("lab", stick("1-1"))
    both = [ResourceConfig(name, (DeviceSelector(lab.key, Selector(vendor=STICK.vendor)),)) for name in ("one", "two")]
    apart = ResourceConfig("three", (DeviceSelector(lab.key, Selector(vendor=DONGLE.vendor)),))
    with caplog.at_level(logging.WARNING):
        async with cluster(spec([lab], *both, apart, nodes=1)) as c:
            await c.all_healthy(key(lab, "1-1"), name="one")
            lab.unplug("1-1")
            await everywhere(c, key(lab, "1-1"), Reason.NOT_LISTED)
            lab.plug(stick("1-1"))
            await c.all_healthy(key(lab, "1-1"), name="two")
    message = "devices offered by several resources, usable by one at a time"
    assert _count(caplog, message) == 1
    (line,) = (line for line in caplog.records if line.getMessage() == message)
    assert line.__dict__["resources"] == ["one", "two"]


async def robbed_of_red(c: Cluster, lab: VirtualServer, device: DeviceKey) -> ClusterNode:
    """Returns the node whose pod had RED. Its lock is taken, and has the serial number of BLUE, which is there now."""
    node = await c.taken(device)
    assert await c.settle(lambda: c.note(device, record.SERIAL) == "RED", POLLED)
    c.steal(device)
    assert await c.settle(lambda: not node.attached(), LOCKS.import_window + POLLED)
    replug(lab, stick("1-1", "BLUE"))
    c.mislead(device, "BLUE")
    return node


@stepped
async def test_after_a_reboot_a_pod_has_its_own_stick_and_not_one_that_was_read_while_the_lock_was_lost() -> None:
    async with offered(stick("1-1", "RED")) as (c, lab, [device]):
        node = await robbed_of_red(c, lab, device)
        c.let_go(device)
        assert await c.settle(lambda: c.holder(device) == node.name, POLLED)
        assert not await c.settle(lambda: bool(node.held_in(ClaimState.ATTACHED)), 60)
        assert c.note(device, record.SERIAL) == "RED", "the lock has the serial number of the pod's stick"
        node.reboot()
        node.start()
        assert not await c.settle(lambda: bool(node.held_in(ClaimState.ATTACHED)), 60)
        replug(lab, stick("1-1", "RED"))
        assert await c.settle(lambda: node.held_in(ClaimState.ATTACHED) == {device}, POLLED)


@stepped
async def test_after_a_restart_a_pod_waits_for_the_stick_that_its_resource_names() -> None:
    async with offered(stick("1-1", "RED"), serials=("RED",)) as (c, lab, [device]):
        node = await robbed_of_red(c, lab, device)
        node.kill()
        node.start()
        assert await c.settle(lambda: node.held_in(ClaimState.LOST) == {device}, POLLED)
        c.let_go(device)
        assert not await c.settle(lambda: bool(node.held_in(ClaimState.ATTACHED)), 60)
        replug(lab, stick("1-1", "RED"))
        assert await c.settle(lambda: node.held_in(ClaimState.ATTACHED) == {device}, POLLED)


async def _is_gone(lab: VirtualServer) -> None:
    lab.unplug("1-1")


async def _is_another_stick(lab: VirtualServer) -> None:
    replug(lab, stick("1-1", "BLUE"))


async def _is_a_dongle(lab: VirtualServer) -> None:
    replug(lab, dongle("1-1", "RED"))


async def _has_two_twins(lab: VirtualServer) -> None:
    replug(lab, stick("1-1", "BLUE"))
    lab.plug(stick("1-2", "RED"))
    lab.plug(stick("1-3", "RED"))


AWAY = {
    "gone": _is_gone,
    "another stick": _is_another_stick,
    "another USB ID": _is_a_dongle,
    "ambiguous": _has_two_twins,
    "server down": VirtualServer.stop,
}


@pytest.mark.parametrize("away", AWAY)
@stepped
async def test_a_pod_that_waits_for_its_stick_has_the_lock_again_once_it_is_free(away: str) -> None:
    async with offered(stick("1-1", "RED")) as (c, lab, [device]):
        node = await c.taken(device)
        assert await c.settle(lambda: c.note(device, record.SERIAL) == "RED", POLLED)
        await AWAY[away](lab)
        assert await c.settle(lambda: node.held_in(ClaimState.REATTACHING) == {device}, POLLED)
        await asyncio.sleep(POLLED)
        for _ in range(2):
            c.steal(device)
            assert await c.settle(lambda: node.held_in(ClaimState.LOST) == {device}, POLLED)
            c.mislead(device, "BLUE")
            c.let_go(device)
            assert await c.settle(lambda: c.holder(device) == node.name, POLLED)
            assert c.note(device, record.SERIAL) == "RED"
        assert not node.attached()
        assert c.note(device, record.POD) is not None


@stepped
async def test_an_allocate_does_not_leave_the_serial_number_of_an_earlier_stick_on_the_lock() -> None:
    """The kernel has read the one of the pod's stick only later, and the node may reboot before that is written."""
    async with offered(stick("1-1", "RED")) as (c, lab, [device]):
        await c.all_healthy(device)
        node = await c.taken(device)
        node.end(pod("p"))
        await c.freed(device, within=60)
        assert c.note(device, record.SERIAL) == "RED"
        replug(lab, stick("1-1", "BLUE"))
        await c.becomes(node, device, healthy=True)
        written: list[tuple[str | None, str | None]] = []
        c.backend.on_write = lambda _before, _after: written.append(
            (c.note(device, record.PORT), c.note(device, record.SERIAL))
        )
        assert await node.admit(pod("q"), "stick") is None
        assert await c.settle(lambda: c.note(device, record.SERIAL) == "BLUE", POLLED)
        assert [serial for port, serial in written if port is not None] == [None, "BLUE"]
