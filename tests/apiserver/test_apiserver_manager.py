"""Lock managers on a real API server with the rights of rbac/: the order of changes, cut watches, compaction."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Callable

import pytest
from opentelemetry.trace import NoOpTracer

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.rigs.api_process import Cluster
from tests.rigs.tcp_proxy import proxy_to
from usbip_plugin.clock import SystemClock
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import DeviceKey, NodeIdentity, ServerKey

pytestmark = pytest.mark.short

TENURES, LONG_TENURES = 20, 200
PATIENCE_S = 60.0


@contextlib.asynccontextmanager
async def lock_manager(tokens: NodeTokens, server: str | None = None) -> AsyncIterator[LockManager]:
    """Yields the running manager of a new node once it has listed the locks. server: another address of the API."""
    name = f"n{uuid.uuid4().hex[:8]}"
    async with tokens.client(name, server) as client:
        store, identity = KubernetesLeases(client, NAMESPACE), NodeIdentity(name, "boot")
        manager = LockManager(store, identity, SystemClock(), random.Random(name), LockSettings(), NoOpTracer())
        running = asyncio.create_task(manager.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await manager.ready.wait()
            yield manager
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def until(manager: LockManager, condition: Callable[[], bool]) -> None:
    """Waits for a condition that only changes of locks, or of the API server's reachability, can make true."""
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


async def test_another_node_sees_every_lock_come_and_go_in_order(tokens: NodeTokens, long_form: bool) -> None:
    keys = [fresh_key() for _ in range(LONG_TENURES if long_form else TENURES)]
    ids = {key.id for key in keys}
    async with lock_manager(tokens) as a, lock_manager(tokens) as b:
        seen: list[tuple[str, LockStatus]] = []

        def note(change: LockChange) -> None:
            if change.device_id in ids:
                seen.append((change.device_id, b.lock_status(change.device_id)))

        unsubscribe = b.subscribe(note)
        for key in keys:
            await a.acquire(key)
        for key in keys:
            await a.release(key)
        await until(b, lambda: len(seen) >= 2 * len(keys))
        unsubscribe()
        assert seen == [(key.id, status) for status in (LockStatus.HELD, LockStatus.FREE) for key in keys]


async def test_a_cut_watch_resumes_without_missing_a_change(cluster: Cluster, tokens: NodeTokens) -> None:
    async with proxy_to(cluster.port) as proxy:
        proxied = f"https://127.0.0.1:{proxy.port}"
        async with lock_manager(tokens) as a, lock_manager(tokens, proxied) as b:
            first, second = fresh_key(), fresh_key()
            await a.acquire(first)
            await until(b, lambda: b.lock_status(first.id) is LockStatus.HELD)
            proxy.refusing = True
            proxy.cut()
            await until(b, lambda: not b.api.reachable)
            assert b.api.error
            await a.release(first)
            await a.acquire(second)
            assert b.lock_status(first.id) is LockStatus.HELD
            proxy.refusing = False
            await until(b, lambda: b.api.reachable)
            await until(b, lambda: b.lock_status(first.id) is LockStatus.FREE)
            await until(b, lambda: b.lock_status(second.id) is LockStatus.HELD)


async def test_after_compaction_and_restart_of_the_api_server_all_locks_are_listed_again(
    cluster: Cluster, tokens: NodeTokens
) -> None:
    async with lock_manager(tokens) as a, lock_manager(tokens) as b:
        gone, taken = fresh_key(), fresh_key()
        await a.acquire(gone)
        await until(b, lambda: b.lock_status(gone.id) is LockStatus.HELD)
        await asyncio.to_thread(cluster.forget)
        await until(a, lambda: a.api.reachable)
        await a.release(gone)
        await a.acquire(taken)
        await until(b, lambda: b.lock_status(gone.id) is LockStatus.FREE)
        await until(b, lambda: b.lock_status(taken.id) is LockStatus.HELD)
        assert a.mine()[0].device_id == taken.id
