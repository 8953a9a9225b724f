"""Several lock managers on one store in memory, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from opentelemetry.trace import NoOpTracer

from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import DeviceKey, NodeIdentity, ServerKey
from usbip_sim.leases import FINE, Fate, MemoryBackend, MemoryLeases, Operation
from usbip_sim.virtual.loop import SimClock

KEY = DeviceKey(ServerKey("10.0.0.1"), "1-1")
OTHER = DeviceKey(ServerKey("10.0.0.1"), "1-2")
SETTINGS = LockSettings()


@dataclass
class Node:
    """One node. fate is asked before each API call and may be changed at any time; calls lists what was sent."""

    manager: LockManager
    store: MemoryLeases
    clock: SimClock
    task: asyncio.Task[None]
    fate: Callable[[Operation], Fate] = lambda _operation: FINE
    calls: list[Operation] = field(default_factory=list)
    changes: list[LockChange] = field(default_factory=list)
    listed: bool = True  # what the device's server says when it is asked

    def writes(self) -> list[Operation]:
        return [call for call in self.calls if call.verb in ("create", "update", "delete")]

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class World:
    def __init__(self) -> None:
        self.backend = MemoryBackend()
        self.nodes: list[Node] = []

    async def node(self, name: str, boot: str = "boot-1", rate: float = 1.0, seed: int = 1) -> Node:
        """A node whose manager runs and has made its first list."""
        clock = SimClock(asyncio.get_running_loop(), rate)
        node: Node

        def faults(operation: Operation) -> Fate:
            node.calls.append(operation)
            return node.fate(operation)

        store = MemoryLeases(self.backend, clock, name, faults)
        rng = random.Random(f"{name}{boot}{seed}")

        async def is_listed(_key: DeviceKey) -> bool:
            return node.listed

        me = NodeIdentity(name, boot)
        manager = LockManager(store, me, clock, rng, SETTINGS, NoOpTracer(), is_listed=is_listed)
        node = Node(manager, store, clock, asyncio.create_task(manager.run()))
        manager.subscribe(node.changes.append)
        self.nodes.append(node)
        await manager.ready.wait()
        return node


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    made = World()
    try:
        yield made
    finally:
        for node in made.nodes:
            await node.stop()


@contextlib.asynccontextmanager
async def held() -> AsyncIterator[tuple[World, Node, Node]]:
    """Two nodes, a and b; a has the lock of KEY, and b has seen that."""
    async with world() as made:
        a, b = await made.node("a"), await made.node("b")
        await a.manager.acquire(KEY)
        await until(lambda: KEY.id in b.manager.locks, b)
        yield made, a, b


async def given_up(node: Node, *, claimed: bool = False) -> None:
    """An acquire of KEY that its caller gives up after a second."""
    with pytest.raises(TimeoutError):
        async with node.clock.timeout(1):
            await node.manager.acquire(KEY, claimed=claimed)


async def until(condition: Callable[[], bool], node: Node, seconds: float = 600.0) -> None:
    """Wait, in virtual time, until a change of a lock or of the API's state at node makes the condition true."""
    event = asyncio.Event()
    undo = node.manager.subscribe(lambda _change: event.set()), node.manager.subscribe_api(lambda _state: event.set())
    try:
        async with node.clock.timeout(seconds):
            while not condition():
                event.clear()
                await event.wait()
    finally:
        for unsubscribe in undo:
            unsubscribe()


def unreachable(operation: Operation) -> Fate:
    """A fate: nothing gets through, told at once."""
    from usbip_plugin.errors import KubeUnreachable

    return Fate(refused=KubeUnreachable(operation.verb, "leases.coordination.k8s.io", "partitioned"))
