"""TCP connections between nodes and USB/IP servers, on the links of network.py: lost data is sent again.

Failures follow Linux's TCP, because the plugin relies on its behaviour:
- keepalive and user timeout on the node's side, and no keepalive on usbipd's side;
- a FIN that is repeated for a while and then given up, and a RST that is not repeated;
- a connection that the other side does not know any more;
- a SYN from the port of such a connection, which ends it by a challenge ACK and a reset;
- the state TIME_WAIT, in which a port cannot be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import deque
from collections.abc import Callable

from usbip_plugin.errors import ServerUnreachable, SourceClosing, SourceNotLocal
from usbip_plugin.model import Endpoint, ServerKey
from usbip_plugin.usbip.connect import KEEPALIVE_COUNT, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, USER_TIMEOUT_MS, reset
from usbip_sim.server.server import ServerConnection, VirtualServer
from usbip_sim.sockets import CLOSED, Connection, MemorySocket
from usbip_sim.virtual.network import Host, Link, Network, NetworkConnection, Way

DEAD_PEER_S = float(KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT)
"""Seconds until keepalive finds the peer of an idle connection dead, from the plugin's own socket options."""
USER_TIMEOUT_S = USER_TIMEOUT_MS / 1000
"""Seconds for which sent data may stay unacknowledged before the node ends the connection (TCP_USER_TIMEOUT)."""
ORPHAN_S = USER_TIMEOUT_S
"""Seconds for which the node repeats the FIN of a connection that no process has open any more."""

_IMPORT_REQUEST = b"\x80\x03"


class TcpConnection(Connection):
    """TCP connection between a process on a node, or the node's kernel, and a server. A NetworkConnection."""

    def __init__(self, host: Host, link: Link, server: VirtualServer, port: int) -> None:
        super().__init__()
        self.host, self.link, self.server, self.port = host, link, server, port
        self.endpoint = Endpoint(host.address, port)
        self.node_up = True
        self.server_up = False
        self._network = link.network
        self._network.connections[self] = None
        self._to_server, self._to_node = Way(link), Way(link)
        self._protocol: ServerConnection | None = None
        self._transport = _ServerTransport(self)
        self._held: deque[bytes | None] = deque()
        self._paused = False
        self._inbox = bytearray()
        self._error: OSError | None = None
        self._readable = asyncio.Event()
        self._unacknowledged = 0
        self._timeout: asyncio.TimerHandle | None = None
        self._node_watchdog: asyncio.TimerHandle | None = None
        self._server_watchdog: asyncio.TimerHandle | None = None
        self._import: str | None = None
        self._was_accepted = False
        self._orphaned = False
        self._fin_sent = False

    @property
    def live_import(self) -> str | None:
        lost = self._was_accepted and not self.server_up
        if lost or not self.node_up or self.references == 0 or self._import is None:
            return None
        if self.server.is_fenced and (
            self._protocol is None or not self.server.table.is_importer(self._import, self._protocol)
        ):
            return None
        return self._import

    @property
    def closing(self) -> bool:
        return self._fin_sent and self.server_up and not (self._to_server.idle and not self._held)

    # The node's side.

    def dial(self, answer: asyncio.Future[None]) -> None:
        """Sends a SYN. answer is set when the server accepts it, or gets a ConnectionRefusedError."""
        self._to_server.send(lambda: self._syn_arrived(answer))

    def _dialled(self, answer: asyncio.Future[None], error: OSError | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(None)
            self.update_timers()
        else:
            answer.set_exception(error)

    async def receive(self, size: int) -> bytes:
        while not self._inbox and not self.ended:
            self._readable.clear()
            await self._readable.wait()
        if self._error is not None:
            raise self._error
        data = bytes(self._inbox[:size])
        del self._inbox[:size]
        return data

    def peek(self, size: int) -> bytes:
        if self._error is not None:
            raise self._error
        if not self._inbox and not self.ended:
            raise BlockingIOError(errno.EAGAIN, "no data")
        return bytes(self._inbox[:size])

    async def send(self, data: bytes) -> None:
        if self._error is not None:
            raise self._error
        if self.ended:
            raise BrokenPipeError(errno.EPIPE, "the other side has closed")
        if data[2:4] == _IMPORT_REQUEST:
            self._import = data[8:40].rstrip(b"\0").decode("ascii", "replace")
            self._network.on_change()
        self._unacknowledged += 1
        if self._timeout is None:
            self._timeout = self.host.later(USER_TIMEOUT_S, self._unanswered)
        self._to_server.send(lambda: self._arrived(data))

    def released(self) -> None:
        """Sends a FIN, which arrives, with the data before it, only if it gets through within ORPHAN_S; or a RST."""
        if not self.node_up:
            return
        if self.abortive:
            self._to_server.drop()
            self._leave_node(None)
            self._reset_server()
            self.update_timers()
            return
        self._fin_sent = True
        if self.server_up or (self.link.passable and not self._was_accepted):
            self._to_server.send(self._fin_arrived)
        elif not self._was_accepted:
            self._to_server.drop()
        self._leave_node(None)
        self.update_timers()

    def node_vanishes(self) -> None:
        self._leave_node(OSError(errno.ECONNABORTED, "no power"))
        self._to_server.drop()
        self.update_timers()

    def _unanswered(self) -> None:
        """Ends the node's side after a timeout. Sends a RST, which is not repeated."""
        self._timeout = self._node_watchdog = None
        if not self.node_up:
            return
        self._leave_node(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
        self._to_server.drop()
        self._reset_server()
        self.update_timers()

    def _reset_server(self) -> None:
        if self.link.passable:
            self._to_server.send(self.reset_by_node)

    def _leave_node(self, error: OSError | None, *, by_peer: bool = False) -> None:
        self.node_up = False
        for timer in (self._timeout, self._node_watchdog):
            if timer is not None:
                timer.cancel()
        self._timeout = self._node_watchdog = None
        self._error = self._error or error
        if by_peer or error is not None:
            self.peer_end()
        else:
            self.end()
        self._readable.set()
        self._network.on_change()
        self._forget()

    def _send_to_node(self, action: Callable[[], None]) -> None:
        """Runs action when a packet sent now arrives at the node. A frozen node runs it when it is thawed."""

        def arrive() -> None:
            if self.host.process is None:
                action()
            elif not self.host.process.dead:
                self.host.process.call_soon(action)

        self._to_node.send(arrive)

    def _data_arrived(self, data: bytes) -> None:
        if self.node_up:
            self._inbox += data
            self._readable.set()
        else:  # the node does not know the connection any more
            self._reset_server()

    def _challenged(self, old: NetworkConnection, answer: asyncio.Future[None]) -> None:
        """Resets a connection that the node does not know, and repeats the SYN of this one."""
        if self.link.passable:
            self._to_server.send(old.reset_by_node)
        if self.node_up:
            self._to_server.send(lambda: self._syn_arrived(answer))

    def reset_by_node(self) -> None:
        self._lose_server(_reset())

    def _peer_left(self, error: OSError | None) -> None:
        if self.node_up:
            self._leave_node(error, by_peer=True)

    # The server's side.

    def _syn_arrived(self, answer: asyncio.Future[None]) -> None:
        known = self._network.from_port(self.host, self.port, self.server.key)
        old = next((connection for connection in known if connection.server_up), None)
        if old is not None:  # a challenge ACK
            self._send_to_node(lambda: self._challenged(old, answer))
            return
        error: OSError | None = None
        self._was_accepted = True
        if self.server.running:
            self.server_up = True
            self._protocol = ServerConnection(self.server)
            self._protocol.connection_made(self._transport)
        else:
            error = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        self._send_to_node(lambda: self._dialled(answer, error))

    def server_write(self, data: bytes) -> None:
        if self.server_up:
            self._network.on_change()
            self._send_to_node(lambda: self._data_arrived(data))

    def server_close(self, error: OSError | None = None) -> None:
        """Ends the connection from the server's side: with a FIN, or with a RST if the node gets an error."""
        if self.server_up:
            self._lose_server(None)
            self._send_to_node(lambda: self._peer_left(error))

    def server_vanishes(self) -> None:
        self._to_node.drop()
        self._lose_server(None)

    def pause(self, paused: bool) -> None:
        self._paused = paused
        if not paused:
            self._network.call_soon(self._feed)

    def _arrived(self, data: bytes) -> None:
        self._unacknowledged -= 1
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = self.host.later(USER_TIMEOUT_S, self._unanswered) if self._unacknowledged else None
        if self.server_up:
            self._held.append(data)
            self._feed()
        elif self._was_accepted:  # the server does not know the connection any more
            self._send_to_node(lambda: self._peer_left(_reset()))

    def _fin_arrived(self) -> None:
        if self.server_up:
            self._held.append(None)
            self._feed()

    def _feed(self) -> None:
        while self._held and not self._paused and self.server_up and self._protocol is not None:
            data = self._held.popleft()
            if data is None:
                self.host.wait_out(self.server.key, self.port)
                self._lose_server(None)
            else:
                self._protocol.data_received(data)

    def _lose_server(self, error: OSError | None) -> None:
        if not self.server_up:
            return
        self.server_up = False
        if self._server_watchdog is not None:
            self._server_watchdog.cancel()
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(error)
        self._network.on_change()
        self.update_timers()
        self._forget()

    def _server_timed_out(self) -> None:
        self._server_watchdog = None
        self._to_node.drop()
        self._lose_server(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))

    # Both sides.

    def update_timers(self) -> None:
        if self.node_up and self._was_accepted:
            self._watch_server()
        if self.server_up and self.server.keepalive:
            self._watch_node()
        if not self.node_up and not self._to_server.idle and not self.link.passable and not self._orphaned:
            self._orphaned = True
            self.host.later(ORPHAN_S, self._to_server.drop)

    def _watch_server(self) -> None:
        """Starts or stops the node's keepalive timer, depending on whether the server would answer a probe."""
        if self.link.passable:
            if self._node_watchdog is not None:
                self._node_watchdog.cancel()
                self._node_watchdog = None
            if not self.server_up and self._to_node.idle:
                self._node_watchdog = self.host.later(KEEPALIVE_IDLE_S, self._probed)
        elif self._node_watchdog is None:
            self._node_watchdog = self.host.later(DEAD_PEER_S, self._unanswered)

    def _probed(self) -> None:
        """Ends the node's side by the RST with which the server answers a keepalive probe."""
        self._node_watchdog = None
        if self.link.passable and not self.server_up:
            self._peer_left(_reset())
        else:
            self.update_timers()  # the link has been cut since: no answer

    def _watch_node(self) -> None:
        """Starts or stops the server's keepalive timer."""
        unreachable = not self.link.passable or self.host.halted or not self.node_up
        if not unreachable and self._server_watchdog is not None:
            self._server_watchdog.cancel()
            self._server_watchdog = None
        elif unreachable and self._server_watchdog is None:
            self._server_watchdog = self._network.call_later(DEAD_PEER_S, self._server_timed_out)

    def _forget(self) -> None:
        """Removes the connection from the network once neither side knows it."""
        if not self.node_up and not self.server_up and (self._was_accepted or self._to_server.idle):
            self._network.connections.pop(self, None)


def _reset() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


class _ServerTransport(asyncio.Transport):
    """Transport of the server's protocol: writes to the node and ends the connection."""

    def __init__(self, connection: TcpConnection) -> None:
        super().__init__({"peername": (connection.host.address, connection.port)})
        self._connection = connection
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._connection.server_write(bytes(data))

    def close(self) -> None:
        self._closing = True
        self._connection.server_close()

    def abort(self) -> None:
        self._closing = True
        self._connection.server_close(_reset())

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._connection.pause(paused=True)

    def resume_reading(self) -> None:
        self._connection.pause(paused=False)


class MemoryConnector:
    """Dialler that opens simulated TCP connections for one process on a node."""

    def __init__(self, network: Network, host: Host) -> None:
        self._network, self._host = network, host
        self._opened: list[MemorySocket] = []
        self.address = host.address

    def close(self) -> None:
        """Does nothing: each socket belongs to the caller that asked for it."""

    def process_died(self) -> None:
        """Closes every socket of the process, as the operating system does when a process ends."""
        for sock in self._opened:
            sock.close()

    async def connect(self, server: ServerKey) -> MemorySocket:
        """Opens a connection to server. No timeout; cancel-safe. Raises ServerUnreachable, with the cause."""
        return await self.dial(server, self._host.next_port())

    async def bind(self, server: ServerKey, last: Endpoint | None = None) -> MemorySource:
        self._find(server)
        port = None
        if last is not None and last.address == self._host.address:
            known = self._network.from_port(self._host, last.port, server)
            if any(connection.closing for connection in known):
                raise SourceClosing(server, last)
            taken = any(connection.node_up for connection in known) or self._host.in_time_wait(server, last.port)
            port = None if taken else last.port
        return MemorySource(self, server, Endpoint(self._host.address, port or self._host.next_port()))

    async def end_half_open(self, server: ServerKey, source: Endpoint) -> bool:
        if source.address != self._host.address:
            raise SourceNotLocal(server, source)
        known = self._network.from_port(self._host, source.port, server)
        if self._host.in_time_wait(server, source.port):
            return False
        if any(connection.node_up or connection.closing for connection in known):
            raise ServerUnreachable(server, "cannot connect: Cannot assign requested address")
        with contextlib.suppress(ConnectionRefusedError):
            reset(await self._dial(server, source.port))
        return True

    def _find(self, server: ServerKey) -> VirtualServer:
        target = self._network.find(server)
        if target is None:
            raise ServerUnreachable(server, "no such host")
        return target

    async def dial(self, server: ServerKey, port: int) -> MemorySocket:
        """Opens a connection from a port of this host, as connect() does."""
        try:
            return await self._dial(server, port)
        except ConnectionRefusedError as error:
            raise ServerUnreachable(server, "connection refused; check that usbipd is running on the server") from error

    async def _dial(self, server: ServerKey, port: int) -> MemorySocket:
        connection = TcpConnection(self._host, self._network.link(self._host.name, server), self._find(server), port)
        sock = self._host.sockets.open(connection)
        self._opened = [*(other for other in self._opened if other.fileno() != CLOSED), sock]
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.dial(answer)
        try:
            await answer
        except BaseException:
            sock.close()
            raise
        return sock


class MemorySource:
    """Source of a MemoryConnector. Holds nothing, because the ports of a host are never used up."""

    def __init__(self, connector: MemoryConnector, server: ServerKey, endpoint: Endpoint) -> None:
        self._connector, self._server, self.endpoint = connector, server, endpoint

    async def connect(self) -> MemorySocket:
        return await self._connector.dial(self._server, self.endpoint.port)

    def close(self) -> None:
        """Does nothing: connections belong to the caller that asked for them."""
