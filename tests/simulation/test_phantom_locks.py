"""Thousands of Leases that one broken-into node writes: the other nodes work on, and say so."""

from dataclasses import replace

import pytest

from tests.simulation.cluster_rig import (
    Cluster,
    agent,
    cluster,
    key,
    one_stick,
    pod,
    reason,
    resource,
    server,
    spec,
    stick,
)
from tests.simulation.test_reload import reload
from usbip_plugin.locks import record
from usbip_plugin.locks.kept import MAX_OF_SERVER
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Reason, ServerKey
from usbip_sim.leases import FINE, Fate, Operation
from usbip_sim.virtual.steploop import stepped

PHANTOMS = 3000
ELSEWHERE = ServerKey("192.0.2.66")


def flood(c: Cluster, server: ServerKey, count: int = PHANTOMS, holder: str = "node-evil") -> None:
    """Writes locks of devices that do not exist, as a node's token may."""
    for number in range(count):
        device = DeviceKey(server, f"9-{number + 1}")
        notes = {**record.device_annotations(device), record.USB_ID: "0951:1666", record.BOOT_ID: "boot"}
        c.backend.create(Lease(device.id, holder, 40, annotations=notes, labels=record.LOCK_LABELS))


@pytest.mark.parametrize("before_the_start", [False, True])
@stepped
async def test_phantom_locks_cost_every_other_node_a_bounded_list_and_its_devices_stay_available(
    before_the_start: bool,
) -> None:
    async with one_stick() as (c, lab, device):
        a, b = c["node-a"], c["node-b"]
        if before_the_start:
            b.kill()
        for place in (ELSEWHERE, lab.key):
            flood(c, place)
        if before_the_start:
            b.start()
        assert await c.settle(lambda: agent(b).locks.ignored.foreign == PHANTOMS, 10)
        assert agent(b).locks.ignored.excess == PHANTOMS - MAX_OF_SERVER
        assert len(agent(b).inventory.snapshot().locks) <= MAX_OF_SERVER + 1, "what an evaluation goes through"
        await c.becomes(b, device, healthy=True)
        assert len(c.health(b)) <= MAX_OF_SERVER + 1
        assert await b.admit(pod("p"), "stick") is None
        assert await c.settle(lambda: c.health(a)[device.id] is False, 10)
        b.end(pod("p"))
        await c.becomes(b, device, healthy=True)


@stepped
async def test_a_server_that_is_added_is_polled_when_its_locks_are_known() -> None:
    """The list of the locks is slow."""
    first, second = server("first", stick("1-1")), server("second", stick("2-1"))
    slow = 0.0

    def fate(_node: str, operation: Operation) -> Fate:
        return Fate(response=slow) if operation.verb == "list" else FINE

    made = replace(spec([first, second], resource("stick", [first])), faults=fate)
    async with cluster(made) as c:
        held = key(second, "2-1")
        await c.all_healthy(key(first, "1-1"))
        notes = {**record.device_annotations(held), record.USB_ID: "0951:1666", record.PORT: "0"}
        c.backend.create(Lease(held.id, "node-z", 40, annotations=notes, labels=record.LOCK_LABELS))
        assert await c.settle(lambda: all(agent(node).locks.ignored.foreign for node in c.nodes.values()), 5)
        slow = 3.0
        reload(c, resource("stick", [first, second]))
        node = c["node-a"]
        assert await c.settle(lambda: held.id in c.health(node), 10)
        assert agent(node).inventory.health()[held.id].reason is Reason.HELD_ELSEWHERE
        lists = [devices for full, devices in node.kubelet.seen.lists if full == c.full("stick")]
        assert not any(devices.get(held.id) for devices in lists), "never offered"
        assert c.health(node)[key(first, "1-1").id], "other servers do not wait"


@stepped
async def test_a_pods_device_of_a_former_server_is_known_to_a_new_process_though_another_node_has_its_lock() -> None:
    """The list of the locks leaves it out: no configuration names its server, and this node does not hold it."""
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        node.kill()
        lease = c.backend.leases[device.id]
        c.backend.replace(replace(lease, holder="node-z", transitions=lease.transitions + 1))
        lab.drop(device.busid)
        assert await c.settle(lambda: not node.attached(), 5)
        reload(c, resource("other", [server("other", stick("1-1"))]))
        node.start()
        assert await c.settle(lambda: reason(node, device) is Reason.LOCK_LOST, 30), reason(node, device)
        assert c.health(node) == {device.id: False}, "the kubelet does not forget what its pod has"
