"""Several devices of a container, several containers of a pod, init containers and sidecars, in virtual time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.simulation.cluster_rig import (
    DONGLE,
    STICK,
    Cluster,
    agent,
    cluster,
    dongle,
    key,
    offered,
    one_stick,
    pod,
    resource,
    server,
    spec,
    stick,
    two_sticks,
)
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.claims import ClaimState
from usbip_plugin.config.schema import DeviceSelector, Extra, ResourceConfig, Selector
from usbip_plugin.errors import KubeForbidden
from usbip_plugin.model import DeviceKey
from usbip_sim.kubelet.device_manager import ContainerSpec
from usbip_sim.leases import FINE, Fate, Operation
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped

LONG = 10 * ALLOCATION_GRACE
"""Longer than any grace."""


def app(**limits: int) -> ContainerSpec:
    return ContainerSpec("app", limits)


def init(**limits: int) -> ContainerSpec:
    return ContainerSpec("setup", limits, init=True)


def sidecar(**limits: int) -> ContainerSpec:
    return ContainerSpec("sidecar", limits, init=True, restartable=True)


@contextlib.asynccontextmanager
async def stick_and_dongle(
    *, dongle_by_cdi: bool = False
) -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey, DeviceKey]]:
    """Runs a cluster with a stick and a dongle, each of its own resource."""
    lab = server("lab", stick("1-1"), dongle("1-2"))
    dongles = replace(resource("dongle", [lab], DONGLE), cdi=dongle_by_cdi)
    async with cluster(spec([lab], resource("stick", [lab]), dongles)) as c:
        one, two = key(lab, "1-1"), key(lab, "1-2")
        await c.all_healthy(one)
        await c.all_healthy(two, name="dongle")
        yield c, lab, one, two


@stepped
async def test_a_container_has_devices_of_two_resources_until_its_pod_ends() -> None:
    async with stick_and_dongle() as (c, _lab, one, two):
        node = c["node-a"]
        assert await node.admit_containers(pod("p"), app(stick=1, dongle=1)) is None
        assert node.attached() == {one, two}
        assert node.allocation(pod("p"), "stick").envs["USBIP_STICK_0_BUSID"] == "1-1"
        assert node.allocation(pod("p"), "dongle").envs["USBIP_DONGLE_0_BUSID"] == "1-2"
        await asyncio.sleep(LONG)
        assert node.attached() == {one, two}
        assert c.pod_of(one) == c.pod_of(two) == pod("p")
        node.end(pod("p"))
        await c.freed(one, two)


@stepped
async def test_two_devices_of_a_container_have_numbers_and_paths_of_their_own_and_their_extras_once() -> None:
    lab, attic = server("lab", stick("1-1")), server("attic", stick("1-1"))
    one, two = key(lab, "1-1"), key(attic, "1-1")
    fuse = Extra("/dev/fuse", "/dev/fuse", "rw")
    selector = Selector(vendor=STICK.vendor, product=STICK.product)
    devices = tuple(DeviceSelector(of.key, selector, (fuse,)) for of in (lab, attic))
    wanted = ResourceConfig("stick", devices, container_paths=("/dev/stick-{index}",))
    async with cluster(spec([lab, attic], wanted)) as c:
        node = c["node-a"]
        await c.all_healthy(one, two)
        assert await node.admit(pod("p"), "stick", 2) is None
        answer = node.allocation(pod("p"), "stick")
        paths = [device.container_path for device in answer.devices]
        assert sorted(paths) == ["/dev/fuse", "/dev/stick-0", "/dev/stick-1"]
        assert {answer.envs[f"USBIP_STICK_{n}_DEVICE"] for n in (0, 1)} == {"/dev/stick-0", "/dev/stick-1"}


@stepped
async def test_each_container_of_a_pod_has_a_device_of_its_own() -> None:
    async with offered(stick("1-1"), stick("1-2"), stick("1-3")) as (c, _lab, devices):
        node = c["node-a"]
        containers = [ContainerSpec(name, {"stick": n}) for name, n in (("one", 1), ("two", 2))]
        assert await node.admit_containers(pod("p"), *containers) is None
        one = node.allocation(pod("p"), "stick", "one")
        two = node.allocation(pod("p"), "stick", "two")
        assert one.device_ids | two.device_ids == {device.id for device in devices}
        assert {name for name in one.envs if name.endswith("BUSID")} == {"USBIP_STICK_0_BUSID"}
        assert {n for n in two.envs if n.endswith("BUSID")} == {"USBIP_STICK_0_BUSID", "USBIP_STICK_1_BUSID"}
        await asyncio.sleep(LONG)
        assert node.attached() == set(devices)
        node.end(pod("p"))
        await c.freed(*devices)


@pytest.mark.parametrize("cdi", [False, True], ids=["plain", "by CDI"])
@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 1), (1, 2)], ids=["as many", "fewer", "more"])
@stepped
async def test_an_app_gets_the_devices_of_its_init_container(first: int, then: int, *, cdi: bool) -> None:
    """Indexes begin at 0 in each container. The pod keeps the init container's devices until its end."""
    async with two_sticks(cdi=cdi, container_paths=("/dev/stick-{index}",)) as (c, lab, *devices):
        node = c["node-a"]
        assert await node.admit_containers(pod("p"), init(stick=first), app(stick=then)) is None
        before = node.allocation(pod("p"), "stick", "setup")
        after = node.allocation(pod("p"), "stick")
        assert before.device_ids <= after.device_ids or after.device_ids <= before.device_ids
        used = before.device_ids | after.device_ids
        assert {device.id for device in node.attached()} == used
        for count, container in (first, "setup"), (then, "app"):
            assert await numbered(node, container, cdi=cdi) == {f"/dev/stick-{n}" for n in range(count)}
        imports = lab.table.granted
        await asyncio.sleep(LONG)
        assert {device.id for device in node.attached()} == used, "its init containers may run again"
        assert lab.table.granted == imports
        node.end(pod("p"))
        await c.freed(*devices, within=5 + ALLOCATION_GRACE)
        assert not node.specs.texts


async def numbered(node: ClusterNode, container: str, *, cdi: bool) -> set[str]:
    """Returns the device paths in a container."""
    if cdi:
        return set((await node.start_container(pod("p"), container)).nodes)
    return {device.container_path for device in node.allocation(pod("p"), "stick", container).devices}


@stepped
async def test_a_device_of_an_init_container_only_stays_while_that_runs_and_the_app_has_another() -> None:
    """pod-resources lists the pod only with the app's device."""
    async with stick_and_dongle() as (c, _lab, one, two):
        node = c["node-a"]
        assert await node.admit_containers(pod("p"), init(stick=1), app(dongle=1)) is None
        await asyncio.sleep(LONG)
        assert node.attached() == {one, two}
        node.end(pod("p"))
        await c.freed(one, two)


@pytest.mark.parametrize("restarted", [False, True])
@stepped
async def test_an_init_container_keeps_a_device_that_the_node_had_for_an_earlier_pod(*, restarted: bool) -> None:
    """pod-resources lists the pod only with the app's device, so the lock must no longer name the earlier pod."""
    async with stick_and_dongle() as (c, lab, one, two):
        node = await c.taken(one)
        node.end(pod("p"))
        assert await node.admit_containers(pod("q"), init(stick=1), app(dongle=1)) is None
        assert await c.settle(lambda: c.holder(one) == "node-a" and c.pod_of(one) is None, 2)
        if restarted:
            node.kill()
            node.start()
        await asyncio.sleep(LONG)
        assert node.attached() == {one, two}
        assert lab.table.granted == 2
        node.end(pod("q"))
        await c.freed(one, two)


@stepped
async def test_a_late_write_does_not_replace_the_pod_that_has_got_the_device() -> None:
    failing = True

    def fate(_node: str, operation: Operation) -> Fate:
        return (
            Fate(refused=KubeForbidden("update", "leases", "injected"))
            if failing and operation.verb == "update"
            else FINE
        )

    async with one_stick(change=lambda made: replace(made, faults=fate)) as (c, _lab, device):
        failing = False
        node = await c.taken(device)
        node.end(pod("p"))
        failing = True
        await c.allocate(node, device)
        await asyncio.sleep(5)  # the node tries less and less often to write that the pod is unknown
        failing = False
        assert await node.admit(pod("q"), "stick") is None
        await c.noted(device, "q")
        assert not await c.settle(lambda: c.pod_of(device) != pod("q"), 60)


@stepped
async def test_a_pod_with_init_containers_keeps_no_device_of_another_resource() -> None:
    async with stick_and_dongle() as (c, _lab, one, two):
        node = c["node-a"]
        assert await node.admit_containers(pod("p"), init(stick=1), ContainerSpec("app", {})) is None
        await c.allocate(node, two, name="dongle")  # for a pod that is never admitted
        assert await c.settle(lambda: c.holder(two) == "", ALLOCATION_GRACE + 5)
        assert node.attached() == {one}


@stepped
async def test_a_sidecar_keeps_its_device_and_the_app_gets_another() -> None:
    async with two_sticks() as (c, _lab, *devices):
        node = c["node-a"]
        assert await node.admit_containers(pod("p"), sidecar(stick=1), app(stick=1)) is None
        beside, main = node.allocation(pod("p"), "stick", "sidecar"), node.allocation(pod("p"), "stick")
        assert beside.device_ids.isdisjoint(main.device_ids)
        await asyncio.sleep(LONG)
        assert node.attached() == set(devices)
        assert c.pod_of(devices[0]) == c.pod_of(devices[1]) == pod("p")
        node.end(pod("p"))
        await c.freed(*devices)


@stepped
async def test_by_cdi_and_plainly_in_one_container() -> None:
    async with stick_and_dongle(dongle_by_cdi=True) as (c, _lab, one, two):
        node = c["node-a"]
        assert await node.admit_containers(pod("p"), app(stick=1, dongle=1)) is None
        assert node.allocation(pod("p"), "stick").devices
        assert not node.allocation(pod("p"), "dongle").devices
        got = await node.start_container(pod("p"))
        assert got.envs["USBIP_DONGLE_0_BUSID"] == "1-2"
        await c.lost_and_back(node, two)
        assert (await node.start_container(pod("p"))).nodes != got.nodes
        assert node.attached() == {one, two}
        node.end(pod("p"))
        await c.freed(one, two)
        assert not node.specs.texts


@stepped
async def test_if_the_second_resource_cannot_be_attached_the_first_is_soon_free_again() -> None:
    """The second Allocate fails the pod. Meanwhile the kubelet lists the pod with the first device."""
    async with stick_and_dongle() as (c, lab, one, two):
        node = c["node-a"]
        lab.lie("1-2", said=STICK)
        assert "expected USB ID 1050:0407" in str(await node.admit_containers(pod("p"), app(stick=1, dongle=1)))
        await c.freed(one, two)  # long before the end of the grace
        await c.becomes(node, one, healthy=True)


def usb_node(node: ClusterNode, device: DeviceKey) -> str:
    """Returns the present path of the device's usb node."""
    attachment = agent(node).claims.view[device.id].attachment
    assert attachment is not None
    return attachment.nodes[0].path


def slow(c: Cluster, node: ClusterNode, of: VirtualServer, seconds: float) -> None:
    """Delays each packet between this node and the server by so many seconds."""
    c.network.link(node.name, of.key).slow = seconds


@pytest.mark.parametrize("back", [False, True], ids=["away", "back"])
@stepped
async def test_a_device_that_is_lost_while_the_next_is_attached_is_not_in_the_answer_with_its_old_nodes(
    *, back: bool
) -> None:
    first, then = server("attic", stick("1-1")), server("lab", stick("1-1"))
    one, two = key(first, "1-1"), key(then, "1-1")
    async with cluster(spec([first, then], nodes=1)) as c:
        node = c["node-a"]
        await c.all_healthy(one, two)
        slow(c, node, then, 0.7)
        admission = asyncio.create_task(node.admit(pod("p"), "stick", 2))
        assert await c.settle(lambda: one in node.held_in(ClaimState.ATTACHED), 5)
        before = usb_node(node, one)
        if back:
            first.drop("1-1")
        else:
            first.unplug("1-1")
        assert await c.settle(lambda: one in node.held_in(ClaimState.REATTACHING), 5)
        failure = await admission
        if back:
            assert failure is None
            paths = {device.host_path for device in node.allocation(pod("p"), "stick").devices}
            assert paths == {usb_node(node, one), usb_node(node, two)}
            assert before not in paths
        else:
            assert f"{one} was lost during the attach of {two}" in str(failure)
            await c.freed(one, two, within=20)


@stepped
async def test_if_the_kubelet_refuses_the_second_resource_itself_the_first_is_free_after_the_grace() -> None:
    async with stick_and_dongle() as (c, _lab, one, two):
        node = c["node-a"]
        assert await c["node-b"].admit(pod("q"), "dongle") is None
        await c.becomes(node, two, healthy=False)
        assert "no healthy devices" in str(await node.admit_containers(pod("p"), app(stick=1, dongle=1)))
        assert await c.settle(lambda: c.holder(one) == "", ALLOCATION_GRACE + 5)
        assert not node.attached()
