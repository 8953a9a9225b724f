"""Device nodes in virtual time that are missing, come late, collide, or belong to another device."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.simulation.cluster_rig import (
    DONGLE,
    STICK,
    Cluster,
    agent,
    attachment_of,
    detail,
    offered,
    one_stick,
    pod,
    port_of,
    reason,
    replug,
    stick,
    two_sticks,
)
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.model import DeviceKey, InterfaceClass, Reason
from usbip_plugin.node.products import Products
from usbip_plugin.node.status import device_rows
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.kubelet.specs import resolve
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped
from usbip_sim.virtual.surroundings import ClusterSpec


def texts(notices: list[DeviceEvent], what: EventKind) -> list[str]:
    return [notice.text for notice in notices if notice.what is what]


def all_free(node: ClusterNode) -> bool:
    return all(port.status is PortStatus.NULL for port in node.driver.ports_now())


async def nothing_left(c: Cluster, node: ClusterNode, *devices: DeviceKey) -> bool:
    return await c.settle(lambda: all_free(node) and all(c.holder(device) == "" for device in devices), 5)


@contextlib.asynccontextmanager
async def slow_stick(
    enumeration_s: float, allocate_timeout: float
) -> AsyncIterator[tuple[Cluster, ClusterNode, DeviceKey]]:
    """Runs one node with a stick that needs this time to enumerate."""

    def patient(made: ClusterSpec) -> ClusterSpec:
        return replace(made, config=replace(made.config, allocate_timeout=allocate_timeout))

    async with one_stick(nodes=1, change=patient) as (c, _lab, device):
        node = c["node-a"]
        node.kernel.enumeration_delay = enumeration_s
        yield c, node, device


@pytest.mark.parametrize(
    ("enumeration_s", "allocate_timeout"), [(5.5, 10.0), (7.0, 60.0), (55.0, 60.0), (110.0, 120.0)]
)
@stepped
async def test_a_device_may_enumerate_for_as_long_as_allocate_timeout_allows(
    enumeration_s: float, allocate_timeout: float
) -> None:
    async with slow_stick(enumeration_s, allocate_timeout) as (_c, node, device):
        assert await node.admit(pod("p"), "stick") is None
        assert reason(node, device) is Reason.ATTACHED


@pytest.mark.parametrize(("enumeration_s", "allocate_timeout"), [(7.0, 3.0), (12.0, 10.0), (200.0, 60.0)])
@stepped
async def test_the_error_of_a_device_that_enumerates_too_slowly_names_the_key(
    enumeration_s: float, allocate_timeout: float
) -> None:
    async with slow_stick(enumeration_s, allocate_timeout) as (c, node, device):
        began = asyncio.get_running_loop().time()
        failure = str(await node.admit(pod("p"), "stick"))
        assert "passed (allocateTimeout) while waiting for lab:3240/1-1 to enumerate" in failure
        assert asyncio.get_running_loop().time() - began <= allocate_timeout
        assert await nothing_left(c, node, device)


@pytest.mark.parametrize("allocate_timeout", [10.0, 60.0])
@stepped
async def test_a_port_that_sticks_leaves_time_for_a_second_try(allocate_timeout: float) -> None:
    async with slow_stick(1.3, allocate_timeout) as (_c, node, device):
        node.kernel.stuck_next()
        assert await node.admit(pod("p"), "stick") is None
        assert reason(node, device) is Reason.ATTACHED


@stepped
async def test_a_lost_device_may_need_most_of_a_reattach_to_enumerate() -> None:
    async with slow_stick(8.0, 60.0) as (c, node, device):
        assert await node.admit(pod("p"), "stick") is None
        (lab,) = c.servers.values()
        lab.drop("1-1")
        await c.becomes(node, device, healthy=False)
        await c.becomes(node, device, healthy=True, within=30)


@stepped
async def test_the_grace_of_a_new_claim_begins_with_the_answer_of_a_long_allocate() -> None:
    async with slow_stick(50.0, 60.0) as (c, node, device):
        await c.allocate(node, device)
        assert not await c.settle(lambda: c.holder(device) == "", ALLOCATION_GRACE - 1)
        assert await c.settle(lambda: c.holder(device) == "", 5)


@stepped
async def test_a_missing_child_node_fails_the_allocate_which_is_undone() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices, children=("tty",)) as (c, _lab, device):
        node = c["node-a"]
        node.kernel.driverless.add("tty")
        failure = str(await node.admit(pod("p"), "stick"))
        assert "no tty node appeared within 5 s, found none" in failure
        assert "cdc-acm" in failure
        assert "childrenTimeout" in failure
        assert await nothing_left(c, node, device)
        assert texts(notices, EventKind.FAILED)
        node.kernel.driverless.clear()
        await c.becomes(node, device, healthy=True)
        assert await node.admit(pod("q"), "stick") is None


@stepped
async def test_a_child_node_that_comes_in_time_is_in_the_answer() -> None:
    async with one_stick(nodes=1, children=("tty",), children_timeout=8.0) as (c, _lab, _device):
        node = c["node-a"]
        node.kernel.driverless.add("tty")

        def driver_loads() -> None:
            node.kernel.driverless.clear()
            node.kernel.changed.fire()

        asyncio.get_running_loop().call_later(7.0, driver_loads)
        assert await node.admit(pod("p"), "stick") is None
        (answer,) = node.kubelet.manager.checkpoint.values()
        assert answer.envs["USBIP_STICK_0_TTY"] == "/dev/ttyUSB0"


@stepped
async def test_a_missing_child_node_at_a_reattach_is_one_event_and_is_waited_for() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices, children=("tty",)) as (c, lab, device):
        node = await c.admitted(device)
        node.kernel.driverless.add("tty")
        lab.drop("1-1")
        await c.becomes(node, device, healthy=False)
        assert not await c.settle(lambda: reason(node, device) is Reason.ATTACHED, 60)
        (text,) = texts(notices, EventKind.NOT_REATTACHED)
        assert "no tty node" in text
        node.kernel.driverless.clear()
        await c.becomes(node, device, healthy=True, within=20)


@stepped
async def test_a_new_process_requires_the_configured_children_when_it_re_attaches() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices, children=("tty",)) as (c, lab, device):
        node = await c.admitted(device)
        node.kill()
        node.start()
        assert await c.settle(lambda: reason(node, device) is Reason.ATTACHED, 10)
        lab.drop("1-1")
        assert await c.settle(lambda: reason(node, device) is Reason.LOST, 10)
        await c.becomes(node, device, healthy=True)
        attachment = attachment_of(node, device)
        assert [child.kind for child in attachment.nodes] == ["usb", "tty"]


@pytest.mark.parametrize("by_cdi", [True, False])
@stepped
async def test_a_node_that_comes_after_the_answer_is_an_event_and_in_the_spec(*, by_cdi: bool) -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices, cdi=by_cdi) as (c, _lab, device):
        node = await c.taken(device)
        for _ in range(2):
            node.kernel.bring(port_of(node, device), ("tty",))
            node.kernel.changed.fire()
            assert await c.settle(lambda: bool(texts(notices, EventKind.NODES_LATE)), 5)
        (text,) = texts(notices, EventKind.NODES_LATE)
        assert text.startswith("/dev/ttyUSB0 appeared after the Allocate; ")
        assert ("restart the container" in text) is by_cdi
        if by_cdi:
            found = resolve(node.specs.find(device.id), [f"usbip.dev/stick={device.id}-0"])
            assert "/dev/ttyUSB0" in found.nodes
            assert found.envs["USBIP_STICK_0_TTY"] == "/dev/ttyUSB0"
        assert reason(node, device) is Reason.ATTACHED


@stepped
async def test_a_late_node_of_a_kind_that_children_does_not_list_is_no_event() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices, children=("tty",)) as (c, _lab, device):
        node = await c.admitted(device)
        node.kernel.bring(port_of(node, device), ("hidraw",))
        node.kernel.changed.fire()
        assert not await c.settle(lambda: bool(texts(notices, EventKind.NODES_LATE)), 5)


@stepped
async def test_a_device_that_turns_into_another_over_its_connection_is_detached_and_not_handed_out() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices, cdi=True) as (c, _lab, device):
        node = await c.admitted(device)
        before = node.specs.find(device.id)
        node.kernel.enumerate_anew(port_of(node, device), DONGLE)
        await c.becomes(node, device, healthy=False)
        (text,) = texts(notices, EventKind.LOST)
        assert "left the bus" in text
        await c.becomes(node, device, healthy=True)
        attachment = attachment_of(node, device)
        assert attachment.usb_id == STICK
        assert node.specs.find(device.id) != before
        assert len([p for p in node.driver.ports_now() if p.status is not PortStatus.NULL]) == 1, "no port leaks"


@stepped
async def test_a_device_that_its_server_lists_in_another_mode_stays_lost_with_an_event() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices) as (c, lab, device):
        node = await c.admitted(device)
        replug(lab, VirtualDevice("1-1", DONGLE, serial="S-1-1", configured=True))
        await c.becomes(node, device, healthy=False)
        assert await c.settle(lambda: bool(texts(notices, EventKind.NOT_REATTACHED)), 20)
        (text,) = texts(notices, EventKind.NOT_REATTACHED)
        assert str(STICK) in text
        assert str(DONGLE) in text
        assert all_free(node)


@stepped
async def test_two_devices_under_one_path_are_refused_before_either_is_touched() -> None:
    async with two_sticks(nodes=1, container_paths=("/dev/stick",)) as (c, lab, *_devices):
        node = c["node-a"]
        failure = str(await node.admit(pod("p"), "stick", 2))
        assert "containerPath /dev/stick is the same for 2 devices of one container; use {index}" in failure
        assert lab.table.granted == 0
        assert await node.admit(pod("q"), "stick") is None


@stepped
async def test_paths_that_only_the_devices_make_equal_undo_the_allocate() -> None:
    sticks, path = (stick("1-1", "SAME"), stick("1-2", "SAME")), "/dev/stick-{serial}"
    async with offered(*sticks, nodes=1, container_paths=(path,), cdi=True) as (c, _lab, devices):
        node = c["node-a"]
        assert "would both have the path /dev/stick-SAME" in str(await node.admit(pod("p"), "stick", 2))
        assert await nothing_left(c, node, *devices)
        assert not node.specs.texts


@stepped
async def test_a_network_interface_of_a_device_is_an_event_of_its_pod() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices) as (c, _lab, device):
        node = c["node-a"]
        node.kernel.net[STICK] = ("enx020000000001",)
        assert await node.admit(pod("p"), "stick") is None
        assert await c.settle(lambda: bool(texts(notices, EventKind.NETWORK)), 5)
        assert (
            DeviceEvent(
                EventKind.NETWORK,
                device,
                "network interface enx020000000001 stays on the node, because it is not a device node",
                pod("p"),
            )
            in notices
        )


@stepped
async def test_an_interface_that_is_withheld_is_an_event_of_its_pod_and_stays_withheld_after_a_loss() -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(nodes=1, notices=notices) as (c, _lab, device):
        node = c["node-a"]
        node.kernel.interfaces[STICK] = (InterfaceClass(0xFF, 0, 0), InterfaceClass(3, 1, 1))
        assert await node.admit(pod("p"), "stick") is None
        assert await c.settle(lambda: bool(texts(notices, EventKind.WITHHELD)), 5)
        text = "a keyboard (03/01/01) withheld, because the resource does not allow it"
        assert DeviceEvent(EventKind.WITHHELD, device, text, pod("p")) in notices
        assert detail(node, device).endswith(", without a keyboard (03/01/01)")
        products = Products(agent(node).claims)
        (row,) = device_rows(agent(node), "usbip.dev", now=datetime.now(UTC), products=products)
        assert row.withheld == ("03/01/01",)
        await c.lost_and_back(node, device)
        assert attachment_of(node, device).withheld == (InterfaceClass(3, 1, 1),)
