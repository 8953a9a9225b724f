"""A whole cluster in virtual time, on a StepLoop: many nodes, servers and pods in one process, without a socket.

Everything except clock, network, kernel, kubelet and API server is production code.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.steploop import loop_of
from usbip_sim.virtual.surroundings import ClusterSpec, FaultPlan, Surroundings

__all__ = ["Cluster", "ClusterNode", "ClusterSpec", "FaultPlan", "cluster"]


class Cluster(Surroundings):
    """Simulated cluster: its nodes by name, and what they share. Made by cluster()."""

    def __init__(self, spec: ClusterSpec) -> None:
        super().__init__(spec)
        loop = loop_of()
        rates = [*spec.rates, *[1.0] * len(spec.names)]
        offsets = [*spec.offsets, *[1000.0] * len(spec.names)]
        self.nodes = {
            name: ClusterNode(name, self, SimClock(loop, rates[i], offsets[i])) for i, name in enumerate(spec.names)
        }

    def __getitem__(self, name: str) -> ClusterNode:
        return self.nodes[name]

    async def settle(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Returns whether condition holds within so many seconds. Checks it every 20 ms of the loop's time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not condition():
            if loop.time() >= end:
                return False
            await asyncio.sleep(0.02)
        return True


@contextlib.asynccontextmanager
async def cluster(spec: ClusterSpec) -> AsyncIterator[Cluster]:
    """Makes a simulated cluster whose servers and agents run within the block."""
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
