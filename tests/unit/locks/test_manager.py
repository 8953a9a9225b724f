"""The lock manager: the holder of a lock, the view of the other nodes, and faults of the API server."""

import asyncio
import dataclasses
from collections.abc import Callable
from functools import partial

import pytest

from tests.rigs.vocabulary import KEY, OTHER_KEY, POD
from tests.unit.locks.lock_harness import Node, World, given_up, on_held_world, on_node, on_world, unreachable, until
from usbip_plugin.errors import KubeForbidden, KubeNotFound, KubeServerError, LockHeld, LockLost, LockUnavailable
from usbip_plugin.locks import record
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.protocol import LockMeta, LockStatus
from usbip_plugin.locks.session import BEAT_FRACTION, EXPIRED_BEATS, UNPROVEN_DURATIONS
from usbip_plugin.locks.watch import ApiState, LockChange
from usbip_plugin.model import UNKNOWN_IDENTITY, DeviceKey, Identity, InterfaceClass, Tenure
from usbip_plugin.usbip.poller import ExportState
from usbip_sim.leases import FINE, Fate, Lost, Operation

RESOURCE = "leases.coordination.k8s.io"
IDENTITY = Identity(1 << 16 | 7, "S1")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def once(verb: str, fate: Fate) -> Callable[[Operation], Fate]:
    """Returns a fate for the next call with this verb on a lock only."""
    left = [fate]

    def decide(operation: Operation) -> Fate:
        lock = record.is_lock_name(operation.name)
        return left.pop() if left and operation.verb == verb and lock else FINE

    return decide


@on_world
async def test_one_of_two_acquires_succeeds_and_the_error_of_the_other_names_the_holder(w: World) -> None:
    a, b = await w.node("a"), await w.node("b")
    results = await asyncio.gather(
        a.manager.acquire(KEY, LockMeta(usb_id="0951:1666")), b.manager.acquire(KEY), return_exceptions=True
    )
    winner = next(r for r in results if not isinstance(r, BaseException))
    loser = next(r for r in results if isinstance(r, LockHeld))
    assert loser.holder == winner.lock.holder
    assert loser.device == str(KEY)
    assert w.backend.leases[KEY.id].holder == winner.lock.holder


@on_world
async def test_every_node_sees_the_acquire_and_the_release_of_a_lock(w: World) -> None:
    a, b = await w.node("a"), await w.node("b")
    await a.manager.acquire(KEY, LockMeta(usb_id="0951:1666", identity=IDENTITY, traceparent=TRACE))
    await a.manager.annotate(KEY, port=3, pod=POD)
    await until(lambda: KEY.id in b.manager.locks and b.manager.locks[KEY.id].port == 3, b)
    seen = b.manager.locks[KEY.id]
    assert seen == a.manager.locks[KEY.id]
    assert (seen.holder, seen.epoch, seen.pod, seen.traceparent) == ("a", 1, POD, TRACE)
    assert (seen.server, seen.busid, str(seen.usb_id), seen.serial) == (str(KEY.server), "1-1", "0951:1666", "S1")
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    assert a.manager.lock_status(KEY.id) is LockStatus.MINE
    assert a.manager.mine() == (seen,)
    with pytest.raises(LockHeld) as refused:
        await b.manager.acquire(KEY)
    assert (refused.value.holder, refused.value.pod) == ("a", "default/reader")
    assert refused.value.since is not None
    await a.manager.release(KEY)
    assert a.manager.mine() == ()
    await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.FREE, b)
    kept = b.manager.locks[KEY.id]
    assert (kept.holder, kept.pod, kept.port, kept.boot_id) == ("", None, None, None)
    assert (kept.serial, str(kept.usb_id), kept.busid, kept.traceparent) == ("S1", "0951:1666", "1-1", TRACE)
    grant = await b.manager.acquire(KEY)
    assert (grant.epoch, grant.lock.serial) == (2, "S1")


@on_world
async def test_a_release_records_whether_the_allocate_failed(w: World) -> None:
    a, b = await w.node("a"), await w.node("b")
    for failed, recorded in ((None, None), (True, 2), (None, 2), (False, None)):
        await a.manager.acquire(KEY)
        await a.manager.release(KEY, failed=failed)
        assert a.manager.locks[KEY.id].failed_epoch == recorded
    await a.manager.acquire(KEY)
    await b.manager.release(KEY, failed=True)
    assert b.manager.locks[KEY.id].failed_epoch is None, "the lock is another node's"


@on_held_world
async def test_each_change_is_reported_once_and_in_order(w: World) -> None:
    a, b = w.nodes
    await a.manager.annotate(KEY, port=1)
    await a.manager.release(KEY)
    await until(lambda: len(b.changes) == 3, b)
    await a.clock.sleep(1)
    for node in (a, b):
        assert [change.old for change in node.changes[1:]] == [change.new for change in node.changes[:-1]]
        assert [change.new.holder for change in node.changes if change.new] == ["a", "a", ""]


@on_node
async def test_the_import_deadline_counts_from_the_sending_of_the_write(a: Node) -> None:
    a.fate = once("create", Fate(request=1.0, response=2.0))
    before = a.clock.monotonic()
    grant = await a.manager.acquire(KEY)
    assert a.clock.monotonic() == pytest.approx(before + 3)
    assert grant.import_deadline == pytest.approx(before + LockSettings().import_window)


@on_node
async def test_an_acquire_by_the_holder_writes_again_and_keeps_the_epoch(a: Node) -> None:
    first = await a.manager.acquire(KEY)
    await a.manager.annotate(KEY, port=2, pod=POD)
    await a.clock.sleep(100)
    again = await a.manager.acquire(KEY)
    assert again.lock.resource_version != first.lock.resource_version
    assert (again.epoch, again.lock.port, again.lock.pod) == (1, 2, POD)
    assert again.import_deadline == pytest.approx(first.import_deadline + 100)
    renewed = await a.manager.renew(KEY)
    assert renewed.epoch == 1
    assert renewed.lock.resource_version != again.lock.resource_version


@on_world
async def test_an_acquire_by_another_boot_begins_an_epoch_without_an_attachment(w: World) -> None:
    old = await w.node("a", "boot-1")
    await old.manager.acquire(KEY)
    await old.manager.annotate(KEY, port=2, pod=POD)
    await old.stop()
    new = await w.node("a", "boot-2")
    assert new.manager.lock_status(KEY.id) is LockStatus.OTHER_BOOT
    with pytest.raises(LockLost):
        await new.manager.renew(KEY)
    grant = await new.manager.acquire(KEY)
    assert (grant.epoch, grant.lock.port, grant.lock.pod, grant.lock.boot_id) == (2, None, None, "boot-2")


@on_world
async def test_a_release_does_not_clear_the_lock_of_another_node(w: World) -> None:
    a, b = await w.node("a"), await w.node("b")
    await a.manager.acquire(KEY)  # b may not have seen it
    await b.manager.release(KEY)
    assert w.backend.leases[KEY.id].holder == "a"
    await a.manager.release(KEY)
    await a.manager.release(KEY)
    await a.manager.release(OTHER_KEY)
    assert w.backend.leases[KEY.id].holder == ""
    assert OTHER_KEY.id not in w.backend.leases


@on_held_world
async def test_a_lock_taken_over_by_another_node_is_lost(w: World) -> None:
    a, b = w.nodes
    a.fate = unreachable
    a.store.cut()
    await expire(b)
    await b.manager.acquire(KEY)
    a.fate = lambda _operation: FINE
    for operation in (a.manager.renew(KEY), a.manager.annotate(KEY, port=1)):
        with pytest.raises(LockLost) as lost:
            await operation
        assert lost.value.holder == "b"
    await a.manager.release(KEY)
    assert w.backend.leases[KEY.id].holder == "b"
    assert a.manager.mine() == ()


async def expire(node: Node) -> None:
    node.manager.expiry.set_importable(frozenset({KEY.id}))
    await until(lambda: node.manager.lock_status(KEY.id) is LockStatus.EXPIRED, node)


@on_held_world
async def test_the_lock_of_a_dead_holder_expires_after_its_duration_and_can_be_taken_over(w: World) -> None:
    a, b = w.nodes
    await a.stop()
    start = b.clock.monotonic()
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)
    await expire(b)
    assert LockSettings().duration <= b.clock.monotonic() - start <= LockSettings().duration * 1.3
    grant = await b.manager.acquire(KEY)
    assert (grant.lock.holder, grant.epoch) == ("b", 2)


@on_held_world
async def test_a_lock_whose_device_is_not_importable_never_expires(w: World) -> None:
    a, b = w.nodes
    await a.stop()
    await b.clock.sleep(3600)
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    await expire(b)
    b.manager.expiry.set_importable(frozenset())
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)


@on_world
async def test_importable_changed_affects_only_its_device(w: World) -> None:
    a, b = await w.node("a"), await w.node("b")
    await a.manager.acquire(KEY)
    await a.manager.acquire(OTHER_KEY)
    await until(lambda: {KEY.id, OTHER_KEY.id} <= b.manager.locks.keys(), b)
    await a.stop()
    b.manager.expiry.set_importable(frozenset({OTHER_KEY.id}))
    await until(lambda: b.manager.lock_status(OTHER_KEY.id) is LockStatus.EXPIRED, b)
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    began = b.clock.monotonic()
    b.manager.expiry.importable_changed(KEY.id, importable=True)
    await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.EXPIRED, b)
    assert b.clock.monotonic() - began <= LockSettings().duration * 1.3, "observed from that moment"
    changed: list[str] = []
    b.manager.subscribe(lambda change: changed.append(change.device_id))
    b.manager.expiry.importable_changed(KEY.id, importable=False)
    assert changed == [KEY.id]
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    assert b.manager.lock_status(OTHER_KEY.id) is LockStatus.EXPIRED
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)


@on_held_world
async def test_a_takeover_asks_the_server_whether_it_lists_the_device(w: World) -> None:
    """The list of a node that was stopped may be older than an attachment elsewhere."""
    a, b = w.nodes
    await a.stop()
    await expire(b)
    b.export_state = ExportState.UNLISTED
    assert b.manager.lock_status(KEY.id) is LockStatus.EXPIRED
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)
    assert w.backend.leases[KEY.id].holder == "a"
    b.export_state = ExportState.FREE
    assert (await b.manager.acquire(KEY)).epoch == 2


@on_held_world
async def test_the_lock_of_an_unproven_device_expires_later_and_its_server_is_not_noted(w: World) -> None:
    a, b = w.nodes
    noted: list[str] = []
    b.manager.expiry.on_listed_in_use = noted.append
    b.manager.expiry.set_unproven(frozenset({KEY.id}))
    b.manager.expiry.set_importable(frozenset({KEY.id}))
    await a.stop()
    await b.clock.sleep(LockSettings().duration * (UNPROVEN_DURATIONS - 0.5))
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)
    await b.clock.sleep(LockSettings().duration * 1.5)
    assert b.manager.lock_status(KEY.id) is LockStatus.EXPIRED
    assert not noted
    assert (await b.manager.acquire(KEY)).epoch == 2


@on_held_world
async def test_a_heartbeat_after_a_whole_duration_shows_that_a_listed_device_is_in_use(w: World) -> None:
    _, b = w.nodes
    noted: list[str] = []
    b.manager.expiry.on_listed_in_use = noted.append
    b.manager.expiry.set_importable(frozenset({KEY.id}))
    await b.clock.sleep(LockSettings().duration * 0.9)
    assert not noted
    await b.clock.sleep(LockSettings().duration)
    assert KEY.id in noted


@on_held_world
async def test_an_observation_does_not_go_on_over_an_outage_of_the_observer(w: World) -> None:
    a, b = w.nodes
    b.manager.expiry.set_importable(frozenset({KEY.id}))
    await b.clock.sleep(LockSettings().duration * 0.3)
    a.fate = b.fate = unreachable
    await b.clock.sleep(2 * LockSettings().duration)
    b.fate = lambda _operation: FINE
    await b.clock.sleep(LockSettings().duration * 0.9)
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    await b.clock.sleep(LockSettings().duration)
    assert b.manager.lock_status(KEY.id) is LockStatus.EXPIRED


async def rebooted(w: World) -> Node:
    """Returns node a after a reboot. Its earlier boot holds KEY."""
    before = await w.node("a", boot="boot-1")
    await before.manager.acquire(KEY)
    await before.stop()
    return await w.node("a", boot="boot-2")


@on_world
async def test_a_lock_of_another_boot_is_taken_only_if_the_server_lists_the_device_as_free(w: World) -> None:
    after = await rebooted(w)
    for after.export_state in (ExportState.UNLISTED, ExportState.LISTED, ExportState.UNKNOWN):
        with pytest.raises(LockHeld, match="held by node a under another boot id"):
            await after.manager.acquire(KEY)
    after.export_state = ExportState.FREE
    assert (await after.manager.acquire(KEY)).epoch == 2


@on_world
async def test_a_lock_of_another_boot_is_released_unless_its_server_is_silent_or_lists_devices_in_use(w: World) -> None:
    for answer in ExportState:
        after = await rebooted(w)
        after.export_state = answer
        if released := answer in (ExportState.FREE, ExportState.UNLISTED):
            await after.manager.release(KEY)
        else:
            with pytest.raises(LockHeld):
                await after.manager.release(KEY)
        lease = w.backend.leases.pop(KEY.id)
        assert (lease.holder, lease.annotations[record.BOOT_ID]) == ("" if released else "a", "boot-1"), answer
        await after.stop()


@on_world
async def test_a_lock_left_under_another_boot_is_taken_by_that_boot_or_if_the_server_lists_the_device(w: World) -> None:
    after = await rebooted(w)
    other = await w.node("b", boot="boot-of-b")
    await after.manager.release(KEY)
    await until(lambda: other.manager.locks[KEY.id].holder == "", other)
    for node in (after, other):
        for node.export_state in (ExportState.UNLISTED, ExportState.UNKNOWN):
            with pytest.raises(
                LockUnavailable, match="its last holder may still have the device, and no list shows it"
            ):
                await node.manager.acquire(KEY)
    other.export_state = ExportState.LISTED  # such a server did not list the device when the lock was left
    assert (await other.manager.acquire(KEY)).epoch == 2
    await other.manager.release(KEY)
    await until(lambda: after.manager.locks[KEY.id].holder == "", after)
    assert (await after.manager.acquire(KEY)).epoch == 3, "a release under the own boot leaves nothing"


@on_world
async def test_a_machine_takes_the_lock_again_that_was_left_under_its_boot(w: World) -> None:
    before = await w.node("a", boot="boot-1")
    await before.manager.acquire(KEY)
    after = await w.node("a", boot="boot-2")
    await after.manager.release(KEY)
    await until(lambda: before.manager.locks[KEY.id].holder == "", before)
    before.export_state = ExportState.UNLISTED  # it has the device itself
    assert (await before.manager.acquire(KEY)).epoch == 2


@on_world
async def test_one_of_two_machines_of_a_name_takes_a_lock_and_the_other_waits_for_its_import(w: World) -> None:
    for number in range(20):
        key = DeviceKey(KEY.server, f"7-{number}")
        machines = [await w.node("a", boot=boot) for boot in ("boot-1", "boot-2")]
        for one in machines:
            one.export_state = ExportState.FREE  # the winner has not imported it yet
        if number % 2:  # the lock was held before
            await machines[0].manager.acquire(key)
            await machines[0].manager.release(key)
            await until(partial(machines[1].manager.locks.__contains__, key.id), machines[1])
        results = await asyncio.gather(*(one.manager.acquire(key) for one in machines), return_exceptions=True)
        assert [isinstance(one, LockHeld) for one in results].count(True) == 1, results
        loser = machines[isinstance(results[1], LockHeld)]
        await loser.clock.sleep(2 * loser.manager.settings.import_window)
        assert (await loser.manager.acquire(key)).epoch == 2 + number % 2
        for one in machines:
            await one.stop()


@on_world
async def test_a_lock_of_an_earlier_boot_that_is_read_before_the_first_list_shows_no_living_machine(w: World) -> None:
    await (await rebooted(w)).stop()
    after = await w.node("a", boot="boot-2", listing=5.0)
    after.export_state = ExportState.UNLISTED
    with pytest.raises(LockHeld):
        await after.manager.acquire(KEY)
    assert not after.manager.ready.is_set()
    after.export_state = ExportState.FREE
    assert (await after.manager.acquire(KEY)).epoch == 2
    assert not after.manager.ready.is_set()


@on_world
async def test_a_lock_that_a_living_machine_of_the_nodes_name_takes_is_not_this_nodes(w: World) -> None:
    old, new = await w.node("a", boot="boot-1"), await w.node("a", boot="boot-2")
    await old.manager.acquire(KEY)
    await until(lambda: KEY.id in new.manager.locks, new)
    assert new.manager.mine() == ()
    for new.export_state in ExportState:
        with pytest.raises(LockHeld):
            await new.manager.release(KEY)
    await old.manager.release(KEY)
    await until(lambda: new.manager.locks[KEY.id].holder == "", new)
    await new.manager.acquire(KEY)
    assert len(new.manager.mine()) == 1


def test_outdated_events_of_a_lock_that_this_boot_has_held_since_show_no_living_machine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @on_world
    async def story(w: World) -> None:
        before = await w.node("a", boot="boot-1")
        await before.manager.acquire(KEY)
        w.backend.delete(KEY.id, w.backend.leases[KEY.id].resource_version)
        await until(lambda: KEY.id not in before.manager.locks, before)
        await before.manager.acquire(KEY)
        await before.stop()
        after = await w.node("a", boot="boot-2")
        after.export_state = ExportState.FREE
        assert (await after.manager.acquire(KEY)).epoch == 2
        seen: list[LockChange] = []
        after.manager.subscribe(seen.append)
        after.store.replay(10)
        await until(lambda: any(change.old is None for change in seen), after)
        assert seen[-1].new is not None
        assert seen[-1].new.boot_id == "boot-1"

    story()
    assert "another machine has this node's name" not in caplog.messages


@on_world
async def test_a_lock_left_under_another_boot_is_taken_for_a_device_that_is_attached_here(w: World) -> None:
    after = await rebooted(w)
    await after.manager.release(KEY)
    after.export_state = ExportState.UNLISTED
    assert (await after.manager.acquire(KEY, attached=True)).epoch == 2


@on_held_world
async def test_heartbeats_keep_a_lock(w: World) -> None:
    _, b = w.nodes
    b.manager.expiry.set_importable(frozenset({KEY.id}))
    await b.clock.sleep(3600)
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)


@on_held_world
async def test_a_holder_that_returns_before_a_takeover_keeps_its_lock(w: World) -> None:
    a, b = w.nodes
    a.fate = unreachable
    await expire(b)
    a.fate = lambda _operation: FINE
    await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.HELD, b)
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)


@on_held_world
async def test_a_session_is_read_rarely_after_its_lock_has_expired(w: World) -> None:
    a, b = w.nodes
    await a.stop()
    reads = 0

    def count(operation: Operation) -> Fate:
        nonlocal reads
        reads += operation.verb == "get"
        return FINE

    b.fate = count
    await expire(b)
    assert reads <= 2 + 1 / BEAT_FRACTION
    reads = 0
    await b.clock.sleep(3600)
    assert 1 <= reads <= 3600 / (EXPIRED_BEATS * LockSettings().duration) + 1
    assert (await b.manager.acquire(KEY)).epoch == 2


@on_held_world
async def test_a_takeover_reads_the_session_once_more(w: World) -> None:
    a, b = w.nodes
    await a.clock.sleep(1)
    await a.stop()
    await expire(b)
    session = w.backend.leases[record.session_name("a")]
    w.backend.replace(dataclasses.replace(session, transitions=9))
    assert b.manager.lock_status(KEY.id) is LockStatus.EXPIRED
    with pytest.raises(LockHeld):
        await b.manager.acquire(KEY)
    assert w.backend.leases[KEY.id].holder == "a"


@on_held_world
async def test_a_node_without_locks_writes_nothing(w: World) -> None:
    a, b = w.nodes
    await b.clock.sleep(1000)
    assert b.writes() == []
    beats = [call for call in a.writes() if call.name == record.session_name("a")]
    assert 95 <= len(beats) <= 105
    await a.manager.release(KEY)
    written = len(a.writes())
    await a.clock.sleep(1000)
    assert len(a.writes()) == written


@on_node
async def test_the_first_heartbeat_does_not_delay_the_lock_write(a: Node) -> None:
    a.fate = lambda operation: Fate(lost=Lost.REQUEST) if operation.name == record.session_name("a") else FINE
    start = a.clock.monotonic()
    await a.manager.acquire(KEY)
    assert a.clock.monotonic() - start < 1
    assert Operation("a", "get", record.session_name("a")) in a.calls


@on_node
async def test_the_session_is_written_before_the_first_lock_names_this_node(a: Node) -> None:
    a.fate = lambda operation: Fate(request=3.0) if operation.name == KEY.id else FINE
    taking = asyncio.create_task(a.manager.acquire(KEY))
    await a.clock.sleep(1)
    assert KEY.id not in a.stored
    assert a.stored[record.session_name("a")].holder == "a"
    await taking


@on_world
async def test_a_restart_continues_the_session_and_a_reboot_begins_one(w: World) -> None:
    name = record.session_name("a")
    for boot, epoch in (("boot-1", 1), ("boot-1", 1), ("boot-2", 2)):
        a = await w.node("a", boot, seed=epoch)
        await a.manager.acquire(KEY)
        await a.clock.sleep(30)
        assert w.backend.leases[name].transitions == epoch
        assert w.backend.leases[name].annotations[record.BOOT_ID] == boot
        await a.stop()


@pytest.mark.parametrize("verb", ["create", "update"])
@pytest.mark.parametrize("fate", [Fate(lost=Lost.RESPONSE), Fate(broken=KubeServerError("update", RESOURCE, "eof"))])
@on_node
async def test_an_unanswered_write_is_recognized_as_its_own(a: Node, verb: str, fate: Fate) -> None:
    if verb == "update":
        await a.manager.acquire(KEY)
        await a.manager.release(KEY)
    a.fate = once(verb, fate)
    grant = await a.manager.acquire(KEY)
    lease = a.stored[KEY.id]
    assert (lease.holder, grant.lock.resource_version) == ("a", lease.resource_version)
    assert grant.epoch == (2 if verb == "update" else 1)
    assert grant.import_deadline > a.clock.monotonic() + LockSettings().import_window / 2


@on_node
async def test_an_unanswered_release_is_recognized(a: Node) -> None:
    await a.manager.acquire(KEY)
    a.fate = once("update", Fate(lost=Lost.RESPONSE))
    await a.manager.release(KEY)
    assert a.stored[KEY.id].holder == ""


@on_node
async def test_no_lock_is_granted_without_the_api_server(a: Node) -> None:
    a.fate = unreachable
    with pytest.raises(LockUnavailable):
        await a.manager.acquire(KEY)
    assert a.stored == {}


@on_node
async def test_a_forbidden_write_names_verb_and_resource(a: Node) -> None:
    a.fate = once("create", Fate(refused=KubeForbidden("create", RESOURCE, "no")))
    with pytest.raises(LockUnavailable, match=f"create {RESOURCE}"):
        await a.manager.acquire(KEY)


@on_node
async def test_a_write_that_lands_after_its_acquire_was_cancelled_is_undone(a: Node) -> None:
    a.fate = once("create", Fate(request=30.0))
    await given_up(a)
    await until(lambda: KEY.id in a.manager.locks and a.manager.locks[KEY.id].holder == "", a)
    assert [change.new.holder for change in a.changes if change.new] == ["a", ""]


@on_world
async def test_a_lock_from_a_cancelled_acquire_is_not_adopted(w: World) -> None:
    a = await given_up_and_unreachable(w)
    assert a.manager.locks[KEY.id].holder == "a"
    assert a.manager.mine() == ()
    a.fate = lambda _operation: FINE
    await until(lambda: a.manager.locks[KEY.id].holder == "", a)


@on_world
async def test_a_lock_from_a_cancelled_acquire_is_kept_after_a_renewal(w: World) -> None:
    a = await given_up_and_unreachable(w)
    a.fate = lambda _operation: FINE
    await a.manager.renew(KEY)
    assert [lock.device_id for lock in a.manager.mine()] == [KEY.id]
    await a.clock.sleep(100)
    assert w.backend.leases[KEY.id].holder == "a"


@on_world
async def test_a_lock_of_a_later_epoch_than_the_cancelled_acquire_is_kept(w: World) -> None:
    """The cancelled write never arrived, and another process of this node has acquired the lock."""
    late, other, successor = await w.node("a", seed=2), await w.node("b"), await w.node("a")
    late.fate = once("create", Fate(lost=Lost.REQUEST))
    await given_up(late)
    await other.manager.acquire(KEY)
    await other.manager.release(KEY)
    await until(lambda: KEY.id in successor.manager.locks, successor)
    await successor.manager.acquire(KEY)
    await until(lambda: late.manager.locks[KEY.id].holder == "a", late)
    await late.clock.sleep(100)
    assert (w.backend.leases[KEY.id].holder, w.backend.leases[KEY.id].transitions) == ("a", 2)
    assert [lock.device_id for lock in late.manager.mine()] == [KEY.id]


async def given_up_and_unreachable(w: World) -> Node:
    """Returns a node with the lock of a cancelled acquire, which cannot write but still sees events."""
    a = await w.node("a")
    a.fate = lambda operation: FINE if operation.verb == "event" else once("create", Fate(request=3.0))(operation)
    await given_up(a)
    a.fate = lambda operation: FINE if operation.verb in ("watch", "event") else unreachable(operation)
    await until(lambda: KEY.id in a.manager.locks, a)
    await a.clock.sleep(1)
    return a


@pytest.mark.parametrize(
    ("held_before", "attempts", "acquired_after"),
    [
        (False, [("create", Fate(request=30.0), True)], False),
        (False, [("create", Fate(response=3.0), False), ("update", Fate(response=3.0), True)], False),
        (False, [("create", Fate(response=3.0), False)], True),
        (True, [("update", Fate(request=2.0), False)], False),
    ],
    ids=["claimed", "claimed by a second attempt", "acquired again", "held before"],
)
@on_node
async def test_a_lock_is_kept_after_a_cancelled_acquire(
    a: Node, held_before: bool, attempts: list[tuple[str, Fate, bool]], acquired_after: bool
) -> None:
    """attempts: the verb and the fate of the write, and whether the acquire is for a claim."""
    if held_before:
        await a.manager.acquire(KEY)
    for verb, fate, claimed in attempts:
        a.fate = once(verb, fate)
        await given_up(a, claimed=claimed)
    if acquired_after:
        await a.manager.acquire(KEY)
    await a.clock.sleep(100)
    assert a.stored[KEY.id].holder == "a"


@on_world
async def test_a_lock_of_the_predecessor_that_is_found_by_a_conflict_is_kept(w: World) -> None:
    """A process without a view finds the lock by a conflict, and its next write stays unanswered."""
    late = await w.node("a", seed=2)
    late.fate = lambda operation: Fate(response=30.0) if operation.verb in ("event", "update") else FINE
    first = await w.node("a")
    await first.manager.acquire(KEY)
    await first.stop()
    assert KEY.id not in late.manager.locks
    await given_up(late)
    late.fate = lambda _operation: FINE
    await late.clock.sleep(100)
    assert w.backend.leases[KEY.id].holder == "a"


@on_node
async def test_a_slow_write_for_one_device_does_not_delay_another_device(a: Node) -> None:
    a.fate = lambda operation: Fate(request=4.0) if operation.name == KEY.id else FINE
    start = a.clock.monotonic()
    async with asyncio.TaskGroup() as group:
        slow = group.create_task(a.manager.acquire(KEY))
        await a.manager.acquire(OTHER_KEY)
        assert a.clock.monotonic() - start < 1
        assert not slow.done()


@on_node
async def test_reachability_is_reported_with_its_reason_and_does_not_flap(a: Node) -> None:
    await a.clock.sleep(10)
    assert a.manager.api.reachable
    states: list[ApiState] = []
    a.manager.subscribe_api(states.append)
    a.fate = lambda op: unreachable(op) if op.verb in ("watch", "event") else FINE
    a.store.cut()
    await a.clock.sleep(60)
    # the list still works, so a broken watch at first counts as a reconnect, but only once
    assert [state.reachable for state in states] == [False, True, False]
    down = a.manager.api
    assert (down.reachable, down.error) == (False, states[-1].error)
    assert "watch" in (down.error or "")
    assert down.since <= a.clock.monotonic() - 59
    a.fate = lambda _operation: FINE
    await until(lambda: a.manager.api.reachable, a, 30)
    assert a.manager.api.since > down.since


@on_node
async def test_a_failed_call_leads_to_a_new_list(a: Node) -> None:
    a.fate = once("create", unreachable(Operation("a", "create", KEY.id)))
    lists = len([call for call in a.calls if call.verb == "list"])
    await a.manager.acquire(KEY)
    await a.clock.sleep(5)
    assert len([call for call in a.calls if call.verb == "list"]) == lists + 1
    assert a.manager.api.reachable


@on_held_world
async def test_changes_during_a_partition_are_seen_after_it(w: World) -> None:
    a, b = w.nodes
    b.fate = unreachable
    b.store.cut()
    await a.manager.release(KEY)
    await a.manager.acquire(OTHER_KEY)
    w.backend.compact()
    await b.clock.sleep(100)
    assert b.manager.lock_status(KEY.id) is LockStatus.HELD
    b.fate = lambda _operation: FINE
    await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.FREE, b, 30)
    await until(lambda: b.manager.lock_status(OTHER_KEY.id) is LockStatus.HELD, b, 30)


@on_held_world
async def test_a_deleted_lock_is_gone_on_every_node(w: World) -> None:
    a, b = w.nodes
    w.backend.delete(KEY.id, w.backend.leases[KEY.id].resource_version)
    await until(lambda: KEY.id not in b.manager.locks, b)
    with pytest.raises(LockLost):
        await a.manager.renew(KEY)
    assert (await b.manager.acquire(KEY)).lock.holder == "b"


@on_held_world
async def test_an_acquire_creates_a_lock_whose_deletion_was_not_seen(w: World) -> None:
    a, b = w.nodes
    await a.manager.release(KEY)
    await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.FREE, b)
    b.fate = lambda operation: Fate(response=60) if operation.verb == "event" else FINE
    w.backend.delete(KEY.id, w.backend.leases[KEY.id].resource_version)
    b.calls.clear()
    grant = await b.manager.acquire(KEY)
    assert [call.verb for call in b.calls if call.name == KEY.id] == ["update", "get", "create"]
    assert (grant.lock.holder, grant.epoch) == ("b", 1)
    assert w.backend.leases[KEY.id].holder == "b"


@on_node
async def test_without_its_namespace_a_lock_is_unavailable_at_once_with_the_reason(a: Node) -> None:
    a.fate = once("create", Fate(refused=KubeNotFound("create", RESOURCE, 'namespaces "usbip" not found')))
    with pytest.raises(LockUnavailable, match='namespaces "usbip" not found'):
        await a.manager.acquire(KEY)
    assert [call.verb for call in a.calls if call.name == KEY.id] == ["create"]


@on_node
async def test_the_serial_number_of_another_device_with_the_bus_id_is_cleared(a: Node) -> None:
    await a.manager.acquire(KEY, LockMeta(usb_id="0951:1666", identity=IDENTITY))
    await a.manager.release(KEY)
    grant = await a.manager.acquire(KEY, LockMeta(usb_id="1050:0407"))
    assert (str(grant.lock.usb_id), grant.lock.identity) == ("1050:0407", UNKNOWN_IDENTITY)


@on_world
async def test_an_identity_on_a_lock_is_of_one_device(w: World) -> None:
    vendor = (InterfaceClass(0xFF, 0, 0),)
    a = await w.node("a")
    await a.manager.acquire(KEY, LockMeta(usb_id="0951:1666", identity=IDENTITY))
    lock = await a.manager.annotate(KEY, identity=Identity(IDENTITY.devid, interfaces=vendor))
    assert lock.identity == Identity(IDENTITY.devid, "S1", vendor), "more of one device"
    lock = await a.manager.annotate(KEY, identity=Identity(IDENTITY.devid, "S2"))
    assert lock.identity == Identity(IDENTITY.devid, "S2"), "another device with the same number"
    lock = await a.manager.annotate(KEY, identity=Identity(1 << 16 | 9, interfaces=vendor))
    assert lock.identity == Identity(1 << 16 | 9, None, vendor), "another device"
    await a.manager.release(KEY)
    assert (await (await w.node("b")).manager.acquire(KEY)).lock.identity == lock.identity, "any holder"


@on_node
async def test_annotations_that_are_not_given_stay(a: Node) -> None:
    await a.manager.acquire(KEY, LockMeta(identity=IDENTITY))
    await a.manager.annotate(KEY, port=4, pod=POD)
    lock = await a.manager.annotate(KEY, port=5)
    assert (lock.port, lock.serial, lock.pod) == (5, "S1", POD)


@on_world
async def test_exactly_one_of_many_acquires_succeeds_each_time(w: World) -> None:
    nodes = [await w.node(name) for name in "abcdef"]
    for _ in range(50):
        results = await asyncio.gather(*(node.manager.acquire(KEY) for node in nodes), return_exceptions=True)
        (winner,) = [i for i, result in enumerate(results) if not isinstance(result, BaseException)]
        await nodes[winner].manager.release(KEY)
    assert w.backend.leases[KEY.id].holder == ""
    assert w.backend.leases[KEY.id].transitions == 50


def test_an_import_window_of_half_the_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="half"):
        LockSettings(duration=20.0, import_window=10.0)
    LockSettings(duration=20.1, import_window=10.0)


@pytest.mark.parametrize("bump", [0, 1_000_000_000])
def test_after_a_restore_of_etcd_every_node_agrees_with_the_api_server(bump: int) -> None:
    @on_world
    async def story(w: World) -> None:
        a, b = await w.node("a"), await w.node("b")
        await b.manager.acquire(OTHER_KEY)
        free = w.backend.backup()
        await a.manager.acquire(KEY)
        await b.manager.release(OTHER_KEY)
        await until(lambda: {lock.holder for lock in a.manager.locks.values()} == {"a", ""}, a)
        w.backend.restore(free, bump)
        for node in (a, b):
            await until(lambda node=node: KEY.id not in node.manager.locks, node, seconds=10.0)  # type: ignore[misc]
            assert node.manager.locks[OTHER_KEY.id].holder == "b"
            assert node.manager.locks.keys() == {OTHER_KEY.id}
        assert (await a.manager.acquire(KEY)).epoch == 1, "nobody has it, by the restored Leases"
        await b.manager.release(OTHER_KEY)
        await until(lambda: not b.manager.mine() and KEY.id in b.manager.locks, b)
        assert (await a.manager.acquire(OTHER_KEY)).epoch == 2

    story()


@on_held_world
async def test_a_hold_of_an_earlier_process_shows_that_a_lock_was_set_back(w: World) -> None:
    a, b = w.nodes
    await a.manager.release(KEY)
    await b.manager.acquire(KEY)
    await until(lambda: a.manager.locks[KEY.id].holder == "b", a)
    uid, epoch = w.backend.leases[KEY.id].uid, w.backend.leases[KEY.id].transitions
    a.manager.remember(KEY.id, Tenure(uid, epoch - 1))
    assert not a.manager.is_set_back(KEY.id), "b has taken it since"
    for later in (epoch + 5, epoch - 1):  # the earlier one changes nothing
        a.manager.remember(KEY.id, Tenure(uid, later))
        assert a.manager.is_set_back(KEY.id)
    a.manager.remember(KEY.id, Tenure("of another Lease", epoch + 6))
    assert a.manager.tenure(KEY.id) == Tenure(uid, epoch + 5)
    assert (await a.manager.acquire(KEY, attached=True)).lock.holder == "a"


@on_held_world
async def test_a_lock_that_was_deleted_and_taken_by_another_node_is_not_taken_back(w: World) -> None:
    a, b = w.nodes
    await a.manager.release(KEY)
    assert (await a.manager.acquire(KEY)).epoch == 2
    w.backend.delete(KEY.id, w.backend.leases[KEY.id].resource_version)
    assert (await b.manager.acquire(KEY)).epoch == 1
    await until(lambda: a.manager.locks[KEY.id].holder == "b", a)
    assert not a.manager.is_set_back(KEY.id)
    with pytest.raises(LockHeld, match="held by node b"):
        await a.manager.acquire(KEY, attached=True)


@on_held_world
async def test_a_writer_with_a_record_from_before_a_restore_finds_the_present_one_by_its_conflict(w: World) -> None:
    a, _b = w.nodes
    held = w.backend.backup()
    await a.manager.release(KEY)
    w.backend.restore(held, 1_000_000_000)
    a.fate = lambda operation: (
        Fate(refused=KubeServerError("list", RESOURCE, "not yet")) if operation.verb == "list" else FINE
    )
    await a.manager.release(KEY)
    assert w.backend.leases[KEY.id].holder == "", "read by itself: no list has succeeded since"
