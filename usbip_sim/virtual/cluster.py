"""A whole cluster in virtual time, on a StepLoop: many nodes, servers and pods in one process, without a socket.

Everything except clock, network, kernel, kubelet and API server is production code.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.exporter import Exporter
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.steploop import loop_of
from usbip_sim.virtual.surroundings import ClusterSpec, FaultPlan, Surroundings

__all__ = ["Cluster", "ClusterNode", "ClusterSpec", "FaultPlan", "running"]


class Cluster(Surroundings):
    """Simulated cluster: its nodes by name, its exporters, and what they share. Runs within `running`."""

    def __init__(self, spec: ClusterSpec) -> None:
        super().__init__(spec)
        loop = loop_of()
        rates = [*spec.rates, *[1.0] * len(spec.names)]
        offsets = [*spec.offsets, *[1000.0] * len(spec.names)]
        self.nodes = {
            name: ClusterNode(name, self, SimClock(loop, rates[i], offsets[i])) for i, name in enumerate(spec.names)
        }
        self.exporters = {key: Exporter(self.servers[key], self, away) for key, away in spec.exporters.items()}

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


C = TypeVar("C", bound=Cluster)


@contextlib.asynccontextmanager
async def running(cluster: C) -> AsyncIterator[C]:
    """Runs the servers and agents of a simulated cluster within the block."""
    for server in cluster.spec.servers:
        await server.start()
    for exporter in cluster.exporters.values():
        exporter.restart()
    try:
        for node in cluster.nodes.values():
            node.start()
        yield cluster
    finally:
        for node in cluster.nodes.values():
            node.thaw_host()
            node.thaw()
            await node.stop()
        for server in cluster.spec.servers:
            server.thaw()
            await server.stop()
