"""A whole cluster in virtual time: many nodes, servers and pods in one process, without a socket.

Production code for everything but clock, network, kernel and kubelet. What the invariants of the simulation need to see
is kept here: who is attached to what, who imports what, what the locks say. Runs on a StepLoop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from opentelemetry.trace import NoOpTracer, Tracer

from usbip_plugin.agent import Observer
from usbip_plugin.config import Config
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.memory import FINE, Fate, MemoryBackend, Operation
from usbip_plugin.locks.protocol import Rules
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import DeviceKey, PodRef, ServerKey
from usbip_plugin.sim.cluster_node import ClusterNode, unchanged
from usbip_plugin.sim.loop import SimClock
from usbip_plugin.sim.network import Network
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.steploop import loop_of
from usbip_plugin.vhci.driver import VhciDriver

__all__ = ["Cluster", "ClusterNode", "ClusterSpec", "FaultPlan", "cluster"]

FaultPlan = Callable[[str, Operation], Fate]
"""(node, operation) -> what happens to it."""


@dataclass(slots=True)
class ClusterSpec:
    """What a cluster is made of. Everything of the outside may be replaced for one run.

    rates: each node's clock against the loop's, 1.0 where not given; offsets: where its monotonic clock begins (s).
    """

    names: Sequence[str]
    servers: Sequence[VirtualServer]
    config: Config
    seed: int = 0
    lock_settings: LockSettings | None = None
    rules: Rules | None = None
    rates: Sequence[float] = ()
    offsets: Sequence[float] = ()
    faults: FaultPlan = lambda _node, _operation: FINE
    latency: Callable[[], float] = lambda: 0.001
    driver: Callable[[VhciDriver], VhciDriver] = unchanged
    observer: Callable[[str], Observer] = lambda _node: Observer()
    tracer: Callable[[str], Tracer] = lambda _node: NoOpTracer()


class Cluster:
    """The nodes by name. Made by `cluster`."""

    domain = "usbip.dev"

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.seed = spec.seed
        self.starts = 0
        self.backend = MemoryBackend()
        self.servers: dict[ServerKey, VirtualServer] = {server.key: server for server in spec.servers}
        self.network = Network(self.servers.get, spec.latency)
        loop = loop_of()
        rates = [*spec.rates, *[1.0] * len(spec.names)]
        offsets = [*spec.offsets, *[1000.0] * len(spec.names)]
        self.nodes = {
            name: ClusterNode(name, self, SimClock(loop, rates[i], offsets[i])) for i, name in enumerate(spec.names)
        }

    def full(self, resource: str) -> str:
        return f"{self.domain}/{resource}"

    def __getitem__(self, name: str) -> ClusterNode:
        return self.nodes[name]

    def holder(self, key: DeviceKey) -> str:
        """Whom the lock names in the store itself, "" for nobody."""
        lease = self.backend.leases.get(key.id)
        return lease.holder if lease is not None else ""

    def pod_of(self, key: DeviceKey) -> PodRef | None:
        """Which pod the lock names in the store itself."""
        lease = self.backend.leases.get(key.id)
        return lock_of(lease).pod if lease is not None else None

    def serial_of(self, key: DeviceKey) -> str | None:
        """Of what is plugged in there now, "" if it has none; None if nothing is."""
        table = self.servers[key.server].table
        return table.device(key.busid)[0].serial if table.plugged(key.busid) else None

    async def settle(self, condition: Callable[[], bool], seconds: float) -> bool:
        """True as soon as the condition holds, looked at every 20 ms of virtual time; False after so many seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not condition():
            if loop.time() >= end:
                return False
            await asyncio.sleep(0.02)
        return True


@contextlib.asynccontextmanager
async def cluster(spec: ClusterSpec) -> AsyncIterator[Cluster]:
    """Servers and agents run within the block."""
    for server in spec.servers:
        await server.start()
    made = Cluster(spec)
    try:
        for node in made.nodes.values():
            node.start()
        yield made
    finally:
        for node in made.nodes.values():
            node.thaw_host()
            node.thaw()
            await node.stop()
        for server in spec.servers:
            server.thaw()
            await server.stop()
