"""The lock manager: who gets a lock, what the others see, and what faults of the API server do to it."""

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from tests.unit.locks.lock_harness import KEY, OTHER, Node, World, given_up, held, unreachable, until, world
from usbip_plugin.errors import KubeForbidden, KubeNotFound, KubeServerError, LockHeld, LockLost, LockUnavailable
from usbip_plugin.locks import record
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.protocol import LockMeta, LockStatus
from usbip_plugin.locks.session import BEAT_FRACTION, EXPIRED_BEATS
from usbip_plugin.locks.watch import ApiState
from usbip_plugin.model import UNKNOWN_IDENTITY, Identity, InterfaceClass, PodRef
from usbip_sim.leases import FINE, Fate, Lost, Operation
from usbip_sim.virtual.loop import virtual

POD = PodRef("default", "reader", "uid-1")
RESOURCE = "leases.coordination.k8s.io"
TOLD = Identity(1 << 16 | 7, "S1")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def once(verb: str, fate: Fate) -> Callable[[Operation], Fate]:
    """The given fate for the next call with this verb on a lock, then none."""
    left = [fate]

    def decide(operation: Operation) -> Fate:
        lock = record.is_lock_name(operation.name)
        return left.pop() if left and operation.verb == verb and lock else FINE

    return decide


@virtual
async def test_one_wins_and_the_other_is_told_who() -> None:
    async with world() as w:
        a, b = await w.node("a"), await w.node("b")
        results = await asyncio.gather(
            a.manager.acquire(KEY, LockMeta(usb_id="0951:1666")), b.manager.acquire(KEY), return_exceptions=True
        )
        winner = next(r for r in results if not isinstance(r, BaseException))
        loser = next(r for r in results if isinstance(r, LockHeld))
        assert loser.holder == winner.lock.holder
        assert loser.device == str(KEY)
        assert w.backend.leases[KEY.id].holder == winner.lock.holder


@virtual
async def test_everyone_sees_a_lock_taken_and_released() -> None:
    async with world() as w:
        a, b = await w.node("a"), await w.node("b")
        await a.manager.acquire(KEY, LockMeta(usb_id="0951:1666", identity=TOLD, traceparent=TRACE))
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


@virtual
async def test_changes_come_once_each_in_order() -> None:
    async with held() as (_w, a, b):
        await a.manager.annotate(KEY, port=1)
        await a.manager.release(KEY)
        await until(lambda: len(b.changes) == 3, b)
        await a.clock.sleep(1)
        for node in (a, b):
            assert [change.old for change in node.changes[1:]] == [change.new for change in node.changes[:-1]]
            assert [change.new.holder for change in node.changes if change.new] == ["a", "a", ""]


@virtual
async def test_the_deadline_counts_from_before_the_write_was_sent() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", Fate(request=1.0, response=2.0))
        before = a.clock.monotonic()
        grant = await a.manager.acquire(KEY)
        assert a.clock.monotonic() == pytest.approx(before + 3)
        assert grant.import_deadline == pytest.approx(before + LockSettings().import_window)


@virtual
async def test_a_reentrant_acquire_writes_again_and_keeps_the_epoch() -> None:
    async with world() as w:
        a = await w.node("a")
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


@virtual
async def test_another_boot_is_a_new_epoch_and_forgets_the_attachment() -> None:
    async with world() as w:
        old = await w.node("a", "boot-1")
        await old.manager.acquire(KEY)
        await old.manager.annotate(KEY, port=2, pod=POD)
        await old.stop()
        new = await w.node("a", "boot-2")
        assert new.manager.lock_status(KEY.id) is LockStatus.MINE
        with pytest.raises(LockLost):
            await new.manager.renew(KEY)
        grant = await new.manager.acquire(KEY)
        assert (grant.epoch, grant.lock.port, grant.lock.pod, grant.lock.boot_id) == (2, None, None, "boot-2")


@virtual
async def test_release_never_clears_somebody_elses_lock() -> None:
    async with world() as w:
        a, b = await w.node("a"), await w.node("b")
        await a.manager.acquire(KEY)  # which b need not have heard of
        await b.manager.release(KEY)
        assert w.backend.leases[KEY.id].holder == "a"
        await a.manager.release(KEY)
        await a.manager.release(KEY)
        await a.manager.release(OTHER)
        assert w.backend.leases[KEY.id].holder == ""
        assert OTHER.id not in w.backend.leases


@virtual
async def test_a_stolen_lock_is_lost() -> None:
    async with held() as (w, a, b):
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


@virtual
async def test_a_dead_holders_lock_expires_after_its_duration_and_can_be_taken() -> None:
    async with held() as (_w, a, b):
        await a.stop()
        start = b.clock.monotonic()
        with pytest.raises(LockHeld):
            await b.manager.acquire(KEY)
        await expire(b)
        assert LockSettings().duration <= b.clock.monotonic() - start <= LockSettings().duration * 1.3
        grant = await b.manager.acquire(KEY)
        assert (grant.lock.holder, grant.epoch) == ("b", 2)


@virtual
async def test_a_lock_whose_device_is_not_importable_never_expires() -> None:
    async with held() as (_w, a, b):
        await a.stop()
        await b.clock.sleep(3600)
        assert b.manager.lock_status(KEY.id) is LockStatus.HELD
        await expire(b)
        b.manager.expiry.set_importable(frozenset())
        assert b.manager.lock_status(KEY.id) is LockStatus.HELD
        with pytest.raises(LockHeld):
            await b.manager.acquire(KEY)


@virtual
async def test_one_device_becomes_importable_and_is_not_any_more_without_a_word_of_the_others() -> None:
    async with world() as w:
        a, b = await w.node("a"), await w.node("b")
        await a.manager.acquire(KEY)
        await a.manager.acquire(OTHER)
        await until(lambda: {KEY.id, OTHER.id} <= b.manager.locks.keys(), b)
        await a.stop()
        b.manager.expiry.set_importable(frozenset({OTHER.id}))
        await until(lambda: b.manager.lock_status(OTHER.id) is LockStatus.EXPIRED, b)
        assert b.manager.lock_status(KEY.id) is LockStatus.HELD
        began = b.clock.monotonic()
        b.manager.expiry.importable_changed(KEY.id, importable=True)
        await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.EXPIRED, b)
        assert b.clock.monotonic() - began <= LockSettings().duration * 1.3, "it is observed from then on"
        told: list[str] = []
        b.manager.subscribe(lambda change: told.append(change.device_id))
        b.manager.expiry.importable_changed(KEY.id, importable=False)
        assert told == [KEY.id]
        assert b.manager.lock_status(KEY.id) is LockStatus.HELD
        assert b.manager.lock_status(OTHER.id) is LockStatus.EXPIRED
        with pytest.raises(LockHeld):
            await b.manager.acquire(KEY)


@virtual
async def test_a_server_that_lists_the_device_no_more_is_asked_before_its_lock_is_taken() -> None:
    """A node that was stopped for longer than the duration: its last list is older than the other's attachment."""
    async with held() as (w, a, b):
        await a.stop()
        await expire(b)
        b.listed = False
        assert b.manager.lock_status(KEY.id) is LockStatus.EXPIRED
        with pytest.raises(LockHeld):
            await b.manager.acquire(KEY)
        assert w.backend.leases[KEY.id].holder == "a"
        b.listed = True
        assert (await b.manager.acquire(KEY)).epoch == 2


@virtual
async def test_a_heartbeat_keeps_a_lock_for_ever() -> None:
    async with held() as (_w, _a, b):
        b.manager.expiry.set_importable(frozenset({KEY.id}))
        await b.clock.sleep(3600)
        assert b.manager.lock_status(KEY.id) is LockStatus.HELD
        with pytest.raises(LockHeld):
            await b.manager.acquire(KEY)


@virtual
async def test_a_holder_that_comes_back_before_the_takeover_keeps_its_lock() -> None:
    async with held() as (_w, a, b):
        a.fate = unreachable
        await expire(b)
        a.fate = lambda _operation: FINE
        await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.HELD, b)
        with pytest.raises(LockHeld):
            await b.manager.acquire(KEY)


@virtual
async def test_a_session_is_read_a_few_times_until_a_lock_has_expired_and_seldom_afterwards() -> None:
    async with held() as (_w, a, b):
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


@virtual
async def test_the_session_is_read_again_right_before_a_takeover() -> None:
    async with held() as (w, a, b):
        await a.clock.sleep(1)
        await a.stop()
        await expire(b)
        session = w.backend.leases[record.session_name("a")]
        w.backend.replace(dataclasses.replace(session, transitions=9))
        assert b.manager.lock_status(KEY.id) is LockStatus.EXPIRED
        with pytest.raises(LockHeld):
            await b.manager.acquire(KEY)
        assert w.backend.leases[KEY.id].holder == "a"


@virtual
async def test_a_node_that_holds_nothing_writes_nothing() -> None:
    async with held() as (_w, a, b):
        await b.clock.sleep(1000)
        assert b.writes() == []
        beats = [call for call in a.writes() if call.name == record.session_name("a")]
        assert 95 <= len(beats) <= 105
        await a.manager.release(KEY)
        written = len(a.writes())
        await a.clock.sleep(1000)
        assert len(a.writes()) == written


@virtual
async def test_the_first_heartbeat_goes_out_beside_the_lock_write() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = lambda operation: Fate(lost=Lost.REQUEST) if operation.name == record.session_name("a") else FINE
        start = a.clock.monotonic()
        await a.manager.acquire(KEY)
        assert a.clock.monotonic() - start < 1
        assert Operation("a", "get", record.session_name("a")) in a.calls


@virtual
async def test_the_session_is_written_before_the_first_lock_names_this_node() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = lambda operation: Fate(request=3.0) if operation.name == KEY.id else FINE
        taking = asyncio.create_task(a.manager.acquire(KEY))
        await a.clock.sleep(1)
        assert KEY.id not in w.backend.leases
        assert w.backend.leases[record.session_name("a")].holder == "a"
        await taking


@virtual
async def test_a_restart_continues_the_session_and_a_reboot_begins_one() -> None:
    async with world() as w:
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
@virtual
async def test_an_unanswered_write_is_recognised_as_ones_own(verb: str, fate: Fate) -> None:
    async with world() as w:
        a = await w.node("a")
        if verb == "update":
            await a.manager.acquire(KEY)
            await a.manager.release(KEY)
        a.fate = once(verb, fate)
        grant = await a.manager.acquire(KEY)
        lease = w.backend.leases[KEY.id]
        assert (lease.holder, grant.lock.resource_version) == ("a", lease.resource_version)
        assert grant.epoch == (2 if verb == "update" else 1)
        assert grant.import_deadline > a.clock.monotonic() + LockSettings().import_window / 2


@virtual
async def test_an_unanswered_release_is_recognised() -> None:
    async with world() as w:
        a = await w.node("a")
        await a.manager.acquire(KEY)
        a.fate = once("update", Fate(lost=Lost.RESPONSE))
        await a.manager.release(KEY)
        assert w.backend.leases[KEY.id].holder == ""


@virtual
async def test_an_unreachable_api_server_grants_nothing() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = unreachable
        with pytest.raises(LockUnavailable):
            await a.manager.acquire(KEY)
        assert w.backend.leases == {}


@virtual
async def test_a_forbidden_write_names_verb_and_resource() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", Fate(refused=KubeForbidden("create", RESOURCE, "no")))
        with pytest.raises(LockUnavailable, match=f"create {RESOURCE}"):
            await a.manager.acquire(KEY)


@virtual
async def test_a_write_that_lands_after_its_sender_gave_up_is_undone() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", Fate(request=30.0))
        await given_up(a)
        await until(lambda: KEY.id in a.manager.locks and a.manager.locks[KEY.id].holder == "", a)
        assert [change.new.holder for change in a.changes if change.new] == ["a", ""]


@virtual
async def test_a_claimed_lock_is_its_claims_whenever_the_write_lands() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", Fate(request=30.0))
        await given_up(a, claimed=True)
        await a.clock.sleep(100)
        assert w.backend.leases[KEY.id].holder == "a"


@virtual
async def test_a_lock_given_up_and_claimed_before_its_write_lands_is_not_undone() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", Fate(response=3.0))
        await given_up(a)
        a.fate = once("update", Fate(response=3.0))
        await given_up(a, claimed=True)
        await a.clock.sleep(100)
        assert w.backend.leases[KEY.id].holder == "a"


@virtual
async def test_a_lock_regained_after_giving_up_is_kept() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", Fate(response=3.0))
        await given_up(a)
        await a.manager.acquire(KEY)
        await a.clock.sleep(100)
        assert w.backend.leases[KEY.id].holder == "a"


@virtual
async def test_a_lock_given_up_is_nobodys_to_adopt_while_it_cannot_be_released() -> None:
    async with world() as w:
        a = await given_up_and_unreachable(w)
        assert a.manager.locks[KEY.id].holder == "a"
        assert a.manager.mine() == ()
        a.fate = lambda _operation: FINE
        await until(lambda: a.manager.locks[KEY.id].holder == "", a)


@virtual
async def test_a_lock_given_up_and_renewed_since_is_kept() -> None:
    """Found by the simulation: a claim had been made of it meanwhile, and its device attached."""
    async with world() as w:
        a = await given_up_and_unreachable(w)
        a.fate = lambda _operation: FINE
        await a.manager.renew(KEY)
        assert [lock.device_id for lock in a.manager.mine()] == [KEY.id]
        await a.clock.sleep(100)
        assert w.backend.leases[KEY.id].holder == "a"


@virtual
async def test_a_lock_of_a_later_epoch_than_the_one_given_up_is_kept() -> None:
    """The write that was given up never arrived. Another process of this node has taken the lock since."""
    async with world() as w:
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
    """A node whose write has landed after it had given up, and that cannot undo it: it only hears what happens."""
    a = await w.node("a")
    a.fate = lambda operation: FINE if operation.verb == "event" else once("create", Fate(request=3.0))(operation)
    await given_up(a)
    a.fate = lambda operation: FINE if operation.verb in ("watch", "event") else unreachable(operation)
    await until(lambda: KEY.id in a.manager.locks, a)
    await a.clock.sleep(1)
    return a


@virtual
async def test_a_cancelled_reentrant_acquire_does_not_give_the_lock_away() -> None:
    async with world() as w:
        a = await w.node("a")
        await a.manager.acquire(KEY)
        a.fate = once("update", Fate(request=2.0))
        await given_up(a)
        await a.clock.sleep(100)
        assert w.backend.leases[KEY.id].holder == "a"


@virtual
async def test_a_predecessors_lock_found_by_a_conflict_is_not_given_away() -> None:
    """A process that has not read the locks yet finds its predecessor's by a conflict, and is then given no answer."""
    async with world() as w:
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


@virtual
async def test_one_devices_slow_write_does_not_delay_another() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = lambda operation: Fate(request=4.0) if operation.name == KEY.id else FINE
        start = a.clock.monotonic()
        async with asyncio.TaskGroup() as group:
            slow = group.create_task(a.manager.acquire(KEY))
            await a.manager.acquire(OTHER)
            assert a.clock.monotonic() - start < 1
            assert not slow.done()


@virtual
async def test_reachability_is_told_with_its_reason_and_does_not_flap() -> None:
    async with world() as w:
        a = await w.node("a")
        await a.clock.sleep(10)
        assert a.manager.api.reachable
        states: list[ApiState] = []
        a.manager.subscribe_api(states.append)
        a.fate = lambda op: unreachable(op) if op.verb in ("watch", "event") else FINE
        a.store.cut()
        await a.clock.sleep(60)
        # The list still works, so a broken watch is at first taken for a mere reconnect; that happens once.
        assert [state.reachable for state in states] == [False, True, False]
        down = a.manager.api
        assert (down.reachable, down.error) == (False, states[-1].error)
        assert "watch" in (down.error or "")
        assert down.since <= a.clock.monotonic() - 59
        a.fate = lambda _operation: FINE
        await until(lambda: a.manager.api.reachable, a, 30)
        assert a.manager.api.since > down.since


@virtual
async def test_a_failed_call_makes_an_open_watch_suspect() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", unreachable(Operation("a", "create", KEY.id)))
        lists = len([call for call in a.calls if call.verb == "list"])
        await a.manager.acquire(KEY)
        await a.clock.sleep(5)
        assert len([call for call in a.calls if call.verb == "list"]) == lists + 1
        assert a.manager.api.reachable


@virtual
async def test_what_was_missed_during_a_partition_is_delivered_after_it() -> None:
    async with held() as (w, a, b):
        b.fate = unreachable
        b.store.cut()
        await a.manager.release(KEY)
        await a.manager.acquire(OTHER)
        w.backend.compact()
        await b.clock.sleep(100)
        assert b.manager.lock_status(KEY.id) is LockStatus.HELD
        b.fate = lambda _operation: FINE
        await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.FREE, b, 30)
        await until(lambda: b.manager.lock_status(OTHER.id) is LockStatus.HELD, b, 30)


@virtual
async def test_a_deleted_lock_is_gone_for_everyone() -> None:
    async with held() as (w, a, b):
        w.backend.delete(KEY.id, w.backend.leases[KEY.id].resource_version)
        await until(lambda: KEY.id not in b.manager.locks, b)
        with pytest.raises(LockLost):
            await a.manager.renew(KEY)
        assert (await b.manager.acquire(KEY)).lock.holder == "b"


@virtual
async def test_a_lock_that_was_deleted_unseen_is_created_by_the_next_acquire() -> None:
    async with held() as (w, a, b):
        await a.manager.release(KEY)
        await until(lambda: b.manager.lock_status(KEY.id) is LockStatus.FREE, b)
        b.fate = lambda operation: Fate(response=60) if operation.verb == "event" else FINE
        w.backend.delete(KEY.id, w.backend.leases[KEY.id].resource_version)
        b.calls.clear()
        grant = await b.manager.acquire(KEY)
        assert [call.verb for call in b.calls if call.name == KEY.id] == ["update", "get", "create"]
        assert (grant.lock.holder, grant.epoch) == ("b", 1)
        assert w.backend.leases[KEY.id].holder == "b"


@virtual
async def test_without_its_namespace_a_lock_is_unavailable_at_once_and_says_why() -> None:
    async with world() as w:
        a = await w.node("a")
        a.fate = once("create", Fate(refused=KubeNotFound("create", RESOURCE, 'namespaces "usbip" not found')))
        with pytest.raises(LockUnavailable, match='namespaces "usbip" not found'):
            await a.manager.acquire(KEY)
        assert [call.verb for call in a.calls if call.name == KEY.id] == ["create"]


@virtual
async def test_the_serial_of_another_device_under_the_same_bus_id_is_forgotten() -> None:
    async with world() as w:
        a = await w.node("a")
        await a.manager.acquire(KEY, LockMeta(usb_id="0951:1666", identity=TOLD))
        await a.manager.release(KEY)
        grant = await a.manager.acquire(KEY, LockMeta(usb_id="1050:0407"))
        assert (str(grant.lock.usb_id), grant.lock.identity) == ("1050:0407", UNKNOWN_IDENTITY)


@virtual
async def test_what_a_device_has_told_is_of_that_one_only() -> None:
    vendor = (InterfaceClass(0xFF, 0, 0),)
    async with world() as w:
        a = await w.node("a")
        await a.manager.acquire(KEY, LockMeta(usb_id="0951:1666", identity=TOLD))
        lock = await a.manager.annotate(KEY, identity=Identity(TOLD.devid, interfaces=vendor))
        assert lock.identity == Identity(TOLD.devid, "S1", vendor), "the same one says more"
        lock = await a.manager.annotate(KEY, identity=Identity(TOLD.devid, "S2"))
        assert lock.identity == Identity(TOLD.devid, "S2"), "another one, although its server gives it the same number"
        lock = await a.manager.annotate(KEY, identity=Identity(1 << 16 | 9, interfaces=vendor))
        assert lock.identity == Identity(1 << 16 | 9, None, vendor), "another one"
        await a.manager.release(KEY)
        assert (await (await w.node("b")).manager.acquire(KEY)).lock.identity == lock.identity, "whoever holds it"


@virtual
async def test_annotations_that_are_not_given_stay() -> None:
    async with world() as w:
        a = await w.node("a")
        await a.manager.acquire(KEY, LockMeta(identity=TOLD))
        await a.manager.annotate(KEY, port=4, pod=POD)
        lock = await a.manager.annotate(KEY, port=5)
        assert (lock.port, lock.serial, lock.pod) == (5, "S1", POD)


async def contend(w: World, nodes: list[Node], rounds: int) -> None:
    for _ in range(rounds):
        results = await asyncio.gather(*(node.manager.acquire(KEY) for node in nodes), return_exceptions=True)
        winners = [i for i, result in enumerate(results) if not isinstance(result, BaseException)]
        assert len(winners) == 1, results
        await nodes[winners[0]].manager.release(KEY)
    assert w.backend.leases[KEY.id].holder == ""
    assert w.backend.leases[KEY.id].transitions == rounds


@virtual
async def test_many_contend_and_exactly_one_wins_each_time() -> None:
    async with world() as w:
        await contend(w, [await w.node(name) for name in "abcdef"], 50)


def test_an_import_window_of_half_the_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="half"):
        LockSettings(duration=20.0, import_window=10.0)
    LockSettings(duration=20.1, import_window=10.0)
