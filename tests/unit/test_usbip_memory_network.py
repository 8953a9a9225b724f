"""A simulated node cut off from a server: who holds what while packets are lost, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from usbip_plugin.errors import DeviceBusy, ServerTimeout
from usbip_plugin.model import DeviceKey, UsbId
from usbip_plugin.sim.client import MemoryUsbipClient
from usbip_plugin.sim.loop import SimClock, virtual
from usbip_plugin.sim.server import RESET_TIME, VirtualServer
from usbip_plugin.sim.socket import SocketTable
from usbip_plugin.sim.usbdevice import VirtualDevice

LATENCY = 0.01
TIMEOUT = 1.0


class Lab:
    """One server with one device, two nodes, a slow network."""

    def __init__(self) -> None:
        self.clock = SimClock(asyncio.get_running_loop())
        device = VirtualDevice("1-1", UsbId(1, 1))
        self.server = VirtualServer([device], "server", 3240, clock=self.clock, listen=False)
        self.key = DeviceKey(self.server.key, "1-1")
        self.sockets = SocketTable()
        self.a, self.b = (
            MemoryUsbipClient({self.server.key: self.server}.get, self.sockets, self.clock, lambda: LATENCY)
            for _ in range(2)
        )

    async def granted(self) -> None:
        """Time for a request to arrive, not for its answer."""
        await self.clock.sleep(LATENCY * 1.5)


@virtual
async def test_an_import_granted_but_never_answered_is_let_go_by_its_client() -> None:
    lab = Lab()
    await lab.server.start()
    asking = asyncio.ensure_future(lab.a.import_device(lab.key, timeout=LATENCY * 1.8))
    await lab.granted()
    assert lab.server.importers("1-1") == 1
    with pytest.raises(ServerTimeout):
        await asking
    assert (lab.server.importers("1-1"), len(lab.sockets)) == (0, 0)


@virtual
async def test_a_node_cut_off_holds_its_device_at_the_server_until_the_network_is_mended() -> None:
    lab = Lab()
    await lab.server.start()
    imported = await lab.a.import_device(lab.key, timeout=TIMEOUT)
    lab.a.cut(lab.server.key)
    with pytest.raises(ServerTimeout):
        await lab.a.devlist(lab.server.key, timeout=TIMEOUT)
    imported.close()
    assert lab.server.importers("1-1") == 1
    with pytest.raises(DeviceBusy):
        await lab.b.import_device(lab.key, timeout=TIMEOUT)
    lab.a.mend(lab.server.key)
    assert lab.server.importers("1-1") == 0
    await lab.clock.sleep(RESET_TIME)
    (await lab.b.import_device(lab.key, timeout=TIMEOUT)).close()
    assert len(lab.sockets) == 0


@virtual
async def test_an_answer_lost_on_its_way_leaves_the_device_held() -> None:
    lab = Lab()
    await lab.server.start()
    asking = asyncio.ensure_future(lab.a.import_device(lab.key, timeout=TIMEOUT))
    await lab.granted()
    lab.a.cut(lab.server.key)
    with pytest.raises(ServerTimeout):
        await asking
    assert (lab.server.importers("1-1"), len(lab.sockets)) == (1, 0)


@virtual
async def test_the_operator_frees_a_device_held_by_a_node_that_lost_power() -> None:
    lab = Lab()
    await lab.server.start()
    imported = await lab.a.import_device(lab.key, timeout=TIMEOUT)
    lab.a.cut(lab.server.key)
    imported.close()
    lab.server.drop("1-1")
    assert lab.server.importers("1-1") == 0
    await lab.clock.sleep(RESET_TIME)
    held = await lab.b.import_device(lab.key, timeout=TIMEOUT)
    lab.a.mend(lab.server.key)  # the old connection's end arrives late, and frees nothing
    assert lab.server.importers("1-1") == 1
    await lab.server.stop()
    held.close()
