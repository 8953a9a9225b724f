"""A USB/IP server with virtual devices and injected faults, over real TCP or, without sockets, virtual/tcp.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Coroutine, Iterable

from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.exporter.gate import Gate, OpenGate, Refusal
from usbip_plugin.model import Endpoint, ServerKey
from usbip_plugin.sync import Broadcast
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.connect import set_options
from usbip_sim.server.exports import ExportTable
from usbip_sim.server.usbdevice import Transfers, VirtualDevice

_BACKLOG = 100  # connections that wait to be accepted
RESET_TIME = 0.3  # seconds that a device is busy after its importer has gone, as measured on usbip-host
_CLOSE_TIMEOUT = 5.0
_NO_MORE = sys.maxsize  # bytes for which a connection waits that must not go on yet


class VirtualServer:
    """USB/IP server with virtual devices, over TCP or on the simulated network.

    port: with 0 the system chooses a port at the first start; later starts keep that port.
    reset_time: seconds that a device stays busy after its importer has gone.
    listen: False for the simulated network only; then port must be given.
    keepalive: the server detects that a client's host has gone. usbipd does not.
    gate: decides which connections may have a device, as in the exporter.
    connections: number of connections ever made.
    """

    def __init__(
        self,
        devices: Iterable[VirtualDevice] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        clock: Clock | None = None,
        reset_time: float = RESET_TIME,
        listen: bool = True,
        keepalive: bool = False,
    ) -> None:
        self._clock = clock or SystemClock()
        self._host, self._port, self._listen = host, port, listen
        self.keepalive = keepalive
        self.table = table = ExportTable(devices, self._clock, reset_time)
        self.plug, self.unplug, self.drop, self.lie = table.plug, table.unplug, table.drop, table.lie
        self.importers, self.violations = table.importers, table.violations
        self._tasks: set[asyncio.Task[None]] = set()
        self.gate: Gate = OpenGate()
        self._leave_gate = self.gate.subscribe(self.check)
        self.connections = 0
        self.running = False
        self.frozen = False
        self._listener: socket.socket | None = None
        self._open: dict[ServerConnection, None] = {}
        self._closed, self._thawed = Broadcast(), Broadcast()

    @property
    def key(self) -> ServerKey:
        return ServerKey(self._host, self._port)

    def use_gate(self, gate: Gate) -> None:
        """Replaces the gate. Connections stay until the new one ends them."""
        self._leave_gate()
        self.gate = gate
        self._leave_gate = gate.subscribe(self.check)

    def check(self, busid: str) -> None:
        """Ends the connections that may not keep the device, unless the server is down or frozen."""
        if not self.running or self.frozen:
            return
        for connection in tuple(self._open):
            if self.table.is_importer(busid, connection) and not self.gate.may_stay(busid, connection.peer):
                connection.end()

    @property
    def is_fenced(self) -> bool:
        return not isinstance(self.gate, OpenGate)

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Runs work as a task of the server, until it stops."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def start(self) -> None:
        """Starts to answer, on the same port as before. Idempotent."""
        if self._listen and self._listener is None:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listener = socket.create_server((self._host, self._port), family=family, backlog=_BACKLOG)
            self._listener.setblocking(False)
            self._port = self._listener.getsockname()[1]
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        self.running = True

    def _accept(self, listener: socket.socket) -> None:
        """Accepts a connection. An asyncio.Server would not close one that it accepts just before it is closed."""
        try:
            sock, _ = listener.accept()
        except OSError:  # the client has hung up
            return
        sock.setblocking(False)
        task = self.spawn(self._begin(sock))
        task.add_done_callback(lambda task: sock.close() if task.cancelled() else None)

    async def _begin(self, sock: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: ServerConnection(self), sock)

    async def stop(self) -> None:
        """Ends every connection and refuses new ones. Waits until every connection has ended.

        Raises TimeoutError after _CLOSE_TIMEOUT seconds.
        """
        self.halt()
        async with self._clock.timeout(_CLOSE_TIMEOUT):
            await self._closed.until(lambda: not self._open)

    def halt(self, *, keep_imports: bool = False) -> None:
        """Ends every connection and refuses new ones.

        keep_imports: keeps the connections, as if only the daemon dies and the server's kernel goes on.
        """
        self.running = False
        self.thaw()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in tuple(self._tasks):
            task.cancel()
        if not keep_imports:
            for connection in tuple(self._open):
                connection.end()

    def freeze(self) -> None:
        """Stops answering: accepts connections, but reads nothing and does not notice the end of a connection."""
        self.frozen = True
        self._pause_or_resume()

    def thaw(self) -> None:
        self.frozen = False
        self._thawed.fire()
        self._pause_or_resume()
        for device in self.table.devices():
            self.check(device.busid)

    async def until_thawed(self) -> None:
        """Waits until the server is not frozen. Cancel-safe, no timeout."""
        await self._thawed.until(lambda: not self.frozen)

    def peers(self, busid: str) -> list[Endpoint]:
        """Returns the other ends of the connections to which the device is exported."""
        return [one.peer for one in self._open if one.peer is not None and self.table.is_importer(busid, one)]

    async def until_released(self, busid: str) -> None:
        """Waits until the device has no importer; its reset may still be under way. Cancel-safe, no timeout."""
        await self._closed.until(lambda: not self.importers(busid))

    def opened(self, connection: ServerConnection) -> None:
        """Records a connection that has begun."""
        self.connections += 1
        self._open[connection] = None

    def closed(self, connection: ServerConnection) -> None:
        """Forgets a connection that has ended, and releases its device."""
        self.table.release(connection)
        self._open.pop(connection, None)
        self._closed.fire()

    def _pause_or_resume(self) -> None:
        for connection in self._open:
            connection.pause(self.frozen)


class ServerConnection(asyncio.Protocol):
    """Connection to a VirtualServer. Driven by received data, without a task of its own."""

    def __init__(self, server: VirtualServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._steps = self._serve()
        self._need = next(self._steps)
        self._client_blocked = False  # the client does not read its answers
        self._refusal: Refusal | None = None
        self.peer: Endpoint | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"expected a stream transport, got {transport!r}")
        self._transport = transport
        if (name := transport.get_extra_info("peername")) is not None:
            self.peer = Endpoint.of(name)
        sock = transport.get_extra_info("socket")
        if self._server.keepalive and sock is not None:
            with contextlib.suppress(OSError):  # the connection has ended already
                set_options(sock)
        self._server.opened(self)
        if not self._server.running:  # it was accepted just before the server stopped
            self.end()
            return
        # Soon, not now: before CPython 3.11.4 the transport starts to read after this call, even if paused in it.
        asyncio.get_running_loop().call_soon(lambda: self.pause(self._server.frozen))

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= self._need:
            piece = bytes(self._received[: self._need])
            del self._received[: self._need]
            if not self._advance(piece):
                return

    def _advance(self, piece: bytes) -> bool:
        """Goes on with the conversation. Returns whether it has not ended."""
        try:
            self._need = self._steps.send(piece)
        except (StopIteration, wire.ProtocolViolation):
            if self._transport is not None:
                self._transport.close()
            return False
        return True

    def pause_writing(self) -> None:
        """Stops reading from a client that does not read its answers, to bound the write buffer."""
        self._client_blocked = True
        self.pause(self._server.frozen)

    def resume_writing(self) -> None:
        self._client_blocked = False
        self.pause(self._server.frozen)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's interface)
        self._transport = None
        self._server.closed(self)

    def end(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self, paused: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if paused or self._client_blocked:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _serve(self) -> wire.Decoding[None]:
        table, gate = self._server.table, self._server.gate
        request = yield from wire.request()
        if isinstance(request, wire.DevlistRequest):
            self._write(wire.encode_devlist_reply(table.devlist()))
            return
        if self.peer is not None and not isinstance(gate, OpenGate):
            self._server.spawn(self._ask(gate, request.busid, self.peer))
            yield _NO_MORE  # until _ask() has the answer
            if self._refusal is not None:
                table.refused += 1
                self._write(wire.encode_import_reply(wire.ImportReply(wire.ST_NA, None)))
                return
        reply = table.import_device(request.busid, self)
        while reply is None:
            yield 1  # until the client hangs up
        self._write(wire.encode_import_reply(reply))
        if reply.descriptor is not None:
            device, real = table.device(request.busid)
            yield from Transfers(device, real, self._write, lambda value: table.configure(device.busid, value)).run()

    async def _ask(self, gate: Gate, busid: str, peer: Endpoint) -> None:
        """Asks the gate, and goes on with its answer in the same step, so that nothing changes in between."""
        self._refusal = await gate.admits(busid, peer)
        while self._server.frozen:
            await self._server.until_thawed()
            self._refusal = await gate.admits(busid, peer)
        if self._transport is not None and self._advance(b""):
            self.data_received(b"")
