"""The fence: a device is exported only to where the holder of its lock connects from."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest

from tests.rigs.tasks import background, virtual_with
from usbip_plugin.config.export import WhenApiIsAway
from usbip_plugin.errors import KubeForbidden, KubeUnreachable
from usbip_plugin.exporter.fence import READ_S, LeaseGate, decide_import, may_keep
from usbip_plugin.locks.kept import MAX_KEPT
from usbip_plugin.locks.protocol import LockMeta, Write, decide_acquire, released
from usbip_plugin.locks.record import BY_HAND, Lease
from usbip_plugin.model import DeviceKey, Endpoint, Lock, NodeIdentity, ServerKey
from usbip_sim.leases import FINE, Fate, Lost, MemoryBackend, MemoryLeases, Operation
from usbip_sim.virtual.loop import SimClock

PI, PI_BY_ADDRESS, LAPTOP = ServerKey("pi"), ServerKey("10.0.0.5"), ServerKey("laptop")
KEY = DeviceKey(PI, "1-1")
A, B = Endpoint("10.0.0.1", 40001), Endpoint("10.0.0.2", 40001)
UNREACHABLE = Fate(refused=KubeUnreachable("get", "leases", "connection refused"))


def lock(holder: str = "", import_from: Endpoint | None = None) -> Lock:
    return Lock(KEY.id, holder, 1, 40.0, "1", key=KEY, import_from=import_from)


# decisions


def test_the_holder_imports_from_the_address_and_port_on_its_lock() -> None:
    held = lock("node-a", A)
    assert decide_import([held], A) is None
    for peer in (B, replace(A, port=A.port + 1)):
        refusal = decide_import([held], peer)
        assert refusal is not None
        assert refusal.reason == "its lock is held by node-a (10.0.0.1:40001)"


@pytest.mark.parametrize(
    ("locks", "reason"),
    [
        ([], "no lock names it; add this host to names as the plugins' configuration names it"),
        ([lock("", A)], "nobody holds its lock"),
        ([lock("node-a")], "its lock is held by node-a (its plugin does not write from where it connects)"),
    ],
    ids=["no lock", "released", "a plugin that writes no endpoint"],
)
def test_nobody_imports_without_a_lock_that_names_the_connection(locks: list[Lock], reason: str) -> None:
    refusal = decide_import(locks, A)
    assert refusal is not None
    assert refusal.reason == reason


def test_any_lock_of_a_device_that_has_several_names_admits_its_holder() -> None:
    assert decide_import([lock("node-b", B), lock("node-a", A)], A) is None


@pytest.mark.parametrize(
    ("locks", "stays"),
    [
        ([lock("node-a", A)], True),
        ([lock("node-b", B)], False),
        ([lock("", B)], True),
        ([], True),
        ([lock("node-b")], True),
        ([lock("node-b", B), lock("node-a", A)], True),
        ([lock("node-b", B), lock("", A)], False),
        ([replace(lock("", A), by_hand=True)], False),
        ([replace(lock("", B), by_hand=True)], True),
    ],
    ids=[
        "its lock",
        "another's lock",
        "empty",
        "none",
        "no endpoint",
        "two names",
        "two names, one empty",
        "released by a person",
        "another's, released by a person",
    ],
)
def test_a_connection_ends_when_a_holder_connects_from_elsewhere_or_a_person_releases_the_lock(
    locks: list[Lock], stays: bool
) -> None:
    assert may_keep(locks, A) is stays


# the gate


@dataclass
class Rig:
    """A gate on Leases in memory. calls: its API calls. told: bus IDs that it told its subscriber."""

    backend: MemoryBackend
    store: MemoryLeases
    clock: SimClock
    gate: LeaseGate
    fate: Callable[[Operation], Fate] = lambda _operation: FINE
    calls: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def take(self, node: str, origin: Endpoint | None, key: DeviceKey = KEY) -> None:
        """Takes a lock for a node, whoever holds it."""
        write = Write(NodeIdentity(node, f"boot of {node}"), self.clock.now(), "mark", 40.0)
        before = self.backend.leases.get(key.id)
        free, meta = replace(before, holder="") if before else None, LockMeta(import_from=origin)
        taken = decide_acquire(free, key, meta, write, None, importable=True).lease
        assert taken is not None
        self.backend.replace(taken) if before else self.backend.create(taken)

    def release(self, key: DeviceKey = KEY, *, by_hand: bool = False) -> None:
        write = Write(NodeIdentity("", ""), self.clock.now(), BY_HAND if by_hand else "mark", 0.0)
        self.backend.replace(released(self.backend.leases[key.id], write).lease)

    async def admitted(self, peer: Endpoint, busid: str = "1-1") -> bool:
        return await self.gate.admits(busid, peer) is None

    async def watched(self) -> None:
        """Lets the watch bring everything that has happened."""
        await asyncio.sleep(0.01)


def rig(when_away: WhenApiIsAway = WhenApiIsAway.REFUSE) -> Callable[[], contextlib.AbstractAsyncContextManager[Rig]]:
    @contextlib.asynccontextmanager
    async def made() -> AsyncIterator[Rig]:
        backend, clock = MemoryBackend(), SimClock(asyncio.get_running_loop())
        this: Rig

        def fate(operation: Operation) -> Fate:
            this.calls.append(operation.verb)
            return this.fate(operation)

        store = MemoryLeases(backend, clock, "exporter", fate)
        own = {PI, PI_BY_ADDRESS}
        gate = LeaseGate(store, own.__contains__, when_away, clock, random.Random(1))
        this = Rig(backend, store, clock, gate)
        gate.subscribe(this.told.append)
        async with background(gate.run()):
            await asyncio.sleep(3)
            yield this

    return made


on_gate = virtual_with(rig())
on_open_gate = virtual_with(rig(WhenApiIsAway.SERVE))


@on_gate
async def test_the_holder_is_admitted_by_one_read_though_the_exporter_has_two_names(rig: Rig) -> None:
    rig.take("node-b", B, DeviceKey(PI_BY_ADDRESS, "1-2"))
    rig.take("node-a", A)
    await rig.watched()
    rig.calls.clear()
    assert await rig.admitted(A)
    assert rig.calls == ["get"]
    assert rig.gate.problem() is None


@on_gate
async def test_a_late_import_is_refused_and_the_new_holder_admitted_though_the_watch_lags(rig: Rig) -> None:
    rig.take("node-a", A)
    await rig.watched()
    rig.store.stall()
    rig.take("node-b", B)
    assert not await rig.admitted(A)
    assert await rig.admitted(B)


@on_gate
async def test_the_read_for_an_import_ends_the_connection_of_the_former_holder(rig: Rig) -> None:
    rig.take("node-a", A)
    assert await rig.admitted(A)
    rig.store.stall()
    rig.take("node-b", B)
    rig.told.clear()
    assert rig.gate.may_stay("1-1", A)
    assert await rig.admitted(B)
    assert rig.told == ["1-1"]
    assert not rig.gate.may_stay("1-1", A)


@on_gate
async def test_the_watch_ends_the_connection_of_the_former_holder(rig: Rig) -> None:
    rig.take("node-a", A)
    assert await rig.admitted(A)
    rig.told.clear()
    rig.take("node-b", B)
    await rig.watched()
    assert rig.told == ["1-1"]
    assert not rig.gate.may_stay("1-1", A)
    assert rig.gate.may_stay("1-2", A)


@on_gate
async def test_a_lock_that_is_emptied_or_deleted_ends_nothing(rig: Rig) -> None:
    rig.take("node-a", A)
    assert await rig.admitted(A)
    rig.release()
    await rig.watched()
    assert rig.gate.may_stay("1-1", A)
    assert not await rig.admitted(A)
    rig.backend.delete(KEY.id, rig.backend.leases[KEY.id].resource_version)
    await rig.watched()
    assert rig.gate.may_stay("1-1", A)
    assert not await rig.admitted(A)


@pytest.mark.parametrize("bump", [0, 1000])
@pytest.mark.parametrize("by_hand", [False, True])
@on_gate
async def test_a_lock_that_a_restore_sets_back_ends_nothing_until_somebody_takes_it(
    rig: Rig, bump: int, by_hand: bool
) -> None:
    rig.take("node-b", B)
    if by_hand:
        rig.take("node-a", A)
        rig.release(by_hand=True)
    backup = rig.backend.backup()
    rig.take("node-a", A)
    assert await rig.admitted(A)
    rig.backend.restore(backup, bump)
    rig.store.cut()
    await asyncio.sleep(20)
    assert rig.gate._cache.locks[KEY.id].epoch == 1 + by_hand, "the gate has seen it"
    assert rig.gate.may_stay("1-1", A)
    rig.take("node-b", B)
    await rig.watched()
    assert not rig.gate.may_stay("1-1", A)


@on_gate
async def test_a_takeover_that_a_list_brings_ends_the_connection_of_the_former_holder(rig: Rig) -> None:
    rig.take("node-a", A)
    assert await rig.admitted(A)
    rig.fate = lambda _operation: UNREACHABLE
    rig.store.cut()
    rig.take("node-b", B)
    rig.fate = lambda _operation: FINE
    rig.backend.compact()
    await asyncio.sleep(20)
    assert not rig.gate.may_stay("1-1", A)


@on_gate
async def test_the_first_lock_of_a_device_is_waited_for(rig: Rig) -> None:
    asyncio.get_running_loop().call_later(0.5, rig.take, "node-a", A)
    assert await rig.admitted(A)
    began = rig.clock.monotonic()
    assert not await rig.admitted(A, "1-7")
    assert rig.clock.monotonic() - began <= READ_S


@on_gate
async def test_each_name_of_the_exporter_has_a_lock_and_other_servers_have_none(rig: Rig) -> None:
    rig.take("node-a", A, DeviceKey(PI, "1-1"))
    rig.take("node-b", B, DeviceKey(PI_BY_ADDRESS, "1-2"))
    rig.take("node-b", B, DeviceKey(LAPTOP, "1-1"))
    await rig.watched()
    rig.store.stall()
    rig.take("node-a", A, DeviceKey(PI_BY_ADDRESS, "1-3"))
    assert await rig.admitted(A, "1-1")
    assert await rig.admitted(B, "1-2")
    assert not await rig.admitted(B, "1-1")
    assert {lock.key.server for lock in rig.gate._cache.locks.values() if lock.key} == {PI, PI_BY_ADDRESS}
    rig.store.resume()
    await rig.watched()
    assert await rig.admitted(A, "1-3")


@on_gate
async def test_any_number_of_locks_of_other_servers_leaves_room_for_its_own(rig: Rig) -> None:
    last_in_list = max((DeviceKey(PI, f"1-{port}") for port in range(1, 100)), key=lambda key: key.id)
    rig.store.cut()
    for number in range(2 * MAX_KEPT):
        rig.take("node-b", B, DeviceKey(ServerKey(f"other-{number}"), "1-1"))
    rig.take("node-a", A, last_in_list)
    await asyncio.sleep(60)
    assert [lock.key for lock in rig.gate._cache.locks.values()] == [last_in_list]


@on_gate
async def test_a_connection_of_unknown_origin_stays(rig: Rig) -> None:
    rig.take("node-a", A)
    await rig.watched()
    assert rig.gate.may_stay("1-1", None)


@pytest.mark.parametrize(
    "fate",
    [UNREACHABLE, Fate(lost=Lost.REQUEST), Fate(refused=KubeForbidden("get", "leases", "no right"))],
    ids=["unreachable", "silent", "forbidden"],
)
@on_gate
async def test_without_the_api_server_exports_go_on_and_imports_are_refused(rig: Rig, fate: Fate) -> None:
    rig.take("node-a", A)
    assert await rig.admitted(A)
    rig.fate = lambda _operation: fate
    rig.store.cut()
    began = rig.clock.monotonic()
    refusal = await rig.gate.admits("1-1", A)
    assert refusal is not None
    assert refusal.reason.startswith("its lock cannot be read: ")
    assert rig.clock.monotonic() - began <= READ_S
    assert rig.gate.may_stay("1-1", A)
    assert (rig.gate.problem() or "").endswith("; imports are refused")
    rig.fate = lambda _operation: FINE
    await asyncio.sleep(20)
    assert rig.gate.problem() is None
    assert await rig.admitted(A)


@on_gate
async def test_after_a_read_that_failed_the_locks_are_listed_again(rig: Rig) -> None:
    rig.take("node-a", A)
    await rig.watched()
    rig.fate = lambda operation: UNREACHABLE if operation.verb == "get" else FINE
    assert not await rig.admitted(A)
    assert rig.gate.problem() is not None
    rig.fate = lambda _operation: FINE
    await asyncio.sleep(5)
    assert rig.gate.problem() is None


@on_open_gate
async def test_what_is_served_without_the_api_server_is_verified_when_it_is_back(rig: Rig) -> None:
    rig.take("node-a", A)
    await rig.watched()
    rig.fate = lambda _operation: UNREACHABLE
    rig.store.cut()
    assert await rig.admitted(B)
    assert (rig.gate.problem() or "").endswith("; imports are granted to everybody")
    assert rig.gate.may_stay("1-1", B)
    await asyncio.sleep(60)
    assert rig.gate.may_stay("1-1", B)
    rig.told.clear()
    rig.fate = lambda _operation: FINE
    await asyncio.sleep(20)
    assert "1-1" in rig.told
    assert not rig.gate.may_stay("1-1", B)
    assert not await rig.admitted(B)


@on_gate
async def test_an_outage_is_one_line_in_the_log_and_its_end_another(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "usbip_plugin.exporter.fence")
    rig.fate = lambda _operation: UNREACHABLE
    rig.store.cut()
    for _ in range(3):
        assert not await rig.admitted(A)
        await asyncio.sleep(10)
    rig.fate = lambda _operation: FINE
    await asyncio.sleep(20)
    lines = [one for one in caplog.records if one.name == "usbip_plugin.exporter.fence"]
    assert [one.getMessage() for one in lines] == ["locks cannot be read", "locks can be read again"]
    assert lines[0].__dict__["imports"] == "refuse"


@on_gate
async def test_a_lease_that_does_not_name_its_device_admits_nobody(rig: Rig) -> None:
    rig.take("node-a", A)
    await rig.watched()
    wrong: Lease = rig.backend.leases[KEY.id]
    rig.backend.replace(replace(wrong, annotations={**wrong.annotations, "usbip.dev/busid": "1-9"}))
    assert not await rig.admitted(A)
