"""A server that lists other devices again and again costs the nodes no more than others do."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

from tests.simulation.cluster_rig import Cluster, agent, cluster, spec, stick
from usbip_plugin.config.schema import DeviceSelector, ResourceConfig, Selector
from usbip_plugin.usbip.poller import MAX_RATE
from usbip_sim.server.server import ServerConnection, VirtualServer
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.steploop import stepped

DEVICES = 6
"""Devices that the server has at a time."""
LATELY = 4 * DEVICES
"""Devices at most that it has listed in the last ten seconds, if it changes them after each 20 connections."""


class ChangingServer(VirtualServer):
    """A server that, once turn() was called, exports nothing and lists new bus IDs after each `every` connections."""

    def __init__(self, every: int) -> None:
        super().__init__((), "lab", 3240, clock=SimClock(asyncio.get_running_loop()), listen=False)
        self._every, self._numbers = every, itertools.count(1)
        self._turned = False

    def turn(self) -> None:
        self._turned = True
        self.table.import_device = lambda *_: None  # type: ignore[method-assign]

    def opened(self, connection: ServerConnection) -> None:
        super().opened(connection)
        if self._turned and self.connections % self._every == 0:
            for device in self.table.devices():
                self.unplug(device.busid)
            for _ in range(DEVICES):
                self.plug(stick(f"9-{next(self._numbers)}"))


@contextlib.asynccontextmanager
async def offering(every: int) -> AsyncIterator[tuple[Cluster, ChangingServer]]:
    """Runs two nodes that look for one serial number on a server."""
    lab = ChangingServer(every)
    selector = DeviceSelector(lab.key, Selector(serial="RED"))
    async with cluster(spec([lab], ResourceConfig("stick", (selector,)))) as c:
        yield c, lab


@stepped
async def test_a_server_that_changes_its_list_is_asked_within_the_budget() -> None:
    async with offering(every=1) as (_c, lab):
        lab.turn()
        await asyncio.sleep(10)
        before = lab.connections
        await asyncio.sleep(20)
        assert lab.connections - before <= 20 * MAX_RATE


@stepped
async def test_devices_that_a_server_lists_no_longer_leave_nothing_in_memory() -> None:
    async with offering(every=20) as (c, lab):
        lab.turn()
        await asyncio.sleep(150)
        assert next(lab._numbers) > 3 * LATELY
        for node in c.nodes.values():
            assert len(agent(node).prober._failures) <= LATELY
            assert len(agent(node).attachments.locator._tasks._mutexes) <= LATELY
