"""A TCP connection without a network: what the simulation hands from client to kernel in place of a file descriptor."""

from __future__ import annotations

from collections.abc import Callable

CLOSED = -1


class SocketTable:
    """All connections of one simulated world. Tokens take the place of fds: below -1, never reused."""

    def __init__(self) -> None:
        self._next_token = CLOSED - 1
        self._open: dict[int, MemorySocket] = {}

    def open(self) -> MemorySocket:
        """A new, connected connection with one reference."""
        return self._refer(_Connection())

    def resolve(self, token: int) -> MemorySocket | None:
        """The open reference behind a token, None if it was closed or never existed."""
        return self._open.get(token)

    def __len__(self) -> int:
        """References not closed yet: 0 when nothing leaks."""
        return len(self._open)

    def _refer(self, connection: _Connection) -> MemorySocket:
        token = self._next_token
        self._next_token -= 1
        connection.references += 1
        self._open[token] = MemorySocket(self, connection, token)
        return self._open[token]

    def _forget(self, token: int) -> None:
        del self._open[token]


class _Connection:
    """What all references to one connection share."""

    def __init__(self) -> None:
        self.references = 0
        self.closed_by_peer = False
        self.ended = False
        self.callbacks: list[Callable[[], None]] = []

    def end(self) -> None:
        if self.ended:
            return
        self.ended = True
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()


class MemorySocket:
    """One counted reference to a connection, as a file descriptor is one. Made by SocketTable.open and dup only."""

    def __init__(self, table: SocketTable, connection: _Connection, token: int) -> None:
        self._table = table
        self._connection = connection
        self._token = token

    def fileno(self) -> int:
        """The token, -1 once this reference is closed."""
        return self._token

    def dup(self) -> MemorySocket:
        """Another reference to the same connection. ValueError if this one is closed."""
        if self._token == CLOSED:
            raise ValueError("dup of a closed MemorySocket")
        return self._table._refer(self._connection)  # noqa: SLF001 (the two classes are one thing)

    def close(self) -> None:
        """Idempotent. Closing the last reference ends the connection."""
        if self._token == CLOSED:
            return
        self._table._forget(self._token)  # noqa: SLF001
        self._token = CLOSED
        self._connection.references -= 1
        if self._connection.references == 0:
            self._connection.end()

    def on_close(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once, synchronously, when the connection ends: the last reference closed, or the server ended it.

        At once if it has ended already. Returns a function that takes the callback back; callable any number of times.
        """
        connection = self._connection
        if connection.ended:
            callback()
            return lambda: None
        connection.callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in connection.callbacks:
                connection.callbacks.remove(callback)

        return unsubscribe

    def server_end(self) -> None:
        """The server's side: end the connection. References stay open until their owners close them. Idempotent."""
        if not self._connection.ended:
            self._connection.closed_by_peer = True
        self._connection.end()

    @property
    def closed_by_peer(self) -> bool:
        """True once the server ended the connection, as a read that returns EOF would tell."""
        return self._connection.closed_by_peer

    @property
    def ended(self) -> bool:
        """True once either side has ended the connection."""
        return self._connection.ended
