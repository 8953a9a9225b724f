"""A UsbipClient that reaches virtual servers without sockets, for the simulation in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import DeviceUnknown, ServerTimeout, ServerUnreachable
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.socket import MemorySocket, SocketTable
from usbip_plugin.sim.usbdevice import Transfers
from usbip_plugin.usbip import protocol
from usbip_plugin.usbip.client import Imported, refusal
from usbip_plugin.usbip.probe import ControlPipe, DeviceIdentity, read_identity

T = TypeVar("T")


class MemoryUsbipClient:
    """One node's way to the servers.

    find: the server of a key, None for no such host. latency: seconds of one way, asked anew for each.
    Imported.sock is a MemorySocket of `sockets`, so that a simulated kernel can resolve its fileno().
    """

    def __init__(
        self,
        find: Callable[[ServerKey], VirtualServer | None],
        sockets: SocketTable,
        clock: Clock,
        latency: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._find, self._sockets, self._clock, self._latency = find, sockets, clock, latency
        self._cut: dict[ServerKey, list[_MemoryImporter]] = {}

    def cut(self, server: ServerKey) -> None:
        """Lose every packet between this node and the server, closes of connections included. A node that loses power
        is: cut, then close its sockets."""
        self._cut.setdefault(server, [])

    def mend(self, server: ServerKey) -> None:
        """The server now learns which connections were closed meanwhile."""
        for importer in self._cut.pop(server, []):
            importer.closed()

    async def devlist(self, server: ServerKey, *, timeout: float) -> tuple[Descriptor, ...]:
        try:
            async with self._clock.timeout(timeout):
                found = await self._reach(server)
                found.connections += 1
                devices = found.table.devlist()
                await self._travel(server)
                return devices
        except TimeoutError as late:
            raise ServerTimeout(server, "DEVLIST", timeout) from late

    async def import_device(self, key: DeviceKey, *, timeout: float) -> Imported:
        if not protocol.valid_busid(key.busid):
            raise DeviceUnknown(key)
        sock: MemorySocket | None = None
        try:
            async with self._clock.timeout(timeout):
                found = await self._reach(key.server)
                sock = self._sockets.open()
                importer = _MemoryImporter(self._cut, found, sock)
                reply = found.table.import_device(key.busid, importer)
                await self._travel(key.server)
            return Imported(key, _accepted(key, reply, sock), sock)
        except TimeoutError as late:
            _close(sock)
            raise ServerTimeout(key.server, f"IMPORT {key.busid}", timeout) from late
        except BaseException:
            _close(sock)
            raise

    async def probe(self, imported: Imported, *, timeout: float) -> DeviceIdentity:
        key = imported.key
        try:
            if not isinstance(imported.sock, MemorySocket):
                raise TypeError("this import was not made by a MemoryUsbipClient")
            try:
                async with self._clock.timeout(timeout):
                    await self._travel(key.server)
                    identity = await self._identify(imported, imported.sock)
                    await self._travel(key.server)
                    return identity
            except TimeoutError as late:
                raise ServerTimeout(key.server, f"GET_DESCRIPTOR of {key.busid}", timeout) from late
        finally:
            imported.close()

    async def _identify(self, imported: Imported, sock: MemorySocket) -> DeviceIdentity:
        server, busid = imported.key.server, imported.key.busid
        found = self._find(server)
        if found is not None:
            await found.answering()
        if found is None or sock.ended:
            raise ServerUnreachable(server, f"closed the connection instead of answering GET_DESCRIPTOR of {busid}")
        device, real = found.table.device(busid)
        answers = bytearray()
        steps = Transfers(device, real, answers.extend, lambda value: found.table.configure(busid, value)).run()
        next(steps)

        async def send(command: bytes) -> None:
            steps.send(command)

        async def read(size: int) -> bytes:
            data = bytes(answers[:size])
            del answers[:size]
            return data

        pipe = ControlPipe(imported.key, imported.descriptor.devid, read, send)
        return await read_identity(imported.key, imported.descriptor.usb_id, pipe)

    async def _travel(self, server: ServerKey) -> None:
        await self._clock.sleep(self._latency())
        if server in self._cut:
            await asyncio.get_running_loop().create_future()  # for ever: the caller's timeout ends it

    async def _reach(self, server: ServerKey) -> VirtualServer:
        await self._travel(server)
        found = self._find(server)
        if found is None:
            raise ServerUnreachable(server, "no such host")
        if not found.running:
            raise ServerUnreachable(server, "connection refused; is usbipd running there?")
        await found.answering()
        if not found.running:
            raise ServerUnreachable(server, "closed the connection instead of answering")
        return found


class _MemoryImporter:
    """The server's end of a memory connection."""

    def __init__(self, cut: dict[ServerKey, list[_MemoryImporter]], server: VirtualServer, sock: MemorySocket) -> None:
        self._cut, self._server, self._sock = cut, server, sock
        server.opened(self)
        sock.on_close(self._ended)

    def end(self) -> None:
        self._sock.server_end()
        self.closed()  # also where the client closed its side while it was cut off

    def closed(self) -> None:
        self._server.closed(self)

    def _ended(self) -> None:
        if self._server.key in self._cut and not self._sock.closed_by_peer:
            self._cut[self._server.key].append(self)
        else:
            self.closed()


def _accepted(key: DeviceKey, reply: protocol.ImportReply, sock: MemorySocket) -> Descriptor:
    if reply.descriptor is None:
        raise refusal(key, reply.status)
    if sock.closed_by_peer:
        raise ServerUnreachable(key.server, f"closed the connection after IMPORT {key.busid}")
    return reply.descriptor


def _close(sock: MemorySocket | None) -> None:
    if sock is not None:
        sock.close()
