"""etcd restored from a backup: every node agrees with the API server, and no device is detached for it."""

import asyncio
import errno
from dataclasses import replace

import pytest

from tests.simulation.chaos import BUMP
from tests.simulation.cluster_rig import Cluster, agent, carry, one_stick, pod, port_of
from tests.simulation.following_rig import HERE, HOME, LAB, THERE, found_again, red
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.locks import record
from usbip_plugin.model import DeviceKey
from usbip_sim.leases import FINE, Fate, Operation
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import stepped

WATCH_AGAIN_S = 2.0
"""Seconds in which a broken watch is followed by a list."""

bumps = pytest.mark.parametrize("bump", [0, BUMP])


def agree(c: Cluster) -> bool:
    """Returns whether every node has exactly the locks of the API server."""
    stored = {name: record.lock_of(lease) for name, lease in c.backend.leases.items() if record.is_lock_name(name)}
    return all(dict(agent(node).locks.locks) == stored for node in c.nodes.values())


@bumps
@pytest.mark.parametrize("restarted", [False, True])
@stepped
async def test_a_device_taken_since_the_backup_stays_attached_and_its_lock_is_written_again(
    bump: int, restarted: bool
) -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices) as (c, lab, device):
        backup = c.backend.backup()
        node = await c.taken(device)
        port = port_of(node, device)
        if restarted:
            node.kill()
        c.backend.restore(backup, bump)
        if restarted:
            node.start()
        assert await c.settle(lambda: c.holder(device) == "node-a", WATCH_AGAIN_S + 5 * restarted)
        assert await c.settle(lambda: agree(c), WATCH_AGAIN_S)
        await c.becomes(node, device, healthy=True)
        await c.becomes(c["node-b"], device, healthy=False)
        assert (lab.table.granted, node.attached(), port_of(node, device)) == (1, frozenset({device}), port)
        assert EventKind.LOCK_LOST not in [notice.what for notice in notices]


@bumps
@stepped
async def test_a_lock_that_is_its_former_holders_again_is_released_by_it_and_the_device_stays_attached(
    bump: int,
) -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(notices=notices) as (c, lab, device):
        a, b = c["node-a"], c["node-b"]
        await c.taken(device)
        backup = c.backend.backup()
        a.end(pod("p"))
        await c.becomes(b, device, healthy=True)
        assert await b.admit(pod("q"), "stick") is None
        await c.becomes(a, device, healthy=False)
        c.backend.restore(backup, bump)
        assert await c.settle(lambda: c.holder(device) == "node-b", WATCH_AGAIN_S + 1)
        assert await c.settle(lambda: agree(c), WATCH_AGAIN_S)
        assert (lab.table.granted, b.attached()) == (2, frozenset({device})), "two imports, one by each node"
        assert EventKind.LOCK_LOST not in [notice.what for notice in notices]


@bumps
@pytest.mark.parametrize("restarted", [False, True])
@stepped
async def test_a_lock_that_is_an_earlier_boots_again_is_taken_again_and_the_device_stays_attached(
    bump: int, restarted: bool
) -> None:
    notices: list[DeviceEvent] = []
    async with one_stick(keepalive=True, notices=notices) as (c, lab, device):
        node = await c.taken(device)
        backup = c.backend.backup()
        node.reboot()
        node.start()
        assert await c.settle(lambda: node.attached() == {device} and c.pod_of(device) == pod("p"), 30)
        await c.becomes(node, device, healthy=True)
        if restarted:
            node.kill()
        c.backend.restore(backup, bump)
        if restarted:
            node.start()
        await stays(c, node, device)
        assert lab.table.granted == 2, "one import before the reboot, and one after it"
        assert EventKind.LOCK_LOST not in [notice.what for notice in notices]


@bumps
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("gone", [False, True])
@stepped
async def test_a_lock_of_a_former_holder_that_cannot_release_it_is_taken_again_and_the_device_stays_attached(
    bump: int, gone: bool, restarted: bool
) -> None:
    """The former holder has been rebooted since the backup, or is gone: no list shows the device as free (R3)."""
    notices: list[DeviceEvent] = []
    async with one_stick(keepalive=True, notices=notices) as (c, lab, device):
        a, b = c["node-a"], c["node-b"]
        await c.taken(device)
        backup = c.backend.backup()
        a.end(pod("p"))
        await c.becomes(b, device, healthy=True)
        a.reboot()
        if not gone:
            a.start()
        assert await b.admit(pod("q"), "stick") is None
        await c.noted(device, "q")
        if restarted:
            b.kill()
        c.backend.restore(backup, bump)
        if restarted:
            b.start()
        await stays(c, b, device, "q")
        assert lab.table.granted == 2, "two imports, one by each node"
        assert EventKind.LOCK_LOST not in [notice.what for notice in notices]


@stepped
async def test_a_device_stays_attached_though_its_lock_is_released_by_hand_as_it_once_was() -> None:
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        c.release_by_hand(device)
        backup = c.backend.backup()
        await c.becomes(c["node-b"], device, healthy=True)
        node.end(pod("p"))
        assert await c["node-b"].admit(pod("q"), "stick") is None
        await c.noted(device, "q")
        c.backend.restore(backup)
        await stays(c, c["node-b"], device, "q")
        assert lab.table.granted == 2, "two imports, one by each node"


OUTDATED = {
    record.POD: "default/before/u",
    record.PORT: "7",
    record.SERIAL: "BLUE",
    record.USB_ID: "1a86:7523",
    record.IMPORT_FROM: "10.102.0.9:40000",
}


@bumps
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("outdated", [*OUTDATED.items(), None], ids=str)
@stepped
async def test_a_lock_that_says_of_its_device_what_was_so_at_the_backup_is_corrected(
    bump: int, outdated: tuple[str, str] | None, down: bool, caplog: pytest.LogCaptureFixture
) -> None:
    changes = OUTDATED if outdated is None else dict([outdated])
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        backup = c.backend.backup()
        said = backup.leases[device.id]
        before = replace(said, annotations={**said.annotations, **changes})
        if down:
            node.kill()
        c.backend.restore(replace(backup, leases={**backup.leases, device.id: before}), bump)
        if down:
            node.start()
        assert await c.settle(
            lambda: all(c.note(device, n) == said.annotations[n] for n in OUTDATED), WATCH_AGAIN_S + 1 + 5 * down
        )
        assert await c.settle(lambda: agree(c), WATCH_AGAIN_S)
        await stays(c, node, device)
        assert lab.table.granted == 1
        known_from_kubelet = down and changes.keys() == {record.POD}
        assert caplog.messages.count("lock outdated, correcting it") == (0 if known_from_kubelet else 1)


@bumps
@pytest.mark.parametrize("holder", ["", "node-b"])
@pytest.mark.parametrize("outdated", [*OUTDATED.items(), None], ids=str)
@stepped
async def test_a_lock_of_others_that_says_of_its_device_what_was_so_at_the_backup_is_taken_again_after_a_restart(
    bump: int, holder: str, outdated: tuple[str, str] | None
) -> None:
    changes = OUTDATED if outdated is None else dict([outdated])
    async with one_stick() as (c, lab, device):
        node = await c.taken(device)
        backup = c.backend.backup()
        said = backup.leases[device.id]
        before = replace(said, holder=holder, annotations={**said.annotations, **changes})
        node.kill()
        c.backend.restore(replace(backup, leases={**backup.leases, device.id: before}), bump)
        node.start()
        assert await c.settle(lambda: c.holder(device) == "node-a", WATCH_AGAIN_S + 10)
        await stays(c, node, device)
        assert lab.table.granted == 1
        assert all(c.note(device, n) == said.annotations[n] for n in OUTDATED)


@stepped
async def test_a_device_whose_port_record_cannot_be_written_again_stays_attached(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with one_stick() as (c, lab, device):
        await c.all_healthy(device)
        backup = c.backend.backup()
        node = await c.taken(device)
        node.kernel.records_failing = errno.ENOSPC
        c.backend.restore(backup, BUMP)
        await stays(c, node, device)
        assert lab.table.granted == 1
        (failure,) = [each for each in caplog.records if each.getMessage() == "port record out of date"]
        assert "No space left" in failure.__dict__["cause"]


@bumps
@stepped
async def test_a_lease_of_an_earlier_boot_that_comes_back_after_its_deletion_is_taken_again(bump: int) -> None:
    """Of another Lease, no epoch shows that it was set back. So the device is attached anew (R3)."""
    async with one_stick(keepalive=True) as (c, _lab, device):
        node = await c.taken(device)
        node.end(pod("p"))
        await c.freed(device)
        await c.all_healthy(device)
        assert await node.admit(pod("q"), "stick") is None
        await c.noted(device, "q")
        backup = c.backend.backup()
        node.reboot()
        node.start()
        assert await c.settle(lambda: node.attached() == {device} and c.pod_of(device) == pod("q"), 30)
        await c.becomes(node, device, healthy=True)
        c.backend.delete(device.id, c.backend.leases[device.id].resource_version)
        assert await c.settle(lambda: c.holder(device) == "node-a", 5)
        c.backend.restore(backup, bump)
        await c.becomes(node, device, healthy=False)
        assert await c.settle(lambda: agent(node).locks.locks[device.id].boot_id == f"node-a-boot-{node.boot}", 60)
        await c.becomes(node, device, healthy=True, within=30)
        await stays(c, node, device, "q")


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("down", [False, True])
@stepped
async def test_a_person_may_release_a_lock_that_a_restore_has_set_back_to_an_earlier_epoch(
    held: bool, down: bool
) -> None:
    """The port record names the epoch of the lock as it is now, not the later one of the attach."""
    async with one_stick() as (c, lab, device):
        for name in ("before", "p"):
            await c.all_healthy(device)
            node = c["node-a"]
            if not held:
                backup = c.backend.backup()
            assert await node.admit(pod(name), "stick") is None
            await c.noted(device, name)
            if name == "before":
                if held:
                    backup = c.backend.backup()
                node.end(pod(name))
                await c.freed(device)
        if down:
            node.kill()
        c.backend.restore(backup, BUMP)
        if down:
            node.start()
        assert await c.settle(lambda: c.holder(device) == "node-a" and c.pod_of(device) == pod("p"), 10)
        await c.becomes(node, device, healthy=True)
        await node.stop()
        c.release_by_hand(device)
        node.start()
        assert await c.settle(lambda: not node.attached(), 30)
        assert not await c.settle(lambda: bool(node.attached()), 60)
        assert lab.table.granted == 2


@bumps
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("taken", [False, True], ids=["before the Allocate", "before the move"])
@pytest.mark.parametrize("place", [HERE, THERE], ids=["own server", "other server"])
@stepped
async def test_a_device_that_has_moved_stays_attached_and_both_its_locks_are_written_again(
    bump: int, place: DeviceKey, taken: bool, restarted: bool
) -> None:
    async with red() as c:
        await c.all_healthy(HOME)
        backup = c.backend.backup()
        node = await c.taken(HOME)
        if taken:
            backup = c.backend.backup()
        to = c.servers[place.server]
        carry(c.servers[LAB], HOME.busid, to, place.busid)
        await found_again(c, node)
        imports = to.table.granted
        if restarted:
            node.kill()
        c.backend.restore(backup, bump)
        if restarted:
            node.start()
        assert await c.settle(lambda: c.holder(HOME) == c.holder(place) == "node-a", WATCH_AGAIN_S + 5)
        assert not await c.settle(
            lambda: node.attached() != {place} or not c.holder(HOME) == c.holder(place) == "node-a", 60
        )
        assert to.table.granted == imports
        await c.becomes(node, HOME, healthy=True)
        node.end(pod("p"))
        await c.freed(HOME, place)


@stepped
async def test_a_lock_that_is_deleted_while_it_is_corrected_is_taken_again(caplog: pytest.LogCaptureFixture) -> None:
    slow = False

    def fate(_node: str, operation: Operation) -> Fate:
        return Fate(request=1.0) if slow and operation.verb == "update" and operation.name == device.id else FINE

    async with one_stick(change=lambda made: replace(made, faults=fate)) as (c, lab, device):
        node = await c.taken(device)
        backup = c.backend.backup()
        said = backup.leases[device.id]
        before = replace(said, annotations={**said.annotations, **OUTDATED})
        slow = True
        c.backend.restore(replace(backup, leases={**backup.leases, device.id: before}))
        assert await c.settle(lambda: agent(node).locks.locks[device.id].pod != pod("p"), WATCH_AGAIN_S)
        await asyncio.sleep(0.5)
        c.backend.delete(device.id, c.backend.leases[device.id].resource_version)
        await stays(c, node, device)
        assert lab.table.granted == 1
        assert caplog.messages.count("lock not corrected") == 1


@stepped
async def test_a_restored_lock_that_records_the_same_costs_no_write() -> None:
    async with one_stick() as (c, _lab, device):
        await c.taken(device)
        backup = c.backend.backup()
        lease = backup.leases[device.id]
        earlier = replace(lease, annotations={**lease.annotations, record.WRITE_ID: "earlier"})
        c.backend.restore(replace(backup, leases={**backup.leases, device.id: earlier}))
        assert not await c.settle(lambda: c.note(device, record.WRITE_ID) != "earlier", 30)


async def stays(c: Cluster, node: ClusterNode, device: DeviceKey, name: str = "p") -> None:
    """Checks that the node holds the device again within seconds, and that it keeps it."""
    assert await c.settle(lambda: c.holder(device) == node.name, WATCH_AGAIN_S + 1)
    assert not await c.settle(lambda: node.attached() != {device} or c.holder(device) != node.name, 60)
    assert c.pod_of(device) == pod(name)
    await c.becomes(node, device, healthy=True)
