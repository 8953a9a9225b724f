"""TCP between nodes and USB/IP servers in virtual time: bytes that travel, get lost, and are sent again.

The production client runs on it, and the virtual server's own protocol class. What TCP does when something goes wrong
is modelled as Linux does it, because the plugin relies on it: keepalive and user timeout on the node's side, no
keepalive on usbipd's, a FIN that is repeated for a while and then given up, a RST that is not, a connection of which
the other side knows nothing any more.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from contextvars import Context

from usbip_plugin.errors import ServerUnreachable
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.socket import CLOSED, Connection, MemorySocket, SocketTable
from usbip_plugin.sim.steploop import Process
from usbip_plugin.usbip.connect import KEEPALIVE_COUNT, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, USER_TIMEOUT_MS

DEAD_PEER_S = float(KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT)
"""Seconds after which an idle connection finds its other side dead."""
USER_TIMEOUT_S = USER_TIMEOUT_MS / 1000
"""Seconds for which sent data may stay unacknowledged."""
ORPHAN_S = USER_TIMEOUT_S
"""Seconds for which the FIN of a connection that nobody has open any more is repeated."""

_IMPORT_REQUEST = b"\x80\x03"


class Host:
    """A node's kernel, as far as TCP goes. rate: of its clock. process: what freezes with it, None: it never does."""

    def __init__(self, name: str, process: Process | None = None, rate: float = 1.0) -> None:
        self.name = name
        self.sockets = SocketTable()
        self.process = process
        self._rate = rate

    @property
    def halted(self) -> bool:
        return self.process is not None and self.process.halted

    def later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """seconds of its own clock."""
        context = self.process.context if self.process is not None else None
        return asyncio.get_running_loop().call_later(seconds / self._rate, callback, context=context)


class Network:
    """All links. latency: seconds of one way, asked anew for each; find: a server by its key, None for no such host.

    on_change is called whenever `imports` may have changed.
    """

    def __init__(
        self,
        find: Callable[[ServerKey], VirtualServer | None],
        latency: Callable[[], float] = lambda: 0.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.find, self.latency, self.on_change = find, latency, on_change
        self.outside = Context()  # of nobody: the network goes on when a sender is frozen or dead
        self.connections: dict[TcpConnection, None] = {}
        self._links: dict[tuple[str, ServerKey], Link] = {}
        self._dark: dict[ServerKey, None] = {}

    def link(self, node: str, server: ServerKey) -> Link:
        """Between a node and a server; made when first asked for."""
        return self._links.setdefault((node, server), Link(self, server))

    def dark(self, server: ServerKey) -> bool:
        return server in self._dark

    def power(self, server: ServerKey, *, on: bool) -> None:
        """A server's host loses its power, and with it, without a word, all connections; or it comes back."""
        if on:
            self._dark.pop(server, None)
        else:
            self._dark[server] = None
            for connection in self._of(server=server):
                connection.server_vanishes()
        for (_, key), link in self._links.items():
            if key == server:
                link.changed()

    def vanish(self, host: Host) -> None:
        """A node loses its power: nobody is told."""
        for connection in self._of(host=host):
            connection.node_vanishes()

    def look_again(self, host: Host) -> None:
        """A node was frozen or thawed."""
        for connection in self._of(host=host):
            connection.look_again()

    def imports(self) -> dict[DeviceKey, list[str]]:
        """By device: the nodes with an IMPORT under way or granted, by their own account, once for each connection.

        That is: it was sent, the node has the socket open, and the server has not ended the connection.
        """
        found: dict[DeviceKey, list[str]] = {}
        for connection in self.connections:
            busid = connection.live_import
            if busid is not None:
                found.setdefault(DeviceKey(connection.server.key, busid), []).append(connection.host.name)
        return found

    def half_open(self, server: ServerKey) -> int:
        """Connections that the server holds and nobody else knows of."""
        return sum(connection.server_up and not connection.node_up for connection in self._of(server=server))

    def call_soon(self, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(callback, context=self.outside)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, callback, context=self.outside)

    def _of(self, host: Host | None = None, server: ServerKey | None = None) -> list[TcpConnection]:
        return [c for c in self.connections if host in (None, c.host) and server in (None, c.server.key)]


class Link:
    """The way between one node and one server."""

    def __init__(self, network: Network, server: ServerKey) -> None:
        self.network = network
        self.slow = 0.0
        """Seconds more for each way."""
        self._server = server
        self._cut = False
        self._waiting: list[Callable[[], None]] = []

    @property
    def passable(self) -> bool:
        return not self._cut and not self.network.dark(self._server)

    @property
    def is_cut(self) -> bool:
        return self._cut

    def cut(self) -> None:
        """From now on every packet is lost, either way."""
        self._cut = True
        self.changed()

    def mend(self) -> None:
        """What was not given up meanwhile is sent again."""
        self._cut = False
        self.changed()

    def changed(self) -> None:
        for connection in tuple(self.network.connections):
            if connection.link is self:
                connection.look_again()
        if self.passable:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()

    def way(self) -> float:
        """Seconds that a packet sent now takes."""
        return self.network.latency() + self.slow

    def when_passable(self, callback: Callable[[], None]) -> None:
        if self.passable:
            callback()
        else:
            self._waiting.append(callback)


class _Way:
    """One direction of a connection: everything arrives, once and in order, or never."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._last = 0.0
        self._moving = False

    @property
    def idle(self) -> bool:
        return not self._queue

    def send(self, arrives: Callable[[], None]) -> None:
        now = asyncio.get_running_loop().time()
        self._last = max(self._last, now + self._link.way())
        self._queue.append((self._last, arrives))
        if not self._moving:
            self._move()

    def drop(self) -> None:
        """Nothing of what is under way arrives."""
        self._queue.clear()

    def _move(self) -> None:
        self._moving = bool(self._queue)
        if self._queue:
            wait = max(0.0, self._queue[0][0] - asyncio.get_running_loop().time())
            self._link.network.call_later(wait, lambda: self._link.when_passable(self._arrive))

    def _arrive(self) -> None:
        if self._queue:
            self._queue.popleft()[1]()
        self._move()


class TcpConnection(Connection):
    """Between a process on a node, or its kernel, and a server. Made by MemoryConnector.

    node_up, server_up: whether each side's TCP knows of it. Methods named after what happens are the network's.
    """

    def __init__(self, host: Host, link: Link, server: VirtualServer) -> None:
        super().__init__()
        self.host, self.link, self.server = host, link, server
        self.node_up = True
        self.server_up = False
        self._network = link.network
        self._network.connections[self] = None
        self._to_server, self._to_node = _Way(link), _Way(link)
        self._protocol: asyncio.Protocol | None = None
        self._transport = _ServerTransport(self)
        self._held: deque[bytes | None] = deque()
        self._paused = False
        self._inbox = bytearray()
        self._error: OSError | None = None
        self._readers: list[asyncio.Future[None]] = []
        self._sent = False
        self._unacknowledged = 0
        self._timeout: asyncio.TimerHandle | None = None
        self._node_watchdog: asyncio.TimerHandle | None = None
        self._server_watchdog: asyncio.TimerHandle | None = None
        self._import: str | None = None
        self._was_accepted = False
        self._orphaned = False

    @property
    def live_import(self) -> str | None:
        """The bus id of an IMPORT by it that may still be under way, or stands."""
        lost = self._was_accepted and not self.server_up
        return None if lost or not self.node_up or self.references == 0 else self._import

    # the node's side

    def dial(self, answer: asyncio.Future[None]) -> None:
        """A SYN. answer: when the server has accepted it, or ConnectionRefusedError."""
        self._to_server.send(lambda: self._syn_arrived(answer))

    def _dialled(self, answer: asyncio.Future[None], error: OSError | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(None)
            self.look_again()
        else:
            answer.set_exception(error)

    async def receive(self, size: int) -> bytes:
        while not self._inbox and not self.ended:
            reader: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._readers.append(reader)
            try:
                await reader
            finally:
                if reader in self._readers:
                    self._readers.remove(reader)
        if self._error is not None:
            raise self._error
        data = bytes(self._inbox[:size])
        del self._inbox[:size]
        return data

    def peek(self, size: int) -> bytes:
        if self._error is not None:
            raise self._error
        if not self._inbox and not self.ended:
            raise BlockingIOError(errno.EAGAIN, "nothing has come")
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
        """Every reference on the node is closed: a FIN, and what was sent before it, if it gets through in time."""
        if not self.node_up:
            return
        if self.server_up or (self.link.passable and not self._was_accepted):
            self._to_server.send(self._fin_arrived)
        elif not self._was_accepted:
            self._to_server.drop()
        self._leave_node(None)
        self.look_again()

    def node_vanishes(self) -> None:
        """The node is without power."""
        self._leave_node(OSError(errno.ECONNABORTED, "no power"))
        self._to_server.drop()
        self.look_again()

    def _unanswered(self) -> None:
        """The node's timers say that the other side is dead: a RST, which gets through now or never."""
        self._timeout = self._node_watchdog = None
        if not self.node_up:
            return
        self._leave_node(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
        self._to_server.drop()
        if self.link.passable:
            self._to_server.send(lambda: self._lose_server(ConnectionResetError(errno.ECONNRESET, "reset")))
        self.look_again()

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
        self._wake()
        self._network.on_change()
        self._forget()

    def _wake(self) -> None:
        readers, self._readers = self._readers, []
        for reader in readers:
            if not reader.done():
                reader.set_result(None)

    def _on_node(self, action: Callable[[], None]) -> None:
        """What has arrived at the node; a frozen one sees to it later."""
        if self.host.process is None:
            action()
        elif not self.host.process.dead:
            self.host.process.call_soon(action)

    def _data_came(self, data: bytes) -> None:
        if self.node_up:
            self._inbox += data
            self._wake()
        elif self.link.passable:  # nobody here: a RST
            self._to_server.send(lambda: self._lose_server(ConnectionResetError(errno.ECONNRESET, "reset")))

    def _peer_left(self, error: OSError | None) -> None:
        if self.node_up:
            self._leave_node(error, by_peer=True)

    # the server's side

    def _syn_arrived(self, answer: asyncio.Future[None]) -> None:
        error: OSError | None = None
        self._was_accepted = True
        if self.server.running:
            self.server_up = True
            self._protocol = self.server.accept()
            self._protocol.connection_made(self._transport)
        else:
            error = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        self._to_node.send(lambda: self._on_node(lambda: self._dialled(answer, error)))

    def server_write(self, data: bytes) -> None:
        if self.server_up:
            self._to_node.send(lambda: self._on_node(lambda: self._data_came(data)))

    def server_close(self, error: OSError | None = None) -> None:
        """The server ends it, with a FIN or, if there is an error to tell the node, with a RST."""
        if self.server_up:
            self._lose_server(None)
            self._to_node.send(lambda: self._on_node(lambda: self._peer_left(error)))

    def server_vanishes(self) -> None:
        """The server's host is without power."""
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
        elif self._was_accepted:
            self._refuse()

    def _refuse(self) -> None:
        """Nobody knows of this connection here: a RST."""
        error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        self._to_node.send(lambda: self._on_node(lambda: self._peer_left(error)))

    def _fin_arrived(self) -> None:
        if self.server_up:
            self._held.append(None)
            self._feed()

    def _feed(self) -> None:
        while self._held and not self._paused and self.server_up and self._protocol is not None:
            data = self._held.popleft()
            if data is None:
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
        self.look_again()
        self._forget()

    def _server_timed_out(self) -> None:
        self._server_watchdog = None
        self._to_node.drop()
        self._lose_server(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))

    # both

    def look_again(self) -> None:
        """A link, a host or a side has changed: does anybody's keepalive now run out, or stop running out?"""
        if self.node_up and self._was_accepted:
            self._watch_server()
        if self.server_up and self.server.keepalive:
            self._watch_node()
        if not self.node_up and not self._to_server.idle and not self.link.passable and not self._orphaned:
            self._orphaned = True
            self.host.later(ORPHAN_S, self._to_server.drop)

    def _watch_server(self) -> None:
        """The node's keepalive."""
        unheard = not self.link.passable
        reset = not unheard and not self.server_up and self._to_node.idle
        if self._node_watchdog is not None and not unheard:
            self._node_watchdog.cancel()
            self._node_watchdog = None
        if unheard and self._node_watchdog is None:
            self._node_watchdog = self.host.later(DEAD_PEER_S, self._unanswered)
        elif reset:
            self._node_watchdog = self.host.later(KEEPALIVE_IDLE_S, self._probed)

    def _probed(self) -> None:
        """A keepalive probe is answered by a host that does not know of the connection."""
        self._node_watchdog = None
        if self.link.passable and not self.server_up:
            self._peer_left(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))
        else:
            self.look_again()  # the way is cut by now: nobody answers

    def _watch_node(self) -> None:
        """The server's keepalive, where it has one. A node that is there but knows nothing answers with a RST."""
        unheard = not self.link.passable or self.host.halted or not self.node_up
        if not unheard and self._server_watchdog is not None:
            self._server_watchdog.cancel()
            self._server_watchdog = None
        elif unheard and self._server_watchdog is None:
            self._server_watchdog = self._network.call_later(DEAD_PEER_S, self._server_timed_out)

    def _forget(self) -> None:
        """When neither side knows of it."""
        if not self.node_up and not self.server_up and (self._was_accepted or self._to_server.idle):
            self._network.connections.pop(self, None)


class _ServerTransport(asyncio.Transport):
    """What the server's protocol writes to."""

    def __init__(self, connection: TcpConnection) -> None:
        super().__init__({"peername": (connection.host.name, 0)})
        self._connection = connection
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._connection.server_write(bytes(data))

    def close(self) -> None:
        self._closing = True
        self._connection.server_close()

    def abort(self) -> None:
        self._closing = True
        self._connection.server_close(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._connection.pause(paused=True)

    def resume_reading(self) -> None:
        self._connection.pause(paused=False)


class MemoryConnector:
    """How one process on a node opens connections; see Dialler."""

    def __init__(self, network: Network, host: Host) -> None:
        self._network, self._host = network, host
        self._opened: list[MemorySocket] = []

    def close(self) -> None:
        """Nothing to close: sockets belong to who asked for them."""

    def killed(self) -> None:
        """What the operating system does for a process that has ended: every socket that it still has is closed."""
        for sock in self._opened:
            sock.close()

    async def connect(self, server: ServerKey) -> MemorySocket:
        """Not bounded in time; cancel-safe. ServerUnreachable says why."""
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
