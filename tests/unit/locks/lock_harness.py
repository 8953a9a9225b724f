"""Lock managers of several nodes on one store in memory, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import pytest
from opentelemetry.trace import NoOpTracer

from tests.rigs.tasks import virtual_with
from tests.rigs.vocabulary import KEY
from usbip_plugin.errors import KubeUnreachable
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.locks.record import Lease
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import DeviceKey, NodeIdentity
from usbip_plugin.usbip.poller import ExportState
from usbip_sim.leases import FINE, Fate, MemoryBackend, MemoryLeases, Operation
from usbip_sim.virtual.loop import SimClock

SETTINGS = LockSettings()


@dataclass
class Node:
    """A node with its manager.

    fate: decides each API call, and may be changed at any time.
    calls: the API calls so far.
    changes: the changes that the manager reported.
    export_state: what the device's server answers.
    """

    manager: LockManager
    store: MemoryLeases
    clock: SimClock
    task: asyncio.Task[None]
    fate: Callable[[Operation], Fate] = lambda _operation: FINE
    calls: list[Operation] = field(default_factory=list)
    changes: list[LockChange] = field(default_factory=list)
    export_state: ExportState = ExportState.FREE

    @property
    def stored(self) -> Mapping[str, Lease]:
        """The Leases in the store by their names."""
        return self.store._backend.leases

    def writes(self) -> list[Operation]:
        return [call for call in self.calls if call.verb in ("create", "update", "delete")]

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class World:
    """A store and the nodes that use it."""

    def __init__(self) -> None:
        self.backend = MemoryBackend()
        self.nodes: list[Node] = []

    async def node(
        self, name: str, boot: str = "boot-1", rate: float = 1.0, seed: int = 1, listing: float = 0.0
    ) -> Node:
        """Adds a node, and returns it after the first list of its manager.

        listing: seconds that lists take. With more than 0, returns before the first one.
        """
        clock = SimClock(asyncio.get_running_loop(), rate)
        node: Node

        def faults(operation: Operation) -> Fate:
            node.calls.append(operation)
            return node.fate(operation)

        store = MemoryLeases(self.backend, clock, name, faults)
        rng = random.Random(f"{name}{boot}{seed}")

        async def export_state(_key: DeviceKey) -> ExportState:
            return node.export_state

        me = NodeIdentity(name, boot)
        manager = LockManager(store, me, clock, rng, SETTINGS, NoOpTracer(), export_state=export_state)
        node = Node(manager, store, clock, asyncio.create_task(manager.run()))
        manager.subscribe(node.changes.append)
        self.nodes.append(node)
        if listing:
            node.fate = lambda operation: Fate(response=listing) if operation.verb == "list" else FINE
        else:
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
async def single() -> AsyncIterator[Node]:
    """Makes a world with one node, a."""
    async with world() as made:
        yield await made.node("a")


@contextlib.asynccontextmanager
async def held() -> AsyncIterator[World]:
    """Makes a world with the nodes a and b, where a holds the lock of KEY, and b has seen that."""
    async with world() as made:
        a, b = await made.node("a"), await made.node("b")
        await a.manager.acquire(KEY)
        await until(lambda: KEY.id in b.manager.locks, b)
        yield made


on_world = virtual_with(world)
on_node = virtual_with(single)
on_held_world = virtual_with(held)


async def given_up(node: Node, *, claimed: bool = False) -> None:
    """Acquires KEY and cancels the acquire after a second."""
    with pytest.raises(TimeoutError):
        async with node.clock.timeout(1):
            await node.manager.acquire(KEY, claimed=claimed)


async def until(condition: Callable[[], bool], node: Node, seconds: float = 600.0) -> None:
    """Waits for the condition, which is checked at each change of a lock or of the API state at the node."""
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
    """Decides that a call fails at once."""
    return Fate(refused=KubeUnreachable(operation.verb, "leases.coordination.k8s.io", "partitioned"))
