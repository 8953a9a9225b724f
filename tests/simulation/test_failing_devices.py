"""Devices that their server lists and that cannot be had: few pods fail, and kubelets admit other pods meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from tests.simulation.cluster_rig import (
    SETTLE,
    Cluster,
    detail,
    one_stick,
    pod,
    reason,
    replug,
    stick,
)
from usbip_plugin.errors import LockHeld, PluginError
from usbip_plugin.locks import record
from usbip_plugin.model import DeviceKey, Reason
from usbip_plugin.usbip import wire
from usbip_sim.server.exports import SILENT
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.steploop import loop_of, stepped

MAX_FAILED = 10
"""Failed pods of a Deployment of one, in 120 s of fast failures or 300 s of slow ones."""
MAX_BUSY = 0.2
"""Share of the time that a kubelet may spend in Allocate."""


async def deployment(c: Cluster, device: DeviceKey, seconds: float, restart_s: float = 0.5) -> tuple[int, float]:
    """Replaces a failed pod wherever a kubelet offers the device. Returns failed pods, and the longest share of time
    that one kubelet was in Allocate."""
    began, failed, busy = loop_of().time(), 0, dict.fromkeys(c.nodes, 0.0)
    while loop_of().time() - began < seconds:
        nodes = [node for node in c.nodes.values() if c.health(node).get(device.id)]
        if not nodes:
            await asyncio.sleep(0.2)
            continue
        node, at = nodes[failed % len(nodes)], loop_of().time()
        if await node.admit(pod(f"p{failed}"), "stick") is None:
            break
        busy[node.name] += loop_of().time() - at
        failed += 1
        await asyncio.sleep(restart_s)
    return failed, max(busy.values()) / seconds


@pytest.mark.parametrize(
    ("status", "nodes"),
    [
        (wire.ST_NA, 1),
        (wire.ST_DEV_BUSY, 2),
        (wire.ST_DEV_BUSY, 10),
        (wire.ST_DEV_ERR, 3),
        (wire.ST_NODEV, 2),
        (wire.ST_ERROR, 2),
        (77, 2),
    ],
)
@stepped
async def test_a_refused_device_fails_few_pods_and_is_offered_again(status: int, nodes: int) -> None:
    async with one_stick(nodes=nodes) as (c, lab, device):
        lab.table.refusals[device.busid] = status
        failed, busy = await deployment(c, device, 120)
        assert 2 <= failed <= MAX_FAILED
        assert busy <= MAX_BUSY
        known = [reason(node, device) for node in c.nodes.values()]
        assert Reason.ALLOCATES_FAILED in known
        assert any(f"(status {status})" in detail(node, device) for node in c.nodes.values())
        del lab.table.refusals[device.busid]
        assert await c.settle(lambda: all(c.health(n).get(device.id) for n in c.nodes.values()), 310)


@pytest.mark.parametrize(
    ("how", "nodes"), [("silent", 2), ("never enumerates", 1), ("never enumerates", 10), ("nodes missing", 3)]
)
@stepped
async def test_a_slow_failure_keeps_no_kubelet_busy(how: str, nodes: int) -> None:
    children = ("tty",) if how == "nodes missing" else None
    async with one_stick(nodes=nodes, children=children) as (c, lab, device):
        if how == "silent":
            lab.table.refusals[device.busid] = SILENT
        for node in c.nodes.values():
            node.kernel.mute.update({device} if how == "never enumerates" else ())
            node.kernel.driverless.add("tty")
        failed, busy = await deployment(c, device, 300)
        assert 2 <= failed <= MAX_FAILED
        assert busy <= MAX_BUSY


@stepped
async def test_a_device_that_is_plugged_in_again_is_offered_at_once() -> None:
    async with one_stick() as (c, lab, device):
        await paused(c, lab, device)
        await asyncio.sleep(4.0)  # a poll after the reset: what is listed from then on counts
        replug(lab, stick(device.busid))
        lab.table.refusals.clear()
        await c.becomes(c["node-a"], device, healthy=True, within=4.0)
        assert await c["node-a"].admit(pod("q"), "stick") is None
        assert not c.has_note(device, record.FAILED_EPOCH) or c.holder(device)


@stepped
async def test_a_pod_that_gets_the_device_on_another_node_ends_the_pause() -> None:
    async with one_stick() as (c, lab, device):
        await paused(c, lab, device)
        lab.table.refusals.clear()
        other = c["node-b"]
        assert c.health(other)[device.id], "it had no failure"
        assert await other.admit(pod("q"), "stick") is None
        await c.noted(device, "q")
        other.end(pod("q"))
        await c.freed(device)
        await c.becomes(c["node-a"], device, healthy=True, within=2.0)
        assert not c.has_note(device, record.FAILED_EPOCH)


@stepped
async def test_a_device_that_gets_another_number_at_each_import_is_paused_too() -> None:
    async with one_stick(nodes=1) as (c, lab, device):
        lab.table.renumbers = True
        c["node-a"].kernel.mute.add(device)
        failed, _ = await deployment(c, device, 300)
        assert failed <= MAX_FAILED


@stepped
async def test_failures_for_other_causes_do_not_pause_a_device() -> None:
    async with one_stick() as (c, _, device):
        a, b = c["node-a"], c["node-b"]
        assert await b.admit(pod("p"), "stick") is None
        await c.noted(device, "p")
        for _ in range(4):
            with pytest.raises(LockHeld):
                await c.allocate(a, device)
        b.end(pod("p"))
        await c.freed(device)
        await c.becomes(a, device, healthy=True)
        a.partition(cut=True)
        for _ in range(3):
            with pytest.raises(PluginError):
                await c.allocate(a, device)
        a.partition(cut=False)
        numbers = a.kernel.fill_ports()
        for _ in range(3):
            with pytest.raises(PluginError, match="ports"):
                await c.allocate(a, device)
        for number in numbers:
            a.kernel.free_port(number)
        assert await c.settle(lambda: reason(a, device) is Reason.FREE, SETTLE), reason(a, device)


async def paused(c: Cluster, lab: VirtualServer, device: DeviceKey) -> None:
    """Has the server refuse the device until node-a pauses it."""
    lab.table.refusals[device.busid] = wire.ST_DEV_ERR
    node = c["node-a"]
    assert await node.admit(pod("p1"), "stick")
    assert c.health(node)[device.id]
    await c.freed(device)
    assert await node.admit(pod("p2"), "stick")
    assert not c.health(node)[device.id], "the kubelet knows before the pod fails"
    assert node.object.allocatable[c.full("stick")] == 0
    await c.freed(device)
    assert reason(node, device) is Reason.ALLOCATES_FAILED
