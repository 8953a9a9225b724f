"""Exact numbers of requests that a fleet sends to the API server and to USB/IP servers."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from tests.simulation.cluster_rig import LOCKS, Cluster, cluster, key, pod, server, spec, stick
from usbip_plugin.inventory.turns import OFFERED_BY_ALL_S
from usbip_plugin.usbip.poller import JITTER, MAX_RATE, POLL_INTERVAL, POLL_TIMEOUT, share
from usbip_sim.leases import FINE, Fate, Operation
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.steploop import stepped
from usbip_sim.virtual.surroundings import ClusterSpec

MINUTE, WHILE = 60.0, 1200.0
LOCK_WRITES = 4
"""Writes of a lock from free to free: acquired, port, pod, released."""
BEATS = WHILE / (LOCKS.duration / 4)
LARGE = 5000
"""Nodes of a fleet, of which only a few are simulated."""


class Counted:
    """Counts of Lease calls by (node, verb). The verb of a watch event is "event"."""

    def __init__(self, of: ClusterSpec) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.spec = replace(of, faults=self._note)

    def _note(self, node: str, operation: Operation) -> Fate:
        self.calls[node, operation.verb] += 1
        return FINE

    def verb(self, *verbs: str) -> int:
        return sum(count for (_, verb), count in self.calls.items() if verb in verbs)

    @property
    def writes(self) -> int:
        return self.verb("create", "update", "delete")


def many(of: ClusterSpec, nodes: int) -> ClusterSpec:
    return replace(of, names=[f"node-{number:03}" for number in range(nodes)])


def devlist_requests(lab: VirtualServer, of: Cluster) -> int:
    """Returns the number of DEVLIST requests."""
    return lab.connections - sum(lab.importers(busid) for busid in ("1-1", "1-2"))


async def device_offered_everywhere(c: Cluster, within: float, *busids: str) -> None:
    (lab,) = c.servers.values()
    ids = {key(lab, busid).id for busid in busids}
    assert await c.settle(lambda: all(ids <= healthy(c, name) for name in c.nodes), within)


def healthy(c: Cluster, name: str) -> set[str]:
    return {i for i, well in c.health(c[name]).items() if well}


# the API server


@stepped
async def test_a_fleet_without_holders_makes_no_requests() -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    counted = Counted(spec([lab], nodes=3))
    async with cluster(counted.spec) as c:
        await c.all_healthy(key(lab, "1-1"))
        assert counted.verb("list") == 3, "one at each start"
        counted.calls.clear()
        await asyncio.sleep(WHILE)
    assert counted.writes == 0
    assert counted.verb("get", "list") == 0


@stepped
async def test_a_holder_writes_its_session_every_quarter_of_the_duration_and_nothing_else() -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    counted = Counted(spec([lab], nodes=3))
    async with cluster(counted.spec) as c:
        await c.all_healthy(key(lab, "1-1"), key(lab, "1-2"))
        for name in ("p", "q"):
            assert await c["node-a"].admit(pod(name), "stick") is None
        await asyncio.sleep(MINUTE)
        counted.calls.clear()
        await asyncio.sleep(WHILE)
        assert counted.calls["node-a", "update"] in (BEATS, BEATS - 1, BEATS + 1), "two devices cost no more than one"
    assert counted.writes == counted.calls["node-a", "update"]
    assert counted.verb("get", "list") == 0
    assert counted.verb("event") == 0, "no node watches heartbeats"


@stepped
async def test_a_device_that_changes_hands_costs_four_writes_and_each_node_four_events() -> None:
    lab, nodes = server("lab", stick("1-1")), 12
    device = key(lab, "1-1")
    counted = Counted(spec([lab], nodes=nodes))
    async with cluster(counted.spec) as c:
        await c.all_healthy(device)
        for name, writes in (("node-a", LOCK_WRITES + 1), ("node-b", LOCK_WRITES), ("node-c", LOCK_WRITES)):
            counted.calls.clear()
            assert await c[name].admit(pod(name), "stick") is None
            assert await c.settle(lambda: c.pod_of(device) is not None, 5)
            for other in c.nodes:
                if other != name:
                    await c.becomes(c[other], device, healthy=False)
            c[name].end(pod(name))
            await device_offered_everywhere(c, OFFERED_BY_ALL_S, "1-1")
            session = 1
            assert counted.writes == writes + session, "its serial number is written once"
            assert counted.writes == sum(counted.calls[name, verb] for verb in ("create", "update")), "by its holder"
            assert counted.verb("event") == writes * nodes
            assert counted.verb("get") == session, "the others do not read the holder's session"
            await asyncio.sleep(MINUTE)


# the USB/IP servers


@pytest.mark.parametrize("nodes", [3, 30, 60, 120])
@stepped
async def test_the_poll_rate_of_a_server_is_limited_for_any_number_of_nodes(nodes: int) -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    async with cluster(many(spec([lab]), nodes)) as c:
        await device_offered_everywhere(c, 2 * share(nodes) + 1, "1-1", "1-2")
        before = devlist_requests(lab, c)
        await asyncio.sleep(2 * MINUTE)
        rate = (devlist_requests(lab, c) - before) / (2 * MINUTE)
        assert rate <= MAX_RATE * 1.01
        assert rate >= 0.75 * min(MAX_RATE, nodes / POLL_INTERVAL)


@stepped
async def test_devices_that_change_hands_do_not_make_all_nodes_ask_at_once() -> None:
    lab, nodes = server("lab", stick("1-1")), 80
    device = key(lab, "1-1")
    async with cluster(many(spec([lab]), nodes)) as c:
        await device_offered_everywhere(c, 2 * share(nodes) + 1, "1-1")
        began, before, tenures = asyncio.get_running_loop().time(), lab.connections, 8
        most, last = 0, before
        for number in range(tenures):
            holder = c[f"node-{number:03}"]
            await c.becomes(holder, device, healthy=True, within=OFFERED_BY_ALL_S)
            last = lab.connections
            assert await holder.admit(pod(f"p{number}"), "stick") is None
            assert await c.settle(lambda: c.pod_of(device) is not None, 5)
            holder.end(pod(f"p{number}"))
            assert await c.settle(lambda: c.holder(device) == "", 10)
            for _ in range(10):
                await asyncio.sleep(0.1)
                most, last = max(most, lab.connections - last), lab.connections
        took = asyncio.get_running_loop().time() - began
        assert lab.connections - before - tenures <= MAX_RATE * took + nodes
        assert most < nodes / 2, "within any tenth of a second"


@stepped
async def test_in_a_large_fleet_a_released_device_is_offered_everywhere_in_ten_seconds() -> None:
    """No poll is necessary, as a node detaches a device before it releases the lock."""
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(replace(spec([lab], nodes=3), fleet=LARGE)) as c:
        await device_offered_everywhere(c, share(LARGE) + 1, "1-1")
        for name in ("node-a", "node-b"):
            assert await c[name].admit(pod(name), "stick") is None
            await asyncio.sleep(1.5 * share(LARGE))  # each has polled the server, which does not list the device
            for other in c.nodes:
                if other != name:
                    await c.becomes(c[other], device, healthy=False)
            c[name].end(pod(name))
            await device_offered_everywhere(c, OFFERED_BY_ALL_S + 1, "1-1")
        polls = lab.connections
        await asyncio.sleep(2 * share(LARGE))
        assert lab.connections - polls <= 3 * 3
        assert all(device.id in healthy(c, name) for name in c.nodes)


@stepped
async def test_in_a_large_fleet_a_lost_device_is_back_within_five_seconds() -> None:
    lab = server("lab", stick("1-1", "RED"))
    device = key(lab, "1-1")
    async with cluster(replace(spec([lab], nodes=2), fleet=LARGE)) as c:
        a = c["node-a"]
        await device_offered_everywhere(c, share(LARGE) + 1, "1-1")
        assert await a.admit(pod("p"), "stick") is None
        assert await c.settle(lambda: c.pod_of(device) is not None, 5)
        for busid in ("1-1", "1-2"):  # its own place and another one
            lab.unplug("1-1")
            await c.becomes(a, device, healthy=False)
            await asyncio.sleep(3 * MINUTE)
            lab.plug(stick(busid, "RED"))
            await c.becomes(a, device, healthy=True, within=5)
        assert c.holder(device) == a.name


@stepped
async def test_in_a_large_fleet_a_server_that_is_gone_is_noticed_by_each_node_when_its_turn_comes() -> None:
    lab = server("lab", stick("1-1"))
    device = key(lab, "1-1")
    async with cluster(replace(spec([lab], nodes=3), fleet=LARGE)) as c:
        await device_offered_everywhere(c, share(LARGE) + 1, "1-1")
        await lab.stop()
        for node in c.nodes.values():
            await c.becomes(node, device, healthy=False, within=share(LARGE) * JITTER[1] + POLL_TIMEOUT)
        await lab.start()
        await device_offered_everywhere(c, share(LARGE) * JITTER[1] + POLL_TIMEOUT, "1-1")
