"""Devices of CDI resources in virtual time: a container that starts always gets the present device nodes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tests.simulation.cluster_rig import (
    STICK,
    Cluster,
    agent,
    attachment_of,
    cluster,
    detail,
    key,
    one_stick,
    pod,
    port_of,
    resource,
    server,
    spec,
    stick,
    two_sticks,
)
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.attach.monitor import PORT_CHECK_INTERVAL
from usbip_plugin.attach.reattach import AfterReattach
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, OnLoss, ResourceConfig
from usbip_plugin.kubelet.allocate import PRE_START_WAIT
from usbip_plugin.model import Advertised, DeviceKey, DeviceNode, Reason
from usbip_plugin.node.agent import MetricHooks
from usbip_sim.kubelet.device_manager import PRE_START_TIMEOUT_S, EndpointError
from usbip_sim.kubelet.specs import Resolved, UnresolvableDevice, resolve
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped
from usbip_sim.world import Setup, running

SPEC = "/var/run/cdi/usbip.dev-stick-"
RECORD_FAILS = "cannot write the port record /run/vhci_hcd/port"


def by_cdi(lab: VirtualServer, on_loss: OnLoss = OnLoss.RESTART) -> ResourceConfig:
    return replace(resource("stick", [lab]), cdi=True, on_loss=on_loss)


def stick_by_cdi(
    *, nodes: int = 2, notices: list[DeviceEvent] | None = None, on_loss: OnLoss = OnLoss.RESTART
) -> contextlib.AbstractAsyncContextManager[tuple[Cluster, VirtualServer, DeviceKey]]:
    """Runs one_stick() with a CDI resource."""
    return one_stick(nodes=nodes, notices=notices, cdi=True, on_loss=on_loss)


def kernel_nodes(node: ClusterNode, device: DeviceKey) -> dict[str, tuple[str, int, int]]:
    """Returns the device nodes that the kernel has now, as a runtime should put them into a container."""
    attachment = attachment_of(node, device)
    return {n.path: (n.path, n.major, n.minor) for n in attachment.nodes}


def children_of(node: ClusterNode, device: DeviceKey) -> list[DeviceNode]:
    """Returns the child nodes that the kernel has of the device, to be changed."""
    occupant = node.kernel.occupant(port_of(node, device))
    assert occupant is not None
    return occupant.children


def written(node: ClusterNode, device: DeviceKey) -> dict[str, tuple[str, int, int]]:
    """Returns the device nodes in the present spec of a container's first device."""
    return dict(resolve(node.specs.find(device.id), [f"usbip.dev/stick={device.id}-0"]).nodes)


def env(got: Resolved, name: str) -> str:
    return got.envs[f"USBIP_STICK_{name}"]


async def restarted(c: Cluster, node: ClusterNode) -> None:
    """Kills the agent and waits until its successor is registered."""
    node.kill()
    assert await c.settle(lambda: not node.kubelet.connected(c.full("stick")), 5)
    node.start()
    assert await c.settle(lambda: node.kubelet.connected(c.full("stick")), 5)


async def with_pod(c: Cluster, device: DeviceKey) -> tuple[ClusterNode, Resolved]:
    """Admits pod p with the device, which has a tty, on node-a. Returns the node and the devices of its container."""
    c["node-a"].kernel.child_kinds[STICK] = ("tty",)
    node = await c.taken(device)
    return node, await node.start_container(pod("p"))


@stepped
async def test_a_container_gets_nodes_and_environment_by_name_and_the_answer_has_neither() -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, got = await with_pod(c, device)
        assert got.nodes == kernel_nodes(node, device)
        assert env(got, "0_TTY") == "/dev/ttyUSB0"
        assert env(got, "0_DEVICE") in got.nodes
        assert env(got, "0_BUSID") == "1-1"
        (answer,) = node.kubelet.manager.checkpoint.values()
        assert (answer.cdi_devices, answer.devices, dict(answer.envs)) == ((f"usbip.dev/stick={device.id}-0",), (), {})


@pytest.mark.parametrize("on_loss", [OnLoss.RESTART, OnLoss.KEEP, OnLoss.EVICT])
@stepped
async def test_after_a_reattach_a_restarted_container_has_the_new_nodes_without_another_allocate(
    on_loss: OnLoss,
) -> None:
    notices: list[DeviceEvent] = []
    async with stick_by_cdi(notices=notices, on_loss=on_loss) as (c, _lab, device):
        node, before = await with_pod(c, device)
        await c.lost_and_back(node, device)
        after = await node.start_container(pod("p"))
        assert after.nodes == kernel_nodes(node, device)
        assert after.nodes != before.nodes
        assert env(after, "0_DEVICE") != env(before, "0_DEVICE")
        assert len(node.kubelet.seen.allocates) == 1
        assert node.evicted == ([pod("p")] if on_loss is OnLoss.EVICT else [])
        what, verdict = {
            OnLoss.RESTART: (EventKind.RESTART_NEEDED, AfterReattach.RESTART),
            OnLoss.KEEP: (EventKind.NODES_CHANGED, AfterReattach.RENEWED),
            OnLoss.EVICT: (EventKind.NODES_CHANGED, AfterReattach.EVICT),
        }[on_loss]
        assert DeviceEvent(what, device, verdict.value, pod("p")) in notices


@pytest.mark.parametrize("restarted_before", [False, True])
@stepped
async def test_a_pod_of_a_resource_that_names_its_children_goes_on_with_them(restarted_before: bool) -> None:
    """The pod is not disturbed by any number of re-attaches, also of a new process."""
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices, children=("tty",), on_loss=OnLoss.EVICT) as (c, _lab, device):
        node, _ = await with_pod(c, device)
        usb_nodes = {min(kernel_nodes(node, device))}
        if restarted_before:
            await restarted(c, node)
        for _ in range(3):
            await c.lost_and_back(node, device)
            usb_nodes.add(min(kernel_nodes(node, device)))
        assert len(usb_nodes) == 4, "each attach has a new device number"
        assert node.evicted == []
        notice = DeviceEvent(EventKind.REATTACHED, device, AfterReattach.CHILDREN_GO_ON.value, pod("p"))
        assert notices.count(notice) == 3
        assert EventKind.NODES_CHANGED not in {notice.what for notice in notices}


@stepped
async def test_the_spec_is_true_before_anybody_hears_that_the_device_is_back() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    matches: list[bool] = []
    nodes: list[ClusterNode] = []

    def advertised(_resource: str, devices: tuple[Advertised, ...]) -> None:
        if nodes and any(d.health.reason is Reason.ATTACHED for d in devices):
            (text,) = nodes[0].specs.find(device.id)
            matches.append(resolve([text], [f"usbip.dev/stick={device.id}-0"]).nodes == kernel_nodes(nodes[0], device))

    made = spec([lab], by_cdi(lab), nodes=1)
    async with cluster(replace(made, observer=lambda _node: MetricHooks(on_advertised=advertised))) as c:
        node = c["node-a"]
        nodes.append(node)
        await with_pod(c, device)
        for _ in range(3):
            await c.lost_and_back(node, device)
        assert len(matches) >= 4
        assert all(matches)


@stepped
async def test_a_container_that_starts_while_the_device_is_away_waits_for_it() -> None:
    async with stick_by_cdi() as (c, lab, device):
        node, _ = await with_pod(c, device)
        lab.unplug("1-1")
        await c.becomes(node, device, healthy=False)
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(node.start_container(pod("p")))
            await asyncio.sleep(10)
            assert not starting.done()
            lab.plug(stick("1-1"))
        assert starting.result().nodes == kernel_nodes(node, device)


@stepped
async def test_a_container_start_without_its_device_fails_in_time_and_names_the_device() -> None:
    async with stick_by_cdi() as (c, lab, device):
        node, _ = await with_pod(c, device)
        lab.unplug("1-1")
        await c.becomes(node, device, healthy=False)
        began = asyncio.get_running_loop().time()
        with pytest.raises(
            EndpointError, match=rf"UNAVAILABLE.*{device} is not attached to node node-a: .*re-attaching"
        ):
            await node.start_container(pod("p"))
        assert asyncio.get_running_loop().time() - began == pytest.approx(PRE_START_WAIT, abs=1)
        assert PRE_START_WAIT < PRE_START_TIMEOUT_S
        lab.plug(stick("1-1"))
        await c.becomes(node, device, healthy=True)
        assert (await node.start_container(pod("p"))).nodes == kernel_nodes(node, device)


@stepped
async def test_a_spec_that_somebody_removed_is_there_again_when_the_container_starts() -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, before = await with_pod(c, device)
        node.specs.clear()
        assert await node.start_container(pod("p")) == before


@pytest.mark.parametrize("cdi", [False, True])
@stepped
async def test_a_path_that_was_another_for_a_while_is_true_again(cdi: bool) -> None:
    """A re-attach is compared with the device nodes at the start of the container."""
    notices: list[DeviceEvent] = []

    def kinds() -> list[EventKind]:
        about = (EventKind.REATTACHED, EventKind.NODES_CHANGED)
        return [notice.what for notice in notices if notice.key == device and notice.what in about]

    async with one_stick(notices=notices, children=("tty",), cdi=cdi) as (c, _lab, device):
        node, _ = await with_pod(c, device)
        node.kernel.hold("/dev/ttyUSB0")
        await c.lost_and_back(node, device)
        assert kinds() == [EventKind.NODES_CHANGED]
        node.kernel.let_go("/dev/ttyUSB0")
        await c.lost_and_back(node, device)
        assert kinds() == [EventKind.NODES_CHANGED, EventKind.REATTACHED]
        node.kernel.hold("/dev/ttyUSB0")
        await c.lost_and_back(node, device)
        await node.start_container(pod("p"))
        await c.lost_and_back(node, device)
        # by CDI a container has the nodes of its start, else those of its pod's admission
        assert kinds()[2:] == [EventKind.NODES_CHANGED, EventKind.REATTACHED if cdi else EventKind.NODES_CHANGED]


@pytest.mark.parametrize("came", [True, False], ids=["came late", "gone"])
@stepped
async def test_a_container_starts_with_the_child_nodes_of_that_moment(came: bool) -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, before = await with_pod(c, device)
        children = children_of(node, device)
        if came:
            children.append(next(node.kernel.unused("hidraw")))
        else:
            children.clear()
        after = await node.start_container(pod("p"))
        assert after.nodes == kernel_nodes(node, device)
        assert after.nodes.keys() ^ before.nodes.keys() == {"/dev/hidraw0" if came else "/dev/ttyUSB0"}


@stepped
async def test_a_late_child_node_that_no_spec_can_be_written_for_is_in_the_spec_as_soon_as_one_can() -> None:
    notices: list[DeviceEvent] = []
    async with stick_by_cdi(notices=notices) as (c, _lab, device):
        node, before = await with_pod(c, device)
        node.specs.failing = errno.ENOSPC
        children_of(node, device).append(next(node.kernel.unused("hidraw")))
        node.kernel.changed.fire()
        await asyncio.sleep(2 * PORT_CHECK_INTERVAL)
        node.alive()
        with pytest.raises(EndpointError, match="cannot write the CDI spec"):
            await node.start_container(pod("p"))
        assert written(node, device) == before.nodes
        assert EventKind.NODES_LATE not in {notice.what for notice in notices}, "no container could have it"
        node.specs.failing = None
        assert await c.settle(lambda: written(node, device) == kernel_nodes(node, device), 2 * PORT_CHECK_INTERVAL)
        assert [notice.what for notice in notices].count(EventKind.NODES_LATE) == 1


@stepped
async def test_a_device_that_left_without_a_uevent_is_noticed_before_a_container_starts() -> None:
    """Uevents can be lost, so the plugin reads the port."""
    async with stick_by_cdi() as (c, _lab, device):
        node, before = await with_pod(c, device)
        with mock.patch.object(node.kernel.changed, "fire"):
            node.kernel.free_port(port_of(node, device))
        after = await node.start_container(pod("p"))
        assert after.nodes == kernel_nodes(node, device)
        assert after.nodes != before.nodes


@stepped
async def test_a_new_process_keeps_the_specs_of_what_it_adopts_and_sweeps_the_others() -> None:
    async with stick_by_cdi() as (c, lab, device):
        node, _ = await with_pod(c, device)
        (text,) = node.specs.find(device.id)
        node.specs.write("gone", key(lab, "1-2").id, "{}")
        await restarted(c, node)
        await c.becomes(node, device, healthy=True)
        assert await c.settle(lambda: len(node.specs.texts) == 1, 5)
        assert node.specs.find(device.id) == (text,)
        # a re-attach writes the names of the old spec, as the new process knows the container indexes
        await c.lost_and_back(node, device)
        assert written(node, device) == kernel_nodes(node, device)


@stepped
async def test_without_the_api_server_a_new_process_sweeps_nothing() -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, _ = await with_pod(c, device)
        node.partition(cut=True)
        await restarted(c, node)
        await asyncio.sleep(60)
        assert node.specs.find(device.id) != ()
        node.partition(cut=False)
        await c.becomes(node, device, healthy=True, within=30)
        assert node.specs.find(device.id) != ()


@stepped
async def test_a_stale_spec_of_a_process_that_died_after_the_attach_is_corrected() -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, _ = await with_pod(c, device)
        (stale,) = node.specs.find(device.id)
        await c.lost_and_back(node, device)
        node.specs.write("stick", device.id, stale)
        await restarted(c, node)
        await c.becomes(node, device, healthy=True)
        assert written(node, device) == kernel_nodes(node, device)


@stepped
async def test_after_a_reboot_the_container_finds_its_device_under_the_old_name() -> None:
    async with stick_by_cdi(nodes=1) as (c, _lab, device):
        node, _ = await with_pod(c, device)
        node.pods.stop()
        node.reboot()
        assert not node.specs.texts
        node.pods.start()
        node.start()
        await c.becomes(node, device, healthy=True, within=30)
        assert (await node.start_container(pod("p"))).nodes == kernel_nodes(node, device)


@stepped
async def test_two_devices_of_a_container_keep_their_numbers() -> None:
    async with two_sticks(cdi=True, on_loss=OnLoss.RESTART) as (c, _lab, *both):
        node, devices = c["node-a"], sorted(both, key=lambda k: k.id)
        assert await node.admit(pod("p"), "stick", 2) is None
        before = await node.start_container(pod("p"))
        assert [env(before, f"{n}_BUSID") for n in (0, 1)] == [d.busid for d in devices]
        await restarted(c, node)
        await c.becomes(node, devices[1], healthy=True)
        await c.lost_and_back(node, devices[1])
        after = await node.start_container(pod("p"))
        assert [env(after, f"{n}_BUSID") for n in (0, 1)] == [d.busid for d in devices]
        assert env(after, "1_DEVICE") != env(before, "1_DEVICE")
        assert after.nodes == kernel_nodes(node, devices[0]) | kernel_nodes(node, devices[1])


@stepped
async def test_at_the_pods_end_the_spec_goes_before_the_lock() -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, _ = await with_pod(c, device)
        node.end(pod("p"))
        assert await c.settle(lambda: not node.specs.texts or c.holder(device) == "", 30)
        assert not node.specs.texts
        assert await c.settle(lambda: c.holder(device) == "", 30)


@stepped
async def test_a_device_lost_to_another_node_has_no_spec_any_more() -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, _ = await with_pod(c, device)
        lease = c.backend.leases[device.id]
        taken = replace(lease, holder="node-z", transitions=lease.transitions + 1)
        await c["node-b"].leases.replace(taken)  # type: ignore[union-attr]
        assert await c.settle(lambda: not node.specs.texts, 20)
        with pytest.raises((EndpointError, UnresolvableDevice)):
            await node.start_container(pod("p"))


# a disk that is full or not writable


def fail(node: ClusterNode, place: str, code: int | None) -> None:
    """Makes writes of specs or of port records fail with an errno, or ends that."""
    if place == "spec":
        node.specs.failing = code
    else:
        node.kernel.records_failing = code


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        ("spec", errno.ENOSPC, "No space left on device; the file system is full: free some space"),
        ("spec", errno.EROFS, "Read-only file system; it is read-only: mount it"),
        ("spec", errno.EACCES, "Permission denied; the plugin must run as root"),
        ("record", errno.ENOSPC, "No space left on device; the file system is full"),
    ],
)
@stepped
async def test_an_allocate_whose_spec_or_port_record_cannot_be_written_fails_and_leaves_nothing(
    place: str, code: int, words: str
) -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node = c["node-a"]
        fail(node, place, code)
        what = f"cannot write the CDI spec {SPEC}{device.id}.json" if place == "spec" else f"{RECORD_FAILS}0"
        assert f"{what}: {words}" in str(await node.admit(pod("p"), "stick"))
        await c.freed(device)
        assert not node.kernel.records["node-a"]
        fail(node, place, None)
        await c.becomes(node, device, healthy=True)
        assert await node.admit(pod("q"), "stick") is None


@stepped
async def test_of_two_devices_both_are_undone_if_one_spec_cannot_be_written() -> None:
    async with two_sticks(cdi=True, on_loss=OnLoss.RESTART) as (c, _lab, *devices):
        node = c["node-a"]
        write = node.specs.write

        def full_after_one(resource: str, device_id: str, text: str) -> None:
            write(resource, device_id, text)
            node.specs.failing = errno.ENOSPC

        node.specs.write = full_after_one  # type: ignore[method-assign]
        assert "free some space" in str(await node.admit(pod("p"), "stick", 2))
        node.specs.failing = None
        assert await c.settle(lambda: all(c.holder(d) == "" for d in devices), 30)
        assert node.attached() == frozenset()


@pytest.mark.parametrize("place", ["spec", "record"])
@stepped
async def test_a_full_disk_at_a_reattach_is_one_event_and_the_device_is_back_when_there_is_room(place: str) -> None:
    notices: list[DeviceEvent] = []
    async with stick_by_cdi(notices=notices) as (c, lab, device):
        node, _ = await with_pod(c, device)
        fail(node, place, errno.ENOSPC)
        lab.drop("1-1")
        await c.becomes(node, device, healthy=False)
        assert await c.settle(lambda: any(n.what is EventKind.NOT_REATTACHED for n in notices), 10)
        imports = lab.connections
        await asyncio.sleep(60)
        (notice,) = [n for n in notices if n.what is EventKind.NOT_REATTACHED]
        assert ("CDI spec" if place == "spec" else RECORD_FAILS) in notice.text
        assert notice.pod == pod("p")
        assert not node.kubelet.health(c.full("stick"))[device.id]
        assert notice.text in detail(node, device)
        if place == "spec":
            assert node.attached() == {device}, "only the spec is written again"
            polls = lab.connections - imports
            assert lab.importers("1-1") == 1
            assert polls < 60, "no import for each attempt"
        fail(node, place, None)
        await c.becomes(node, device, healthy=True, within=10)
        assert (await node.start_container(pod("p"))).nodes == kernel_nodes(node, device)
        assert [n.what for n in notices][-1] is EventKind.RESTART_NEEDED


@stepped
async def test_a_new_process_on_a_full_disk_offers_the_device_when_its_spec_is_true() -> None:
    notices: list[DeviceEvent] = []
    async with stick_by_cdi(notices=notices) as (c, _lab, device):
        node, _ = await with_pod(c, device)
        (stale,) = node.specs.find(device.id)
        await c.lost_and_back(node, device)
        nodes = kernel_nodes(node, device)
        node.specs.write("stick", device.id, stale)
        node.specs.failing = errno.ENOSPC
        await restarted(c, node)
        assert await c.settle(lambda: any(n.what is EventKind.NOT_REATTACHED for n in notices), 10)
        assert not node.kubelet.health(c.full("stick"))[device.id]
        with pytest.raises(EndpointError, match="cannot write the CDI spec"):
            await node.start_container(pod("p"))
        node.specs.failing = None
        await c.becomes(node, device, healthy=True, within=10)
        assert written(node, device) == nodes == kernel_nodes(node, device), "still attached"


@stepped
async def test_a_release_does_not_wait_for_a_spec_that_cannot_be_removed() -> None:
    async with stick_by_cdi() as (c, _lab, device):
        node, _ = await with_pod(c, device)
        node.specs.failing = errno.EROFS
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", 30)
        node.specs.failing = None
        await restarted(c, node)
        assert await c.settle(lambda: not node.specs.texts, 30), "the next start sweeps it"


# the configuration changes


@stepped
async def test_a_reload_changes_what_the_next_pods_get_and_asks_the_kubelet_for_pre_start() -> None:
    async with two_sticks(nodes=1) as (c, lab, device, _other):
        node = c["node-a"]
        assert await node.admit(pod("p"), "stick") is None
        agent(node).reconfigure(Config((by_cdi(lab),)))
        await c.becomes(node, device, healthy=True)
        assert await c.settle(lambda: len(node.kubelet.seen.registrations) == 2, 5)
        assert await c.settle(lambda: all(node.kubelet.health(c.full("stick")).values()), 5)
        assert await node.admit(pod("q"), "stick") is None
        (second,) = (a for k, a in node.kubelet.manager.checkpoint.items() if k[0] == pod("q"))
        assert second.cdi_devices
        (first,) = (a for k, a in node.kubelet.manager.checkpoint.items() if k[0] == pod("p"))
        assert not first.cdi_devices
        node.specs.clear()
        assert (await node.start_container(pod("q"))).nodes, "PreStartContainer is called now"


async def test_on_sockets_the_new_registration_has_the_new_options() -> None:
    """The new plugin has another socket, and the kubelet always has one connection."""
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        setup = Setup(Config((ResourceConfig("stick", ()),)), SystemClock(), domain="usbip.dev")
        async with running(Path(directory), ("node-a",), setup) as world, asyncio.timeout(30):
            node = world["node-a"]
            name, kubelet = node.resource("stick"), node.kubelet
            for by_cdi in (True, False, True):
                await kubelet.changed.until(lambda want=not by_cdi: kubelet.asks_before_start(name) is want)  # type: ignore[misc]
                await kubelet.changed.until(lambda: kubelet.connected(name))
                lost = asyncio.create_task(kubelet.changed.until(lambda: not kubelet.connected(name)))
                assert node.agent is not None
                node.agent.reconfigure(Config((ResourceConfig("stick", (), cdi=by_cdi),)))
                await kubelet.changed.until(
                    lambda want=by_cdi: kubelet.connected(name) and kubelet.asks_before_start(name) is want  # type: ignore[misc]
                )
                await kubelet.changed.until(lambda: kubelet.plugins(name) == 1)
                assert not lost.done()
                lost.cancel()
            sockets = list(node.plugin_directory.glob("usbip-stick*.sock"))
            assert len(sockets) == 1
