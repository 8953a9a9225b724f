"""Lock managers on a real API server, with the rights of rbac/: contention, broken watches, restarts, latency."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from api_process import Cluster
from node_tokens import NodeTokens
from opentelemetry.trace import NoOpTracer
from tcp_proxy import proxy_to

from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import LockHeld, LockUnavailable
from usbip_plugin.kube import connect
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.manager import LockManager, LockSettings, Standing
from usbip_plugin.model import DeviceKey, NodeIdentity, ServerKey

ROUNDS = 1000
# Real seconds after which what must happen counts as not happening.
PATIENCE_S = 60.0


@dataclass
class Node:
    manager: LockManager
    store: KubernetesLeases


@contextlib.asynccontextmanager
async def node(
    cluster: Cluster, tokens: NodeTokens, settings: LockSettings | None = None, server: str | None = None
) -> AsyncIterator[Node]:
    """A manager that runs and has made its first list, with its node's token. server: another address of the API."""
    identity = NodeIdentity(f"n{uuid.uuid4().hex[:8]}", str(uuid.uuid4()))
    client = await connect(cluster.kubeconfig(await tokens.of(identity.node), server))
    store = KubernetesLeases(client, "usbip-system")
    manager = LockManager(
        store, identity, SystemClock(), random.Random(identity.node), settings or LockSettings(), NoOpTracer()
    )
    task = asyncio.create_task(manager.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await manager.ready.wait()
        yield Node(manager, store)
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


async def test_two_nodes_contend_and_exactly_one_wins_each_time(cluster: Cluster, tokens: NodeTokens) -> None:
    key = fresh_key()
    async with node(cluster, tokens) as a, node(cluster, tokens) as b:
        wins = [0, 0]
        start = time.monotonic()
        for _ in range(ROUNDS):
            results = await asyncio.gather(a.manager.acquire(key), b.manager.acquire(key), return_exceptions=True)
            winners = [i for i, result in enumerate(results) if not isinstance(result, BaseException)]
            assert len(winners) == 1, results
            assert isinstance(results[1 - winners[0]], LockHeld)
            wins[winners[0]] += 1
            await (a, b)[winners[0]].manager.release(key)
        took = time.monotonic() - start
        left = await a.store.get(key.id)
        assert left is not None
        assert (left.holder, left.transitions) == ("", ROUNDS)
        assert a.manager.mine() == b.manager.mine() == ()
        print(f"\ncontention: {ROUNDS} rounds in {took:.1f} s, {ROUNDS / took:.0f} rounds/s, wins {wins}")


async def test_withdrawal_reaches_the_other_node(cluster: Cluster, tokens: NodeTokens) -> None:
    async with node(cluster, tokens) as a, node(cluster, tokens) as b:
        delays: list[float] = []
        takes: list[float] = []
        for _ in range(200):
            key = fresh_key()
            seen = asyncio.get_running_loop().create_future()
            unsubscribe = b.manager.subscribe(
                lambda change, key=key, seen=seen: (  # type: ignore[misc]
                    seen.set_result(time.monotonic()) if change.device_id == key.id and not seen.done() else None
                )
            )
            start = time.monotonic()
            await a.manager.acquire(key)
            taken = time.monotonic()
            async with asyncio.timeout(PATIENCE_S):
                await seen
            unsubscribe()
            takes.append((taken - start) * 1000)
            delays.append((seen.result() - start) * 1000)
            assert b.manager.standing(key.id) is Standing.HELD
        for name, values in (("acquire", takes), ("from acquire to the other node's view", delays)):
            cuts = statistics.quantiles(values, n=100)
            print(f"\n{name}: p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms, max {max(values):.1f} ms")


async def test_a_cut_watch_resumes_without_missing_a_change(cluster: Cluster, tokens: NodeTokens) -> None:
    async with proxy_to(cluster.port) as proxy:
        slow = f"https://127.0.0.1:{proxy.port}"
        async with node(cluster, tokens) as a, node(cluster, tokens, server=slow) as b:
            first, second = fresh_key(), fresh_key()
            await a.manager.acquire(first)
            await until(b.manager, lambda: b.manager.standing(first.id) is Standing.HELD)
            proxy.refusing = True
            proxy.cut()
            await until(b.manager, lambda: not b.manager.api.reachable)
            assert b.manager.api.error
            await a.manager.release(first)
            await a.manager.acquire(second)
            assert b.manager.standing(first.id) is Standing.HELD
            proxy.refusing = False
            await until(b.manager, lambda: b.manager.api.reachable)
            await until(b.manager, lambda: b.manager.standing(first.id) is Standing.FREE)
            await until(b.manager, lambda: b.manager.standing(second.id) is Standing.HELD)


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
        await until(b.manager, lambda: b.manager.standing(gone.id) is Standing.HELD)
        await asyncio.to_thread(cluster.forget)
        await until(a.manager, lambda: a.manager.api.reachable)
        await a.manager.release(gone)
        await a.manager.acquire(taken)
        await until(b.manager, lambda: b.manager.standing(gone.id) is Standing.FREE)
        await until(b.manager, lambda: b.manager.standing(taken.id) is Standing.HELD)
        assert a.manager.mine()[0].device_id == taken.id


async def test_a_dead_nodes_lock_is_taken_over(cluster: Cluster, tokens: NodeTokens) -> None:
    key = fresh_key()
    settings = LockSettings(duration=2.0, import_window=0.9)
    async with node(cluster, tokens, settings) as b:
        async with node(cluster, tokens, settings) as a:
            await a.manager.acquire(key)
            await until(b.manager, lambda: b.manager.standing(key.id) is Standing.HELD)
        b.manager.set_importable(frozenset({key.id}))
        await until(b.manager, lambda: b.manager.standing(key.id) is Standing.EXPIRED)
        grant = await b.manager.acquire(key)
        assert grant.epoch == 2
