"""TCP connections without a network, whose sockets the simulation passes from client to kernel in place of fds."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from usbip_plugin.model import Endpoint
from usbip_plugin.sync import Broadcast

CLOSED = -1


class Connection:
    """Connection that all its MemorySocket references share. Carries no data, unlike TcpConnection.

    endpoint: its local end, None if it has no address.
    abortive: its last reference ends it with a RST instead of a FIN.
    """

    endpoint: Endpoint | None = None

    def __init__(self) -> None:
        self.references = 0
        self.abortive = False
        self.closed_by_peer = False
        self.ended = False
        self._end = Broadcast()

    def on_end(self, callback: Callable[[], None]) -> Callable[[], None]:
        if self.ended:
            callback()
            return lambda: None
        return self._end.subscribe(callback)

    def end(self) -> None:
        """Ends the connection and calls the on_end() callbacks. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._end.fire()

    def peer_end(self) -> None:
        """Ends the connection from the other side. Idempotent."""
        if not self.ended:
            self.closed_by_peer = True
        self.end()

    def released(self) -> None:
        """Ends the connection after its last reference is closed."""
        self.end()

    def peek(self, size: int) -> bytes:
        """Reads data without removing it, as recv with MSG_PEEK and MSG_DONTWAIT does."""
        raise OSError(errno.ENOTCONN, f"no data here, not {size} bytes")

    async def receive(self, size: int) -> bytes:
        """Reads data, as loop.sock_recv does."""
        raise OSError(errno.ENOTCONN, f"no data here, not {size} bytes")

    async def send(self, data: bytes) -> None:
        """Sends data, as loop.sock_sendall does."""
        raise OSError(errno.ENOTCONN, f"cannot carry {len(data)} bytes")


class SocketTable:
    """Table of open MemorySockets. Tokens stand for fds; a token is below -1 and never reused."""

    def __init__(self) -> None:
        self._next_token = CLOSED - 1
        self._open: dict[int, MemorySocket] = {}

    def open(self, connection: Connection | None = None) -> MemorySocket:
        """Returns a new reference to the connection. Without one, makes a connection that carries no data."""
        token = self._next_token
        self._next_token -= 1
        self._open[token] = MemorySocket(self, connection or Connection(), token)
        return self._open[token]

    def resolve(self, token: int) -> MemorySocket | None:
        """Returns the open reference with this token, None if it was closed or never existed."""
        return self._open.get(token)

    def __len__(self) -> int:
        """Returns the number of references that are not closed."""
        return len(self._open)

    def forget(self, token: int) -> None:
        """Removes a reference. Only MemorySocket.close calls this."""
        del self._open[token]


class MemorySocket(socket.socket):
    """Counted reference to a connection, as a file descriptor is one. Made by SocketTable.open and dup only.

    Derived from socket.socket for callers that need that type; supports only the methods defined here.
    """

    def __init__(self, table: SocketTable, connection: Connection, token: int) -> None:
        self._table, self.connection, self._token = table, connection, token
        connection.references += 1

    def __repr__(self) -> str:
        return f"<MemorySocket {self._token}>"

    def fileno(self) -> int:
        """Returns the token, or -1 once this reference is closed."""
        return self._token

    def dup(self) -> MemorySocket:
        """Returns another reference to the same connection. Raises ValueError if this reference is closed."""
        if self._token == CLOSED:
            raise ValueError("dup of a closed MemorySocket")
        return self._table.open(self.connection)

    def close(self) -> None:
        """Closes this reference. Closing the last reference ends the connection. Idempotent."""
        if self._token == CLOSED:
            return
        self._table.forget(self._token)
        self._token = CLOSED
        self.connection.references -= 1
        if self.connection.references == 0:
            self.connection.released()

    def on_close(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls callback once, synchronously, when either side ends the connection; at once if it has ended.

        Returns a function that removes the callback, and that may be called any number of times.
        """
        return self.connection.on_end(callback)

    def server_end(self) -> None:
        """Ends the connection from the server's side. References stay open until their owners close them."""
        self.connection.peer_end()

    @property
    def closed_by_peer(self) -> bool:
        """True once the server has ended the connection, which a real socket shows by EOF."""
        return self.connection.closed_by_peer

    @property
    def ended(self) -> bool:
        """True once either side has ended the connection."""
        return self.connection.ended

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None, /) -> None:  # noqa: ARG002
        """Sets SO_LINGER to zero seconds only. Raises OSError for other options."""
        if (level, optname) != (socket.SOL_SOCKET, socket.SO_LINGER):
            raise OSError(errno.ENOPROTOOPT, "no such option")
        self.connection.abortive = True

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Peeks at data, with the flags MSG_PEEK and MSG_DONTWAIT only. Raises OSError for other flags.

        MemoryStreams.sock_recv reads data.
        """
        if flags != socket.MSG_PEEK | socket.MSG_DONTWAIT:
            raise OSError(errno.EOPNOTSUPP, "use the loop")
        return self.connection.peek(bufsize)


class MemoryStreams(asyncio.AbstractEventLoop):
    """Mixin that makes an event loop's sock_recv and sock_sendall work on MemorySockets, too."""

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        if isinstance(sock, MemorySocket):
            return await sock.connection.receive(nbytes)
        return await super().sock_recv(sock, nbytes)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        if isinstance(sock, MemorySocket):
            await sock.connection.send(bytes(data))
        else:
            await super().sock_sendall(sock, data)
