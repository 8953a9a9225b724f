"""Lives of devices on simulated clusters with tracing, and the traces that they record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from tests.simulation.cluster_rig import (
    LOCKS,
    Cluster,
    agent,
    cluster,
    key,
    offered,
    one_stick,
    pod,
    server,
    spec,
    stick,
)
from usbip_plugin.observe.tracing import RecentSpans, SpanRecord, Tracing
from usbip_sim.virtual.steploop import stepped
from usbip_sim.virtual.surroundings import ClusterSpec

MANY = 4096


class Story:
    """Traces of one cluster, in the order in which they began."""

    def __init__(self) -> None:
        self.recent = RecentSpans(traces=MANY)
        self._tracings: dict[str, Tracing] = {}

    def traced(self, made: ClusterSpec) -> ClusterSpec:
        """Returns a spec whose agents record their traces in this story."""

        def tracing(node: str) -> Tracing:
            if node not in self._tracings:
                self._tracings[node] = Tracing(node, version="test", environ={}, recent=self.recent)
            return self._tracings[node]

        return replace(made, tracer=lambda node: tracing(node).tracer)

    @property
    def spans(self) -> list[SpanRecord]:
        found = [span for trace in self.recent.traces() for span in trace]
        return sorted(found, key=lambda span: (span.start_ns, span.span_id))

    def named(self, name: str, node: str | None = None) -> list[SpanRecord]:
        return [span for span in self.spans if span.name == name and node in (None, span.node)]

    def one(self, name: str, node: str | None = None) -> SpanRecord:
        (found,) = self.named(name, node)
        return found

    def path(self, span: SpanRecord) -> str:
        """Returns the names from the recorded root down to the span, joined by slashes."""
        by_id = {known.span_id: known for known in self.spans}
        names = [span.name]
        while span.parent_id in by_id:
            span = by_id[span.parent_id]
            names.append(span.name)
        return "/".join(reversed(names))


def played(play: Callable[[Story], Coroutine[Any, Any, None]]) -> Story:
    """Plays a story in virtual time."""
    story = Story()
    stepped(lambda: play(story))()
    return story


async def pod_known(c: Cluster, node: str, name: str) -> None:
    assert await c.settle(lambda: any(c.pod_of(k) == pod(name) for k in c[node].attached()), 5)


async def life(story: Story) -> None:
    """Allocates on node-a while node-b withdraws, loses and restores the connection, and ends the pod."""
    async with one_stick(change=story.traced) as (c, _lab, device):
        a, b = await c.admitted(device), c["node-b"]
        await c.becomes(b, device, healthy=False)
        assert await b.admit(pod("q"), "stick") is not None
        await c.noted(device, "p")
        await c.lost_and_back(a, device)
        a.end(pod("p"))
        await c.becomes(b, device, healthy=True)


async def restarted(story: Story) -> None:
    """Restarts the plugin of node-a, repeats the Allocate, and ends the pod."""
    async with one_stick(change=story.traced) as (c, _lab, device):
        a = await c.taken(device)
        await a.stop()
        a.start()
        await c.becomes(a, device, healthy=True)
        assert await c.settle(lambda: device.id in agent(a).claims.view, 5)
        await c.allocate(a, device)
        await asyncio.sleep(10)  # long enough for the pod to be seen again
        a.end(pod("p"))
        assert await c.settle(lambda: c.holder(device) == "", 5)


async def taken_over(story: Story) -> None:
    """Reboots node-a with the device, takes the device over on node-b, and starts node-a again."""
    async with one_stick(nodes=3, change=story.traced) as (c, _lab, device):
        a, b = await c.taken(device), c["node-b"]
        await c.becomes(b, device, healthy=False)
        a.reboot()
        await c.becomes(b, device, healthy=True, within=3 * LOCKS.duration)
        assert await b.admit(pod("q"), "stick") is None
        a.start()
        await c.becomes(a, device, healthy=False)


async def robbed(story: Story) -> None:
    """Writes the name of a node outside of the cluster into the lock of a device that node-a has attached."""
    async with one_stick(change=story.traced) as (c, _lab, device):
        a = await c.admitted(device)
        lease = c.backend.leases[device.id]
        notes = {**lease.annotations, "usbip.dev/traceparent": TAKER}
        c.backend.replace(replace(lease, holder="node-z", transitions=lease.transitions + 1, annotations=notes))
        await c.becomes(a, device, healthy=False)
        assert await c.settle(lambda: a.attached() == frozenset(), 15)


async def raced(story: Story) -> None:
    """Allocates the device on both nodes at once."""
    async with one_stick(change=story.traced) as (c, _lab, _device):
        answers = await asyncio.gather(*(node.admit(pod(node.name), "stick") for node in c.nodes.values()))
        assert sum(answer is None for answer in answers) == 1


async def unplugged(story: Story) -> None:
    """Unplugs the device for an hour while its pod runs."""
    async with one_stick(change=story.traced) as (c, lab, device):
        a = await c.taken(device)
        lab.unplug("1-1")
        await c.becomes(a, device, healthy=False)
        await asyncio.sleep(3600)
        lab.plug(stick("1-1"))
        agent(a).poller.poll_soon(lab.key)  # the poll sees the device before the next attempt is due
        await c.becomes(a, device, healthy=True, within=60)


async def followed(story: Story) -> None:
    """Plugs the device in elsewhere while its pod runs."""
    lab = server("lab", stick("1-1", "RED"))
    device = key(lab, "1-1")
    async with cluster(story.traced(spec([lab], nodes=1))) as c:
        a = await c.taken(device)
        lab.unplug("1-1")
        await c.becomes(a, device, healthy=False)
        lab.plug(stick("1-2", "RED"))
        await c.becomes(a, device, healthy=True, within=60)


async def by_cdi(story: Story) -> None:
    """Allocates a device of a CDI resource."""
    async with one_stick(nodes=1, cdi=True, change=story.traced) as (c, _lab, device):
        await c.admitted(device)


async def probed(story: Story) -> None:
    """Reads a serial number."""
    async with offered(stick("1-1", "RED"), serials=("RED",), nodes=1, change=story.traced):
        pass


TAKER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STORIES = (life, restarted, taken_over, robbed, raced, unplugged, followed, by_cdi, probed)
