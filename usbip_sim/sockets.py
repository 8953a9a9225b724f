"""A TCP connection without a network: what the simulation hands from client to kernel in place of a file descriptor."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

CLOSED = -1


class Connection:
    """What all references to one connection share. This one carries no data; see tcp.py for one that does."""

    def __init__(self) -> None:
        self.references = 0
        self.closed_by_peer = False
        self.ended = False
        self._callbacks: list[Callable[[], None]] = []

    def on_end(self, callback: Callable[[], None]) -> Callable[[], None]:
        """See MemorySocket.on_close."""
        if self.ended:
            callback()
            return lambda: None
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    def end(self) -> None:
        """It carries nothing any more. Idempotent."""
        if self.ended:
            return
        self.ended = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def peer_end(self) -> None:
        """The other side has ended it. Idempotent."""
        if not self.ended:
            self.closed_by_peer = True
        self.end()

    def released(self) -> None:
        """The last reference has been closed."""
        self.end()

    def peek(self, size: int) -> bytes:
        """As recv with MSG_PEEK and MSG_DONTWAIT."""
        raise OSError(errno.ENOTCONN, f"no data here, not {size} bytes")

    async def receive(self, size: int) -> bytes:
        """As loop.sock_recv."""
        raise OSError(errno.ENOTCONN, f"no data here, not {size} bytes")

    async def send(self, data: bytes) -> None:
        """As loop.sock_sendall."""
        raise OSError(errno.ENOTCONN, f"no way for {len(data)} bytes")


class SocketTable:
    """All connections of one simulated world. Tokens take the place of fds: below -1, never reused."""

    def __init__(self) -> None:
        self._next_token = CLOSED - 1
        self._open: dict[int, MemorySocket] = {}

    def open(self, connection: Connection | None = None) -> MemorySocket:
        """A reference to a connection, to a new one that carries no data if none is given."""
        token = self._next_token
        self._next_token -= 1
        self._open[token] = MemorySocket(self, connection or Connection(), token)
        return self._open[token]

    def resolve(self, token: int) -> MemorySocket | None:
        """The open reference behind a token, None if it was closed or never existed."""
        return self._open.get(token)

    def __len__(self) -> int:
        """References not closed yet: 0 when nothing leaks."""
        return len(self._open)

    def forget(self, token: int) -> None:
        """For MemorySocket.close."""
        del self._open[token]


class MemorySocket(socket.socket):
    """One counted reference to a connection, as a file descriptor is one. Made by SocketTable.open and dup only.

    A socket by type, for those who want one; it has no file descriptor, and can do no more than what stands here.
    """

    def __init__(self, table: SocketTable, connection: Connection, token: int) -> None:
        self._table = table
        self._connection = connection
        self._token = token
        connection.references += 1

    def __repr__(self) -> str:
        return f"<MemorySocket {self._token}>"

    @property
    def connection(self) -> Connection:
        return self._connection

    def fileno(self) -> int:
        """The token, -1 once this reference is closed."""
        return self._token

    def dup(self) -> MemorySocket:
        """Another reference to the same connection. ValueError if this one is closed."""
        if self._token == CLOSED:
            raise ValueError("dup of a closed MemorySocket")
        return self._table.open(self._connection)

    def close(self) -> None:
        """Idempotent. Closing the last reference ends the connection."""
        if self._token == CLOSED:
            return
        self._table.forget(self._token)
        self._token = CLOSED
        self._connection.references -= 1
        if self._connection.references == 0:
            self._connection.released()

    def on_close(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once, synchronously, when the connection ends: the last reference closed, or the server ended it.

        At once if it has ended already. Returns a function that takes the callback back; callable any number of times.
        """
        return self._connection.on_end(callback)

    def server_end(self) -> None:
        """The server's side: end the connection. References stay open until their owners close them. Idempotent."""
        self._connection.peer_end()

    @property
    def closed_by_peer(self) -> bool:
        """True once the server ended the connection, as a read that returns EOF would tell."""
        return self._connection.closed_by_peer

    @property
    def ended(self) -> bool:
        """True once either side has ended the connection."""
        return self._connection.ended

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """With MSG_PEEK and MSG_DONTWAIT only: everything else is for the loop, see MemoryStreams."""
        if flags != socket.MSG_PEEK | socket.MSG_DONTWAIT:
            raise OSError(errno.EOPNOTSUPP, "use the loop")
        return self._connection.peek(bufsize)


class MemoryStreams(asyncio.AbstractEventLoop):
    """Mixed into an event loop: it reads and writes MemorySockets, too."""

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        if isinstance(sock, MemorySocket):
            return await sock.connection.receive(nbytes)
        return await super().sock_recv(sock, nbytes)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        if isinstance(sock, MemorySocket):
            await sock.connection.send(bytes(data))
        else:
            await super().sock_sendall(sock, data)
