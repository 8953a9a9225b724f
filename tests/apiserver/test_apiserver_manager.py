"""Lock managers on a real API server, with the rights of rbac/: contention, order, broken watches, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from opentelemetry.trace import NoOpTracer

from tests.apiserver.node_tokens import NodeTokens
from tests.apiserver.scaled_clock import ScaledClock
from tests.rigs.api_process import Cluster
from tests.rigs.tcp_proxy import proxy_to
from usbip_plugin.errors import LockHeld, LockUnavailable
from usbip_plugin.kube.client import connect
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import DeviceKey, NodeIdentity, ServerKey

pytestmark = pytest.mark.short

ROUNDS, LONG_ROUNDS = 50, 1000
TENURES, LONG_TENURES = 20, 200
# Real seconds after which what must happen counts as not happening.
PATIENCE_S = 60.0


@dataclass
class Node:
    manager: LockManager
    store: KubernetesLeases
    clock: ScaledClock


@contextlib.asynccontextmanager
async def node(cluster: Cluster, tokens: NodeTokens, server: str | None = None) -> AsyncIterator[Node]:
    """A manager that runs and has made its first list, with its node's token. server: another address of the API."""
    identity = NodeIdentity(f"n{uuid.uuid4().hex[:8]}", str(uuid.uuid4()))
    client = await connect(cluster.kubeconfig(await tokens.of(identity.node), server))
    store = KubernetesLeases(client, "usbip-system")
    clock = ScaledClock()
    manager = LockManager(store, identity, clock, random.Random(identity.node), LockSettings(), NoOpTracer())
    task = asyncio.create_task(manager.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await manager.ready.wait()
        yield Node(manager, store, clock)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await client.close()


async def until(manager: LockManager, condition: Callable[[], bool]) -> None:
    changed = asyncio.Event()
    undo = manager.subscribe(lambda _change: changed.set()), manager.subscribe_api(lambda _state: changed.set())
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                changed.clear()
                await changed.wait()
    finally:
        for unsubscribe in undo:
            unsubscribe()


def fresh_key() -> DeviceKey:
    return DeviceKey(ServerKey("10.0.0.1"), f"1-{uuid.uuid4().int % 10**9}")


async def test_two_nodes_contend_and_exactly_one_wins_each_time(
    cluster: Cluster, tokens: NodeTokens, long_form: bool
) -> None:
    rounds = LONG_ROUNDS if long_form else ROUNDS
    key = fresh_key()
    async with node(cluster, tokens) as a, node(cluster, tokens) as b:
        wins = [0, 0]
        for _ in range(rounds):
            results = await asyncio.gather(a.manager.acquire(key), b.manager.acquire(key), return_exceptions=True)
            winners = [i for i, result in enumerate(results) if not isinstance(result, BaseException)]
            assert len(winners) == 1, results
            assert isinstance(results[1 - winners[0]], LockHeld)
            wins[winners[0]] += 1
            await (a, b)[winners[0]].manager.release(key)
        left = await a.store.get(key.id)
        assert left is not None
        assert (left.holder, left.transitions) == ("", rounds)
        assert a.manager.mine() == b.manager.mine() == ()
        print(f"\nwins {wins}")


async def test_another_node_sees_every_lock_come_and_go_in_order(
    cluster: Cluster, tokens: NodeTokens, long_form: bool
) -> None:
    keys = [fresh_key() for _ in range(LONG_TENURES if long_form else TENURES)]
    ids = {key.id for key in keys}
    async with node(cluster, tokens) as a, node(cluster, tokens) as b:
        seen: list[tuple[str, LockStatus]] = []

        def note(change: LockChange) -> None:
            if change.device_id in ids:
                seen.append((change.device_id, b.manager.lock_status(change.device_id)))

        unsubscribe = b.manager.subscribe(note)
        for key in keys:
            await a.manager.acquire(key)
        for key in keys:
            await a.manager.release(key)
        await until(b.manager, lambda: len(seen) >= 2 * len(keys))
        unsubscribe()
        assert seen == [(key.id, standing) for standing in (LockStatus.HELD, LockStatus.FREE) for key in keys]


async def test_a_cut_watch_resumes_without_missing_a_change(cluster: Cluster, tokens: NodeTokens) -> None:
    async with proxy_to(cluster.port) as proxy:
        slow = f"https://127.0.0.1:{proxy.port}"
        async with node(cluster, tokens) as a, node(cluster, tokens, server=slow) as b:
            first, second = fresh_key(), fresh_key()
            await a.manager.acquire(first)
            await until(b.manager, lambda: b.manager.lock_status(first.id) is LockStatus.HELD)
            proxy.refusing = True
            proxy.cut()
            await until(b.manager, lambda: not b.manager.api.reachable)
            assert b.manager.api.error
            await a.manager.release(first)
            await a.manager.acquire(second)
            assert b.manager.lock_status(first.id) is LockStatus.HELD
            proxy.refusing = False
            await until(b.manager, lambda: b.manager.api.reachable)
            await until(b.manager, lambda: b.manager.lock_status(first.id) is LockStatus.FREE)
            await until(b.manager, lambda: b.manager.lock_status(second.id) is LockStatus.HELD)


async def test_a_partitioned_node_gets_nothing(cluster: Cluster, tokens: NodeTokens) -> None:
    key = fresh_key()
    async with (
        proxy_to(cluster.port) as proxy,
        node(cluster, tokens, server=f"https://127.0.0.1:{proxy.port}") as b,
    ):
        proxy.refusing = True
        proxy.cut()
        with pytest.raises(LockUnavailable) as unavailable:
            await b.manager.acquire(key)
        assert str(key) in str(unavailable.value)


async def test_after_compaction_and_restart_of_the_api_server_all_is_listed_anew(
    cluster: Cluster, tokens: NodeTokens
) -> None:
    async with node(cluster, tokens) as a, node(cluster, tokens) as b:
        gone, taken = fresh_key(), fresh_key()
        await a.manager.acquire(gone)
        await until(b.manager, lambda: b.manager.lock_status(gone.id) is LockStatus.HELD)
        await asyncio.to_thread(cluster.forget)
        await until(a.manager, lambda: a.manager.api.reachable)
        await a.manager.release(gone)
        await a.manager.acquire(taken)
        await until(b.manager, lambda: b.manager.lock_status(gone.id) is LockStatus.FREE)
        await until(b.manager, lambda: b.manager.lock_status(taken.id) is LockStatus.HELD)
        assert a.manager.mine()[0].device_id == taken.id


async def test_a_dead_nodes_lock_is_taken_over(cluster: Cluster, tokens: NodeTokens) -> None:
    key = fresh_key()
    async with node(cluster, tokens) as b:
        async with node(cluster, tokens) as a:
            await a.manager.acquire(key)
            await until(b.manager, lambda: b.manager.lock_status(key.id) is LockStatus.HELD)
        b.manager.expiry.set_importable(frozenset({key.id}))
        with b.clock.hurried():
            await until(b.manager, lambda: b.manager.lock_status(key.id) is LockStatus.EXPIRED)
        grant = await b.manager.acquire(key)
        assert grant.epoch == 2
