"""A simulated cluster whose nodes have metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.simulation.cluster_rig import Cluster, cluster
from usbip_plugin.node.agent import MetricHooks
from usbip_plugin.node.metrics import AgentMetrics, DropCounts
from usbip_plugin.observe.metrics import Metrics
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.surroundings import ClusterSpec

DOMAIN = Cluster.domain
OFFSET = 1000.0
"""Offset in seconds of a node's clock, as Cluster sets it."""
PREFIX = "usbip_device_plugin_"


class Measured:
    """Metrics of each node."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metrics] = {}
        self.figures: dict[str, AgentMetrics] = {}

    def observer(self, node: str) -> MetricHooks:
        clock = SimClock(asyncio.get_running_loop(), 1.0, OFFSET)
        self.metrics[node] = Metrics()
        self.figures[node] = AgentMetrics(self.metrics[node], clock, domain=DOMAIN, node=node)
        return self.figures[node].observer

    def families(self, node: str) -> Iterator[Metric]:
        yield from text_string_to_metric_families(self.metrics[node].render()[0].decode())

    def value(self, node: str, name: str, **labels: str) -> float | None:
        """Returns the value of a sample, None if there is none. name: without the prefix."""
        for family in self.families(node):
            for sample in family.samples:
                if sample.name == PREFIX + name and sample.labels == labels:
                    return sample.value
        return None


@contextlib.asynccontextmanager
async def measured(spec: ClusterSpec) -> AsyncIterator[tuple[Cluster, Measured]]:
    """Runs a cluster with metrics of its first agents."""
    rig = Measured()
    async with cluster(replace(spec, observer=rig.observer)) as c:
        for name, node in c.nodes.items():
            assert node.agent is not None
            rig.figures[name].follow(node.agent, DropCounts(events_dropped=lambda: 3))
        yield c, rig
