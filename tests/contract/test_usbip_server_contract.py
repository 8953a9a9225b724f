"""The UsbipClient contract over TCP and in memory, on one virtual server."""

from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from usbip_suite import STICK, TWIN, SteppedClock, UsbipClientContract

from usbip_plugin.clock import SystemClock
from usbip_plugin.sim.client import MemoryUsbipClient
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.socket import SocketTable
from usbip_plugin.usbip.client import TcpUsbipClient, UsbipClient


class TestTcp(UsbipClientContract):
    @pytest.fixture
    async def server(self, clock: SteppedClock) -> AsyncIterator[VirtualServer]:
        server = VirtualServer([STICK, TWIN], clock=clock)
        await server.start()
        yield server
        await server.stop()

    @pytest.fixture
    def connect(self) -> Iterator[Callable[[], UsbipClient]]:
        clients: list[TcpUsbipClient] = []

        def make() -> UsbipClient:
            clients.append(TcpUsbipClient(SystemClock()))
            return clients[-1]

        yield make
        for client in clients:
            client.close()


class TestMemory(UsbipClientContract):
    @pytest.fixture
    async def server(self, clock: SteppedClock) -> AsyncIterator[VirtualServer]:
        server = VirtualServer([STICK, TWIN], "server", 3240, clock=clock, listen=False)
        await server.start()
        yield server
        await server.stop()

    @pytest.fixture
    def connect(self, server: VirtualServer) -> Iterator[Callable[[], UsbipClient]]:
        sockets = SocketTable()
        yield lambda: MemoryUsbipClient({server.key: server}.get, sockets, SystemClock())
        assert len(sockets) == 0, "a socket was left open"
