"""Connections from a process on a simulated node to USB/IP servers, for the production USB/IP client."""

from __future__ import annotations

import asyncio

from usbip_plugin.errors import ServerUnreachable
from usbip_plugin.model import ServerKey
from usbip_sim.sockets import CLOSED, MemorySocket
from usbip_sim.virtual.network import Host, Network
from usbip_sim.virtual.tcp import TcpConnection


class MemoryConnector:
    """Dialler that opens simulated TCP connections for one process on a node."""

    def __init__(self, network: Network, host: Host) -> None:
        self._network, self._host = network, host
        self._opened: list[MemorySocket] = []

    def close(self) -> None:
        """Does nothing: each socket belongs to the caller that asked for it."""

    def killed(self) -> None:
        """Closes every socket of the process, as the operating system does when a process ends."""
        for sock in self._opened:
            sock.close()

    async def connect(self, server: ServerKey) -> MemorySocket:
        """Opens a connection to server. No timeout; cancel-safe. Raises ServerUnreachable, with the cause."""
        found = self._network.find(server)
        if found is None:
            raise ServerUnreachable(server, "no such host")
        connection = TcpConnection(self._host, self._network.link(self._host.name, server), found)
        sock = self._host.sockets.open(connection)
        self._opened = [*(other for other in self._opened if other.fileno() != CLOSED), sock]
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.dial(answer)
        try:
            await answer
        except ConnectionRefusedError as refused:
            sock.close()
            raise ServerUnreachable(server, "connection refused; is usbipd running there?") from refused
        except BaseException:
            sock.close()
            raise
        return sock
