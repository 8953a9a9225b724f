"""Locks that a node keeps in memory: those that it needs, and a bounded number of others, whoever writes how many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.unit.locks.lock_harness import World, on_world, until
from usbip_plugin.errors import LockHeld
from usbip_plugin.locks import record
from usbip_plugin.locks.kept import MAX_KEPT, MAX_OF_SERVER, IgnoredLocks, LockCounts, LockFilter, Verdict
from usbip_plugin.locks.record import LOCK_LABELS, ChangeType, Lease, LeaseChange, LeaseList
from usbip_plugin.locks.watch import LockCache
from usbip_plugin.model import DeviceKey, ServerKey

OURS, THEIRS = ServerKey("ours"), ServerKey("theirs")


def lock(server: ServerKey, number: int, holder: str = "evil") -> Lease:
    key = DeviceKey(server, f"9-{number}")
    return Lease(key.id, holder=holder, annotations=record.device_annotations(key), labels=LOCK_LABELS)


def locks(server: ServerKey, count: int, holder: str = "evil") -> Iterator[Lease]:
    return (replace(lock(server, number, holder), resource_version=str(number + 1)) for number in range(count))


def following(*servers: ServerKey, me: str = "", claimed: str = "") -> LockFilter:
    made = LockFilter(me, lambda device_id: device_id == claimed)
    made.servers = frozenset(servers)
    return made


def kept(cache: LockCache, *leases: Lease) -> int:
    keep = cache.begin_list()
    cache.reset(LeaseList(tuple(filter(keep, leases)), "1"))
    return len(cache.locks)


@pytest.mark.parametrize(
    ("lease", "verdict"),
    [
        (lock(OURS, 1), Verdict.KEEP),
        (lock(OURS, 1, ""), Verdict.KEEP),
        (lock(THEIRS, 1), Verdict.FOREIGN),
        (lock(THEIRS, 1, "me"), Verdict.KEEP),
        (lock(THEIRS, 7), Verdict.KEEP),
        (replace(lock(OURS, 1), name=lock(OURS, 2).name), Verdict.FOREIGN),
        (replace(lock(OURS, 1), annotations={}), Verdict.FOREIGN),
    ],
)
def test_a_lock_of_another_server_is_kept_only_if_it_is_the_nodes_or_the_node_has_a_claim(
    lease: Lease, verdict: Verdict
) -> None:
    made = following(OURS, me="me", claimed=lock(THEIRS, 7).name)
    assert made.verdict(lease, LockCounts(), known=False) is verdict


def test_of_each_server_a_bounded_number_is_kept_and_free_locks_displace_no_held_ones() -> None:
    cache = LockCache(lambda _change: None, following(OURS, THEIRS))
    free, held = locks(OURS, 3000, ""), (lock(OURS, number) for number in range(5000, 5010))
    assert kept(cache, *free, *held, *locks(THEIRS, 10)) == MAX_OF_SERVER + 20
    assert sum(one.holder != "" for one in cache.locks.values()) == 20
    assert cache.ignored == IgnoredLocks(excess=3000 - MAX_OF_SERVER)


def test_a_lock_that_is_kept_stays_kept_in_a_longer_list() -> None:
    cache = LockCache(lambda _change: None, following(OURS))
    first = tuple(locks(OURS, 20))
    kept(cache, *first)
    more = (lock(OURS, number) for number in range(9000, 9000 + MAX_OF_SERVER))
    assert kept(cache, *more, *first) == MAX_OF_SERVER
    assert {one.name for one in first} <= cache.locks.keys()


def test_locks_that_change_hands_make_no_room_without_an_end() -> None:
    cache = LockCache(lambda _change: None, following(OURS))
    version = 0
    for number in range(5 * MAX_OF_SERVER):
        for holder, kind in (("", ChangeType.ADDED), ("evil", ChangeType.MODIFIED)):
            version += 1
            changed = replace(lock(OURS, number, holder), resource_version=str(version))
            cache.apply(LeaseChange(kind, str(version), changed))
    assert len(cache.locks) <= 2 * MAX_OF_SERVER
    assert cache.ignored.excess == 5 * MAX_OF_SERVER - len(cache.locks)


def test_with_many_servers_the_number_of_all_is_bounded_and_each_has_its_share() -> None:
    servers = [ServerKey(f"server-{number}") for number in range(40)]
    cache = LockCache(lambda _change: None, following(*servers))
    flood = (one for server in servers[:-1] for one in locks(server, 300))
    assert kept(cache, *flood, *locks(servers[-1], 30)) <= 2 * MAX_KEPT
    assert sum(one.key is not None and one.key.server == servers[-1] for one in cache.locks.values()) == 30


def test_a_cache_of_all_servers_is_bounded_however_many_servers_locks_name() -> None:
    cache = LockCache(lambda _change: None)
    assert kept(cache, *(lock(ServerKey(f"server-{number}"), 1) for number in range(2 * MAX_KEPT))) == MAX_KEPT


def test_ignored_locks_are_counted_as_they_come_and_go() -> None:
    cache = LockCache(lambda _change: None, following(OURS))
    kept(cache, *locks(THEIRS, 10))
    assert cache.ignored == IgnoredLocks(foreign=10)
    for kind, version, count in (
        (ChangeType.ADDED, 50, 11),
        (ChangeType.MODIFIED, 51, 11),
        (ChangeType.DELETED, 52, 10),
    ):
        cache.apply(LeaseChange(kind, str(version), replace(lock(THEIRS, 77), resource_version=str(version))))
        assert cache.ignored == IgnoredLocks(foreign=count)
    assert not cache.locks


@on_world
async def test_a_node_keeps_no_lock_of_other_servers_and_lists_again_when_it_has_new_servers(w: World) -> None:
    a = await w.node("a")
    a.manager.follow(frozenset({OURS}))
    for lease in (*locks(OURS, 3, "b"), *locks(THEIRS, 2000, "b")):
        w.backend.create(lease)
    await until(lambda: len(a.manager.locks) == 3 and a.manager.ignored == IgnoredLocks(foreign=2000), a)
    both = frozenset({OURS, THEIRS})
    a.manager.follow(both)
    await a.manager.followed(both)
    assert len(a.manager.locks) == 3 + MAX_OF_SERVER
    assert a.manager.ignored == IgnoredLocks(excess=2000 - MAX_OF_SERVER)
    a.manager.follow(frozenset({OURS}))
    await a.manager.followed(frozenset({OURS}))


@on_world
async def test_a_lock_that_is_not_kept_is_found_by_the_write_that_wants_it(w: World) -> None:
    a, b = await w.node("a"), await w.node("b")
    a.manager.follow(frozenset({OURS}))
    for lease in locks(OURS, 2 * MAX_OF_SERVER):
        w.backend.create(lease)
    await until(lambda: a.manager.ignored.excess > 0, a)
    key = DeviceKey(OURS, "1-1")
    await b.manager.acquire(key)
    assert key.id not in a.manager.locks
    with pytest.raises(LockHeld, match="held by node b"):
        await a.manager.acquire(key)
    await b.manager.release(key)
    await until(lambda: a.manager.locks[key.id].holder == "", a)
    assert (await a.manager.acquire(key)).epoch == 2


@on_world
async def test_too_many_locks_are_logged_once_and_again_after_they_were_fewer(
    w: World, caplog: pytest.LogCaptureFixture
) -> None:
    a = await w.node("a")
    for lease in locks(OURS, MAX_OF_SERVER + 2):
        w.backend.create(lease)
    await until(lambda: a.manager.ignored.excess == 2, a)
    said = [record for record in caplog.records if record.getMessage() == "too many locks, some ignored"]
    assert [(one.ignored, one.kept) for one in said] == [(1, MAX_OF_SERVER)]  # type: ignore[attr-defined]
