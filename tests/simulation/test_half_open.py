"""Network cuts and power losses with a server that sets no keepalive, as usbipd: its connections stay half-open."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.simulation.cluster_rig import SETTLE, Cluster, one_stick, pod, reason, stick, two_sticks
from usbip_plugin.attach.half_open import FIRST_WAIT, MAX_WAIT
from usbip_plugin.claims import ClaimState
from usbip_plugin.errors import ServerUnreachable
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import DeviceKey, Endpoint, ServerKey
from usbip_plugin.usbip.poller import JITTER, MAX_RETRY
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.network import TIME_WAIT_S
from usbip_sim.virtual.steploop import loop_of, stepped
from usbip_sim.virtual.tcp import MemoryConnector

CUT_S = 30.0
"""Seconds of a cut that ends a connection at the node only, as when a switch restarts."""
BACK_S = 10.0
"""Seconds within which a pod's device is back after the network."""
FREE_S = MAX_RETRY * JITTER[1] + FIRST_WAIT + SETTLE
"""Seconds within which a free device is: the next poll of its server may be that late."""


def source_of(c: Cluster, device: DeviceKey) -> Endpoint | None:
    """Returns from where the device was last imported, as its lock has it."""
    return lock_of(c.backend.leases[device.id]).import_from


def cut(c: Cluster, node: ClusterNode, device: DeviceKey) -> None:
    c.network.link(node.name, device.server).cut()


async def mend(c: Cluster, node: ClusterNode, device: DeviceKey) -> None:
    """Mends a cut that has left the server a half-open connection."""
    assert c.servers[device.server].importers(device.busid) == 1
    c.network.link(node.name, device.server).mend()


async def attached_again(c: Cluster, node: ClusterNode, device: DeviceKey, within: float = BACK_S) -> None:
    lab = c.servers[device.server]
    assert await c.settle(lambda: node.attached() == {device}, within), reason(node, device)
    await c.becomes(node, device, healthy=True)
    assert lab.peers(device.busid) == [source_of(c, device)]
    assert c.network.half_open(device.server) == 0


async def free_again(c: Cluster, device: DeviceKey) -> None:
    await c.freed(device, within=FREE_S)
    await c.all_healthy(device)


async def free_once_listed(c: Cluster, device: DeviceKey, source: Endpoint | None) -> None:
    """Ends node-a's cut, and checks that node-b did not have the device of a free lock before, and has it after it.

    source: from where node-a imported the device, which the lock must still say when the network is back.
    """
    a, b = c["node-a"], c["node-b"]
    assert not await c.settle(lambda: c.health(b)[device.id], CUT_S)
    a.silence(silent=False)
    await asyncio.sleep(SETTLE)
    assert source_of(c, device) == source
    await mend(c, a, device)
    await c.becomes(b, device, healthy=True, within=FREE_S)
    assert await b.admit(pod("q"), "stick") is None


@stepped
async def test_a_pods_device_is_back_after_a_network_cut_of_half_a_minute() -> None:
    async with one_stick() as (c, _lab, device):
        a = await c.taken(device)
        source = source_of(c, device)
        cut(c, a, device)
        await asyncio.sleep(CUT_S)
        assert source_of(c, device) == source, "the tries during the cut do not lose the port of the dead connection"
        await mend(c, a, device)
        await attached_again(c, a, device)


@stepped
async def test_a_device_whose_pod_ends_during_a_cut_is_free_again() -> None:
    async with one_stick() as (c, _lab, device):
        a = await c.taken(device)
        cut(c, a, device)
        await asyncio.sleep(CUT_S / 2)
        a.end(pod("p"))
        await asyncio.sleep(CUT_S / 2)
        assert c.holder(device) == ""
        await mend(c, a, device)
        await free_again(c, device)


@stepped
async def test_a_device_whose_pod_ends_during_a_cut_is_not_free_before_the_server_lists_it() -> None:
    """Regression: another node took it at once, and hid the port of the connection that only the first node can end."""
    async with one_stick() as (c, _lab, device):
        a = await c.taken(device)
        source = source_of(c, device)
        cut(c, a, device)
        await asyncio.sleep(CUT_S)
        a.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", SETTLE)
        await free_once_listed(c, device, source)


@stepped
async def test_a_lock_that_a_person_releases_during_a_cut_does_not_make_its_device_free() -> None:
    async with one_stick() as (c, _lab, device):
        a = await c.taken(device)
        source = source_of(c, device)
        cut(c, a, device)
        a.silence(silent=True)
        await asyncio.sleep(CUT_S)
        c.release_by_hand(device)
        await free_once_listed(c, device, source)


@stepped
async def test_a_lost_device_of_another_node_does_not_hide_the_port_of_a_half_open_connection() -> None:
    """Node b has a pod whose device node a has got. When node a lets go, only node a can end its dead connection."""
    async with one_stick() as (c, lab, device):
        await c.all_healthy(device)
        a, b = c["node-a"], c["node-b"]
        assert await b.admit(pod("q"), "stick") is None
        await c.noted(device, "q")
        b.kill()
        lab.drop(device.busid)
        c.steal(device)
        c.let_go(device)
        await c.becomes(a, device, healthy=True, within=BACK_S)
        assert await a.admit(pod("p"), "stick") is None
        await c.noted(device, "p")
        b.start()
        await c.knows_its_pod(b, device, "q")
        await asyncio.sleep(CUT_S)
        assert b.held_in(ClaimState.LOST) == {device}
        source = source_of(c, device)
        cut(c, a, device)
        a.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", FREE_S)
        assert not await c.settle(lambda: source_of(c, device) != source, CUT_S)
        await mend(c, a, device)
        await attached_again(c, b, device, FREE_S + BACK_S)


@stepped
async def test_each_cut_of_a_device_that_always_comes_from_the_same_port_is_recovered_from() -> None:
    async with one_stick(nodes=1) as (c, _lab, device):
        sources = set()
        for _ in range(3):
            a = await c.taken(device)
            sources.add(source_of(c, device))
            cut(c, a, device)
            await asyncio.sleep(CUT_S / 2)
            a.end(pod("p"))
            await asyncio.sleep(CUT_S / 2)
            await mend(c, a, device)
            await free_again(c, device)
        assert len(sources) == 1


@pytest.mark.parametrize("ends", [False, True], ids=["pod stays", "pod ends"])
@stepped
async def test_the_successor_of_a_plugin_killed_during_a_cut_gets_the_device_back(ends: bool) -> None:
    async with one_stick() as (c, _lab, device):
        a = await c.taken(device)
        cut(c, a, device)
        await asyncio.sleep(CUT_S / 2)
        a.kill()
        if ends:
            a.end(pod("p"))
        await asyncio.sleep(CUT_S / 2)
        a.start()
        await mend(c, a, device)
        await (free_again(c, device) if ends else attached_again(c, a, device))


@pytest.mark.parametrize("ends", [False, True], ids=["pod stays", "pod ends"])
@stepped
async def test_a_node_that_lost_its_power_gets_its_device_back_after_the_reboot(ends: bool) -> None:
    async with one_stick() as (c, lab, device):
        a = await c.taken(device)
        a.lose_power()
        if ends:
            a.end(pod("p"))
        await asyncio.sleep(CUT_S)
        assert lab.importers("1-1") == 1
        a.start()
        await (free_again(c, device) if ends else attached_again(c, a, device))


@stepped
async def test_a_cut_while_a_device_enumerates_leaves_nothing_half_open() -> None:
    async with one_stick() as (c, lab, device):
        a = c["node-a"]
        a.kernel.stuck_next()
        asking = asyncio.create_task(a.admit(pod("p"), "stick"))
        assert await c.settle(lambda: lab.importers("1-1") == 1, 1)
        cut(c, a, device)
        assert await asking is not None
        await asyncio.sleep(CUT_S)
        await mend(c, a, device)
        await free_again(c, device)


@stepped
async def test_a_lease_that_is_written_again_for_a_live_attachment_names_its_port() -> None:
    async with one_stick() as (c, lab, device):
        a = await c.taken(device)
        a.kill()
        c.backend.delete(device.id, c.backend.leases[device.id].resource_version)
        a.start()
        assert await c.settle(lambda: c.holder(device) == a.name, SETTLE)
        assert [source_of(c, device)] == lab.peers("1-1")


class Connects:
    """The connects that were to end half-open connections: (address of the node, source port, loop time), in order.

    refused: each of them fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, Endpoint, float]] = []
        self.refused = False
        plain = MemoryConnector.end_half_open

        async def recorded(connector: MemoryConnector, server: ServerKey, source: Endpoint) -> bool:
            self.made.append((connector.address, source, loop_of().time()))
            if self.refused:
                raise ServerUnreachable(server, "cannot connect")
            return await plain(connector, server, source)

        monkeypatch.setattr(MemoryConnector, "end_half_open", recorded)


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> Connects:
    return Connects(monkeypatch)


@stepped
async def test_an_unplugged_device_costs_its_last_node_one_connect_and_no_other_its_attachment(
    connects: Connects,
) -> None:
    async with two_sticks() as (c, lab, *sticks):
        a = c["node-a"]
        for name in ("p", "q"):
            assert await a.admit(pod(name), "stick") is None
        for device in sticks:
            assert await c.settle(lambda device=device: c.pod_of(device) is not None, SETTLE)  # type: ignore[misc]
        held, released = sorted(sticks, key=lambda device: str(c.pod_of(device)))
        a.end(pod("q"))
        assert await c.settle(lambda: c.holder(released) == "", SETTLE)
        await c.all_healthy(released)
        await asyncio.sleep(TIME_WAIT_S)
        source, peers = source_of(c, released), lab.peers(held.busid)
        lab.unplug(released.busid)
        await asyncio.sleep(2 * MAX_WAIT)
        assert [port for address, port, _ in connects.made if port.address == address] == [source]
        assert len(connects.made) == 2, "node-b has found out that the port is of another node"
        assert lab.peers(held.busid) == peers
        assert a.attached() == {held}


@stepped
async def test_connects_that_fail_become_rare(connects: Connects) -> None:
    async with one_stick(nodes=1) as (c, lab, device):
        a = await c.taken(device)
        a.end(pod("p"))
        await c.freed(device)
        await c.all_healthy(device)
        connects.refused = True
        lab.unplug("1-1")
        await asyncio.sleep(10 * MAX_WAIT)
        times = [at for _, _, at in connects.made]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        least = [min(FIRST_WAIT * 2**n, MAX_WAIT) * 0.8 for n in range(len(gaps))]
        assert len(gaps) > 8
        assert all(gap >= bound for gap, bound in zip(gaps, least, strict=True)), gaps
        assert await c.settle(lambda: len(connects.made) > len(times), 2 * MAX_WAIT)
        lab.plug(stick("1-1"))
        await c.all_healthy(device)
        lab.unplug("1-1")
        await asyncio.sleep(MAX_WAIT / 2)
        assert len(connects.made) == len(times) + 1, "a device that comes and goes does not shorten the wait"
