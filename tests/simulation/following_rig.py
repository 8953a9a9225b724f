"""A pod whose device RED is unplugged and plugged in elsewhere, at its own server or at another one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

from tests.simulation.cluster_rig import Cluster, by_serial, carry, cluster, hearing, server, spec, stick
from usbip_plugin.attach.events import DeviceEvent
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import loop_of

SOON_S = 5.0
"""Virtual seconds from a poll that lists the device until it is attached."""
FOUND_S = 10.0
"""Virtual seconds in which a server is polled, a serial number is read, and the device is attached."""

LAB, ATTIC = ServerKey("lab", 3240), ServerKey("attic", 3240)
HOME = DeviceKey(LAB, "1-1")
"""Bus id of RED when the pod gets it."""
HERE, THERE = DeviceKey(LAB, "1-2"), DeviceKey(ATTIC, "7-2")
"""Bus ids to which RED moves: on its own server, and on the other one."""
Taken: TypeAlias = tuple[Cluster, VirtualServer, ClusterNode]


@contextlib.asynccontextmanager
async def red(*, nodes: int = 2, notices: list[DeviceEvent] | None = None) -> AsyncIterator[Cluster]:
    """Runs a cluster with the servers lab, which has RED, and attic. A resource selects RED by its serial number."""
    lab, attic = server("lab", stick("1-1", "RED")), server("attic")
    made = spec([lab, attic], by_serial(lab, attic), nodes=nodes)
    async with cluster(made if notices is None else hearing(made, notices)) as c:
        yield c


@contextlib.asynccontextmanager
async def red_taken(place: DeviceKey = HERE, *, nodes: int = 2) -> AsyncIterator[Taken]:
    """Runs a cluster where pod p of node-a has RED, with the server to which RED will move."""
    async with contextlib.AsyncExitStack() as stack:
        if place == THERE:
            c = await stack.enter_async_context(red(nodes=nodes))
        else:
            c = await stack.enter_async_context(cluster(spec([server("lab", stick("1-1", "RED"))], nodes=nodes)))
        yield c, c.servers[place.server], await c.taken(HOME)


@contextlib.asynccontextmanager
async def red_followed(place: DeviceKey = HERE) -> AsyncIterator[Taken]:
    """Runs a cluster where RED has moved while pod p of node-a has it, and is attached from there."""
    async with red_taken(place) as (c, to, node):
        carry(c.servers[LAB], "1-1", to, place.busid)
        await found_again(c, node)
        assert node.attached() == {place}
        yield c, to, node


async def found_again(c: Cluster, node: ClusterNode) -> None:
    """Waits until RED is lost and attached again."""
    await c.becomes(node, HOME, healthy=False)
    await c.becomes(node, HOME, healthy=True, within=FOUND_S)


async def until_step(reached: Callable[[], bool]) -> None:
    """Waits until a condition holds after some step of the loop."""
    loop, done = loop_of(), asyncio.Event()

    def check() -> None:
        if reached():
            loop.after_step = None
            done.set()

    loop.after_step = check
    async with asyncio.timeout(FOUND_S):
        await done.wait()
