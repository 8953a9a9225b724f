"""Faults of the lease store in memory: lost and late messages, cut watches, and compaction."""

import asyncio
from collections.abc import Callable

import pytest

from usbip_plugin.errors import KubeServerError, KubeUnreachable
from usbip_plugin.locks.record import ChangeType, Lease
from usbip_sim.leases import FINE, WATCH_IDLE_S, Fate, Lost, MemoryBackend, MemoryLeases, Operation
from usbip_sim.virtual.loop import SimClock, virtual


def store(backend: MemoryBackend, fate: Callable[[Operation], Fate] = lambda _o: FINE) -> MemoryLeases:
    return MemoryLeases(backend, SimClock(asyncio.get_running_loop()), "a", fate)


def always(fate: Fate) -> Callable[[Operation], Fate]:
    return lambda _operation: fate


@virtual
async def test_a_lost_request_does_not_happen_and_a_lost_response_does() -> None:
    for lost, happened in ((Lost.REQUEST, False), (Lost.RESPONSE, True)):
        backend = MemoryBackend()
        leases = store(backend, always(Fate(lost=lost)))
        with pytest.raises(KubeUnreachable):
            await leases.create(Lease("x"))
        assert ("x" in backend.leases) is happened


@virtual
async def test_refused_does_not_happen_and_broken_does() -> None:
    error = KubeServerError("create", "leases", "etcd")
    for fate, happened in ((Fate(refused=error), False), (Fate(broken=error), True)):
        backend = MemoryBackend()
        with pytest.raises(KubeServerError):
            await store(backend, always(fate)).create(Lease("x"))
        assert ("x" in backend.leases) is happened


@virtual
async def test_a_late_request_happens_after_its_sender_was_cancelled() -> None:
    backend = MemoryBackend()
    leases = store(backend, lambda _o: Fate(request=10.0))
    task = asyncio.create_task(leases.create(Lease("x")))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "x" not in backend.leases
    await asyncio.sleep(10)
    assert "x" in backend.leases


@virtual
async def test_a_cut_ends_open_watches_and_only_these() -> None:
    backend = MemoryBackend()
    leases = store(backend)
    broken = asyncio.create_task(anext(leases.watch({}, backend.version)))
    await asyncio.sleep(1)
    leases.cut()
    with pytest.raises(KubeUnreachable):
        await broken
    whole = asyncio.create_task(anext(leases.watch({}, backend.version)))
    backend.create(Lease("x"))
    assert (await whole).type is ChangeType.ADDED


@virtual
async def test_a_restore_ends_the_calls_under_way_and_no_later_ones() -> None:
    """A list of an API server that is gone would never bring what was restored: a watch from its version may go on."""
    backend = MemoryBackend()
    leases, backup = store(backend, always(Fate(response=2.0))), backend.backup()
    under_way = asyncio.create_task(leases.list({}))
    await asyncio.sleep(1)
    backend.restore(backup)
    with pytest.raises(KubeUnreachable):
        await under_way
    assert (await leases.list({})).items == ()


@virtual
async def test_a_swallowed_event_makes_the_watch_silent_until_it_is_given_up() -> None:
    backend = MemoryBackend()
    leases = store(backend, lambda o: Fate(lost=Lost.RESPONSE) if o.verb == "event" else FINE)
    task = asyncio.create_task(anext(leases.watch({}, backend.version)))
    await asyncio.sleep(1)
    backend.create(Lease("x"))
    await asyncio.sleep(WATCH_IDLE_S - 1)
    assert not task.done()
    with pytest.raises(KubeUnreachable):
        await task


@virtual
async def test_an_idle_watch_gets_bookmarks_and_ends_in_the_end() -> None:
    backend = MemoryBackend()
    kinds = [change.type async for change in store(backend).watch({}, backend.version)]
    assert set(kinds) == {ChangeType.BOOKMARK}
    assert len(kinds) == 5


@virtual
async def test_a_long_history_is_compacted() -> None:
    backend = MemoryBackend(history=3)
    start = int(backend.version)
    for i in range(5):
        backend.create(Lease(f"x{i}"))
    assert len(backend.since(start + 2, {})[0]) == 3
