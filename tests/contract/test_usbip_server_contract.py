"""The UsbipClient contract over TCP and on the simulation's network, on one virtual server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.rigs.clocks import SteppedClock
from tests.rigs.command_rig import NEEDS_IPV6
from tests.rigs.usbip_suite import STICK, TWIN, UsbipClientContract
from usbip_plugin.clock import SystemClock
from usbip_plugin.usbip.client import TcpUsbipClient, UsbipClient
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.network import Host, Network
from usbip_sim.virtual.tcp import MemoryConnector


class TestTcp(UsbipClientContract):
    host = "127.0.0.1"

    @pytest.fixture
    async def server(self, clock: SteppedClock) -> AsyncIterator[VirtualServer]:
        server = VirtualServer([STICK, TWIN], self.host, clock=clock)
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


@NEEDS_IPV6
class TestTcpOverIPv6(TestTcp):
    host = "::1"


class TestSimulatedNetwork(UsbipClientContract):
    """The client on the simulation's TCP, which must behave like real TCP."""

    @pytest.fixture
    async def server(self, clock: SteppedClock) -> AsyncIterator[VirtualServer]:
        server = VirtualServer([STICK, TWIN], "server", 3240, clock=clock, listen=False)
        await server.start()
        yield server
        await server.stop()

    @pytest.fixture
    async def connect(
        self, server: VirtualServer, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[Callable[[], UsbipClient]]:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "sock_recv", lambda sock, size: sock.connection.receive(size))
        monkeypatch.setattr(loop, "sock_sendall", lambda sock, data: sock.connection.send(data))
        network = Network({server.key: server}.get)
        hosts: list[Host] = []

        def make() -> UsbipClient:
            hosts.append(Host(f"node-{len(hosts)}"))
            return TcpUsbipClient(SystemClock(), MemoryConnector(network, hosts[-1]))

        yield make
        assert sum(len(host.sockets) for host in hosts) == 0, "a socket was left open"
