"""Devices handed out by CDI name, in virtual time: what a container is given when it starts is always true."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from cluster_rig import STICK, all_healthy, becomes, key, pod, resource, server, spec, stick

from usbip_plugin.agent import Observer
from usbip_plugin.allocation import PRE_START_WAIT
from usbip_plugin.claims import AfterReattach
from usbip_plugin.clock import SystemClock
from usbip_plugin.config import Config, OnLoss, ResourceConfig
from usbip_plugin.model import Advertised, DeviceKey, Reason
from usbip_plugin.notices import Notice, What
from usbip_plugin.sim.cluster import Cluster, ClusterNode, ClusterSpec, cluster
from usbip_plugin.sim.device_manager import PRE_START_TIMEOUT_S, EndpointError
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.specs import Resolved, UnresolvableDevice, resolve
from usbip_plugin.sim.steploop import stepped
from usbip_plugin.sim.world import Setup, running

SPEC = "/var/run/cdi/usbip.dev-stick-"
RECORD_FAILS = "cannot write the port record /run/vhci_hcd/port"


def by_cdi(lab: VirtualServer, on_loss: OnLoss = OnLoss.RESTART) -> ResourceConfig:
    return replace(resource("stick", [lab]), cdi=True, on_loss=on_loss)


def told(lab: VirtualServer, into: list[Notice], on_loss: OnLoss = OnLoss.RESTART) -> ClusterSpec:
    """A cluster whose notices are gathered."""
    return replace(spec([lab], by_cdi(lab, on_loss)), observer=lambda _node: Observer(on_notice=into.append))


def true(node: ClusterNode, device: DeviceKey) -> dict[str, tuple[str, int, int]]:
    """The nodes the kernel has of the device now, as a runtime should put them into a container."""
    (port,) = (p.number for p in node.driver.ports_now() if p.record == device)
    attachment = node.kernel.attachment(device, port)
    assert attachment is not None
    return {n.path: (n.path, n.major, n.minor) for n in attachment.nodes}


def written(node: ClusterNode, device: DeviceKey) -> dict[str, tuple[str, int, int]]:
    """What the spec says now of the first device of a container, whether one starts or not."""
    return dict(resolve(node.specs.find(device.id), [f"usbip.dev/stick={device.id}-0"]).nodes)


def env(got: Resolved, name: str) -> str:
    return got.envs[f"USBIP_STICK_{name}"]


async def restarted(c: Cluster, node: ClusterNode) -> None:
    """The agent is killed, and its successor is registered."""
    node.kill()
    assert await c.settle(lambda: not node.kubelet.connected(c.full("stick")), 5)
    node.start()
    assert await c.settle(lambda: node.kubelet.connected(c.full("stick")), 5)


async def with_pod(c: Cluster, node: ClusterNode, device: DeviceKey) -> Resolved:
    """A pod has the device, its container runs, and the lock names it."""
    node.kernel.child_kinds[STICK] = ("tty",)
    await all_healthy(c, device)
    assert await node.admit(pod("p"), "stick") is None
    got = await node.start_container(pod("p"))
    assert await c.settle(lambda: c.pod_of(device) == pod("p"), 5)
    return got


@stepped
async def test_a_container_gets_nodes_and_environment_by_name_and_the_answer_has_neither() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        got = await with_pod(c, node, device)
        assert got.nodes == true(node, device)
        assert env(got, "0_TTY") == "/dev/ttyUSB0"
        assert env(got, "0_DEVICE") in got.nodes
        assert env(got, "0_BUSID") == "1-1"
        (answer,) = node.kubelet.manager.checkpoint.values()
        assert (answer.cdi_devices, answer.devices, dict(answer.envs)) == ((f"usbip.dev/stick={device.id}-0",), (), {})


@pytest.mark.parametrize("on_loss", [OnLoss.RESTART, OnLoss.KEEP, OnLoss.EVICT])
def test_after_a_reattach_a_restarted_container_has_the_new_nodes_without_another_allocate(on_loss: OnLoss) -> None:
    async def play() -> None:
        lab = server("lab", stick("1-1"))
        device = key(lab, "1-1")
        notices: list[Notice] = []
        async with cluster(told(lab, notices, on_loss)) as c:
            node = c["node-a"]
            before = await with_pod(c, node, device)
            lab.drop("1-1")
            await becomes(c, node, device, healthy=False)
            await becomes(c, node, device, healthy=True)
            after = await node.start_container(pod("p"))
            assert after.nodes == true(node, device)
            assert after.nodes != before.nodes
            assert env(after, "0_DEVICE") != env(before, "0_DEVICE")
            assert len(node.kubelet.seen.allocates) == 1
            assert node.evicted == ([pod("p")] if on_loss is OnLoss.EVICT else [])
            what, verdict = {
                OnLoss.RESTART: (What.RESTART_NEEDED, AfterReattach.RESTART),
                OnLoss.KEEP: (What.NODES_CHANGED, AfterReattach.RENEWED),
                OnLoss.EVICT: (What.NODES_CHANGED, AfterReattach.EVICT),
            }[on_loss]
            assert Notice(what, device, verdict.value, pod("p")) in notices

    stepped(play)()


@stepped
async def test_the_spec_is_true_before_anybody_hears_that_the_device_is_back() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    seen: list[bool] = []
    nodes: list[ClusterNode] = []

    def advertised(_resource: str, devices: tuple[Advertised, ...]) -> None:
        if nodes and any(d.health.reason is Reason.ATTACHED for d in devices):
            (text,) = nodes[0].specs.find(device.id)
            seen.append(resolve([text], [f"usbip.dev/stick={device.id}-0"]).nodes == true(nodes[0], device))

    made = spec([lab], by_cdi(lab), nodes=1)
    async with cluster(replace(made, observer=lambda _node: Observer(on_advertised=advertised))) as c:
        node = c["node-a"]
        nodes.append(node)
        await with_pod(c, node, device)
        for _ in range(3):
            lab.drop("1-1")
            await becomes(c, node, device, healthy=False)
            await becomes(c, node, device, healthy=True)
        assert len(seen) >= 4
        assert all(seen)


@stepped
async def test_a_container_that_starts_while_the_device_is_away_waits_for_it() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        lab.unplug("1-1")
        await becomes(c, node, device, healthy=False)
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(node.start_container(pod("p")))
            await asyncio.sleep(10)
            assert not starting.done()
            lab.plug(stick("1-1"))
        assert starting.result().nodes == true(node, device)


@stepped
async def test_a_container_whose_device_stays_away_fails_in_time_and_is_told_of_what() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        lab.unplug("1-1")
        await becomes(c, node, device, healthy=False)
        began = asyncio.get_running_loop().time()
        with pytest.raises(
            EndpointError, match=rf"UNAVAILABLE.*{device} is not attached to node node-a: .*re-attaching"
        ):
            await node.start_container(pod("p"))
        assert asyncio.get_running_loop().time() - began == pytest.approx(PRE_START_WAIT, abs=1)
        assert PRE_START_WAIT < PRE_START_TIMEOUT_S
        lab.plug(stick("1-1"))
        await becomes(c, node, device, healthy=True)
        assert (await node.start_container(pod("p"))).nodes == true(node, device)


@stepped
async def test_a_spec_that_somebody_removed_is_there_again_when_the_container_starts() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        before = await with_pod(c, node, device)
        node.specs.clear()
        assert await node.start_container(pod("p")) == before


@stepped
async def test_a_child_node_that_came_late_is_in_the_container_that_starts_next() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        before = await with_pod(c, node, device)
        (port,) = (p.number for p in node.driver.ports_now() if p.record == device)
        occupant = node.kernel.occupant(port)
        assert occupant is not None
        occupant.children["hidraw"] = 0
        after = await node.start_container(pod("p"))
        assert after.nodes.keys() - before.nodes.keys() == {"/dev/hidraw0"}


@stepped
async def test_a_device_that_went_unseen_is_found_out_before_a_container_starts() -> None:
    """Uevents can be lost: the plugin looks at the port itself."""
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        before = await with_pod(c, node, device)
        (port,) = (p.number for p in node.driver.ports_now() if p.record == device)
        with mock.patch.object(node.kernel.bell, "ring"):
            node.kernel.free_port(port)
        after = await node.start_container(pod("p"))
        assert after.nodes == true(node, device)
        assert after.nodes != before.nodes


@stepped
async def test_a_new_process_keeps_the_specs_of_what_it_adopts_and_sweeps_the_others() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        (text,) = node.specs.find(device.id)
        node.specs.write("gone", key(lab, "1-2").id, "{}")
        await restarted(c, node)
        await becomes(c, node, device, healthy=True)
        assert await c.settle(lambda: len(node.specs.texts) == 1, 5)
        assert node.specs.find(device.id) == (text,)
        # and it knows the container's numbers: a re-attach rewrites the very names, without a word of the kubelet
        lab.drop("1-1")
        await becomes(c, node, device, healthy=False)
        await becomes(c, node, device, healthy=True)
        assert written(node, device) == true(node, device)


@stepped
async def test_without_the_api_server_a_new_process_sweeps_nothing() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        node.partition(cut=True)
        await restarted(c, node)
        await asyncio.sleep(60)
        assert node.specs.find(device.id) != ()
        node.partition(cut=False)
        await becomes(c, node, device, healthy=True, within=30)
        assert node.specs.find(device.id) != ()


@stepped
async def test_a_process_that_died_between_attach_and_spec_leaves_no_lie() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        (stale,) = node.specs.find(device.id)
        lab.drop("1-1")
        await becomes(c, node, device, healthy=False)
        await becomes(c, node, device, healthy=True)
        node.specs.write("stick", device.id, stale)
        await restarted(c, node)
        await becomes(c, node, device, healthy=True)
        assert written(node, device) == true(node, device)


@stepped
async def test_after_a_reboot_the_container_finds_its_device_under_the_old_name() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab), nodes=1)) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        node.pods.stop()
        node.reboot()
        assert not node.specs.texts
        node.pods.start()
        node.start()
        await becomes(c, node, device, healthy=True, within=30)
        assert (await node.start_container(pod("p"))).nodes == true(node, device)


@stepped
async def test_two_devices_of_a_container_keep_their_numbers() -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    devices = sorted((key(lab, "1-1"), key(lab, "1-2")), key=lambda k: k.id)
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await all_healthy(c, *devices)
        assert await node.admit(pod("p"), "stick", 2) is None
        before = await node.start_container(pod("p"))
        assert [env(before, f"{n}_BUSID") for n in (0, 1)] == [d.busid for d in devices]
        await restarted(c, node)
        await becomes(c, node, devices[1], healthy=True)
        lab.drop(devices[1].busid)
        await becomes(c, node, devices[1], healthy=False)
        await becomes(c, node, devices[1], healthy=True)
        after = await node.start_container(pod("p"))
        assert [env(after, f"{n}_BUSID") for n in (0, 1)] == [d.busid for d in devices]
        assert env(after, "1_DEVICE") != env(before, "1_DEVICE")
        assert after.nodes == true(node, devices[0]) | true(node, devices[1])


@stepped
async def test_at_the_pods_end_the_spec_goes_before_the_lock() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        node.end(pod("p"))
        assert await c.settle(lambda: not node.specs.texts or c.holder(device) == "", 30)
        assert not node.specs.texts
        assert await c.settle(lambda: c.holder(device) == "", 30)


@stepped
async def test_a_device_lost_to_another_node_has_no_spec_any_more() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        lease = c.backend.leases[device.id]
        await c["node-b"].leases.replace(replace(lease, holder="node-z"))  # type: ignore[union-attr]
        assert await c.settle(lambda: not node.specs.texts, 10)
        with pytest.raises((EndpointError, UnresolvableDevice)):
            await node.start_container(pod("p"))


# a disk that is full, read-only, or not ours


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on device; the file system is full: make room"),
        (errno.EROFS, "Read-only file system; it is read-only: mount it"),
        (errno.EACCES, "Permission denied; the plugin must run as root"),
    ],
)
def test_an_allocate_whose_spec_cannot_be_written_fails_and_leaves_nothing(code: int, words: str) -> None:
    async def play() -> None:
        lab = server("lab", stick("1-1"))
        device = key(lab, "1-1")
        async with cluster(spec([lab], by_cdi(lab))) as c:
            node = c["node-a"]
            await all_healthy(c, device)
            node.specs.failing = code
            message = await node.admit(pod("p"), "stick")
            assert message is not None
            assert f"cannot write the CDI spec {SPEC}{device.id}.json: {words}" in message
            assert await c.settle(lambda: c.holder(device) == "", 5)
            assert node.attached() == frozenset()
            assert not node.kernel.records["node-a"]
            assert await c.settle(lambda: lab.importers("1-1") == 0, 5)
            node.specs.failing = None
            await becomes(c, node, device, healthy=True)
            assert await node.admit(pod("q"), "stick") is None

    stepped(play)()


@stepped
async def test_of_two_devices_both_are_undone_if_one_spec_cannot_be_written() -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    devices = key(lab, "1-1"), key(lab, "1-2")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await all_healthy(c, *devices)
        write = node.specs.write

        def full_after_one(resource: str, device_id: str, text: str) -> None:
            write(resource, device_id, text)
            node.specs.failing = errno.ENOSPC

        node.specs.write = full_after_one  # type: ignore[method-assign]
        assert "make room" in str(await node.admit(pod("p"), "stick", 2))
        node.specs.failing = None
        assert await c.settle(lambda: all(c.holder(d) == "" for d in devices), 30)
        assert node.attached() == frozenset()


@stepped
async def test_a_port_record_that_cannot_be_written_fails_the_allocate_and_leaves_nothing() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab])) as c:
        node = c["node-a"]
        await all_healthy(c, device)
        node.kernel.records_failing = errno.ENOSPC
        assert f"{RECORD_FAILS}0: No space left on device; the file system is full" in str(
            await node.admit(pod("p"), "stick")
        )
        assert await c.settle(lambda: c.holder(device) == "", 5)
        assert node.attached() == frozenset()
        assert await c.settle(lambda: lab.importers("1-1") == 0, 5)
        node.kernel.records_failing = None
        await becomes(c, node, device, healthy=True)
        assert await node.admit(pod("q"), "stick") is None


@pytest.mark.parametrize("place", ["spec", "record"])
def test_a_full_disk_at_a_reattach_is_told_once_and_the_device_is_back_when_there_is_room(place: str) -> None:
    async def play() -> None:
        lab = server("lab", stick("1-1"))
        device = key(lab, "1-1")
        notices: list[Notice] = []
        async with cluster(told(lab, notices)) as c:
            node = c["node-a"]
            await with_pod(c, node, device)

            def fail(code: int | None) -> None:
                if place == "spec":
                    node.specs.failing = code
                else:
                    node.kernel.records_failing = code

            fail(errno.ENOSPC)
            lab.drop("1-1")
            await becomes(c, node, device, healthy=False)
            assert await c.settle(lambda: any(n.what is What.NOT_REATTACHED for n in notices), 10)
            imports = lab.connections
            await asyncio.sleep(60)
            (notice,) = [n for n in notices if n.what is What.NOT_REATTACHED]
            assert ("CDI spec" if place == "spec" else RECORD_FAILS) in notice.text
            assert notice.pod == pod("p")
            assert not node.kubelet.health(c.full("stick"))[device.id]
            assert node.agent is not None
            assert notice.text in node.agent.advertiser.health()[device.id].detail
            if place == "spec":
                assert node.attached() == {device}, "it is attached, and only the spec is tried again"
                polls = lab.connections - imports
                assert lab.importers("1-1") == 1
                assert polls < 60, "no import at each try"
            fail(None)
            await becomes(c, node, device, healthy=True, within=10)
            assert (await node.start_container(pod("p"))).nodes == true(node, device)
            assert [n.what for n in notices][-1] is What.RESTART_NEEDED

    stepped(play)()


@stepped
async def test_a_new_process_on_a_full_disk_offers_the_device_when_its_spec_is_true() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    notices: list[Notice] = []
    async with cluster(told(lab, notices)) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        (stale,) = node.specs.find(device.id)
        lab.drop("1-1")
        await becomes(c, node, device, healthy=False)
        await becomes(c, node, device, healthy=True)
        nodes = true(node, device)
        node.specs.write("stick", device.id, stale)
        node.specs.failing = errno.ENOSPC
        await restarted(c, node)
        assert await c.settle(lambda: any(n.what is What.NOT_REATTACHED for n in notices), 10)
        assert not node.kubelet.health(c.full("stick"))[device.id]
        with pytest.raises(EndpointError, match="cannot write the CDI spec"):
            await node.start_container(pod("p"))
        node.specs.failing = None
        await becomes(c, node, device, healthy=True, within=10)
        assert written(node, device) == nodes == true(node, device), "attached all the while"


@stepped
async def test_a_release_does_not_wait_for_a_spec_that_cannot_be_removed() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], by_cdi(lab))) as c:
        node = c["node-a"]
        await with_pod(c, node, device)
        node.specs.failing = errno.EROFS
        node.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", 30)
        node.specs.failing = None
        await restarted(c, node)
        assert await c.settle(lambda: not node.specs.texts, 30), "the next start sweeps it"


# the configuration changes


@stepped
async def test_a_reload_changes_what_the_next_pods_get_and_asks_the_kubelet_for_pre_start() -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    device = key(lab, "1-1")
    async with cluster(spec([lab], nodes=1)) as c:
        node = c["node-a"]
        await all_healthy(c, device)
        assert await node.admit(pod("p"), "stick") is None
        assert node.agent is not None
        node.agent.reconfigure(Config((by_cdi(lab),)))
        await becomes(c, node, device, healthy=True)
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
    """Both plugins have the same socket path, one after the other."""
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        setup = Setup(Config((ResourceConfig("stick", ()),)), SystemClock(), domain="usbip.dev")
        async with running(Path(directory), ("node-a",), setup) as world, asyncio.timeout(30):
            node = world["node-a"]
            name, kubelet = node.resource("stick"), node.kubelet
            for by_cdi in (True, False, True):
                await kubelet.changed.until(lambda want=not by_cdi: kubelet.asks_before_start(name) is want)  # type: ignore[misc]
                await kubelet.changed.until(lambda: kubelet.connected(name))
                assert node.agent is not None
                node.agent.reconfigure(Config((ResourceConfig("stick", (), cdi=by_cdi),)))
                await kubelet.changed.until(
                    lambda want=by_cdi: kubelet.connected(name) and kubelet.asks_before_start(name) is want  # type: ignore[misc]
                )
            sockets = list(node.plugin_directory.glob("usbip-stick*.sock"))
            assert len(sockets) == 1
