"""Connection between the simulated kernel and a driver: messages, with fds, over a SOCK_SEQPACKET socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import msgspec

from usbip_sim.kernel.wire import Message

MAX_MESSAGE = 128 * 1024
"""Limit of a message, in bytes. A longer message arrives cut off, is not valid JSON, and ends the connection."""


class Channel:
    """One end of a connection between the simulated kernel and a driver. Callbacks come from the event loop.

    on_message(message, fd): called for each message. The receiver owns fd, which may be None.
    on_end(): called once when the other end has closed, sends an invalid message or does not read, but not by close().
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[Message, int | None], None],
        on_end: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self.open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message, fd: int | None = None) -> None:
        """Sends a message, and a copy of fd, which the caller keeps. Does nothing after the end.

        Queues nothing: the connection ends if the other end does not read.
        """
        if not self.open:
            return
        try:
            socket.send_fds(self._sock, [msgspec.json.encode(message)], [] if fd is None else [fd])
        except OSError:
            self._end()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _readable(self) -> None:
        try:
            data, fds, _flags, _address = socket.recv_fds(self._sock, MAX_MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        try:
            message = msgspec.json.decode(data, type=Message)
        except (ValueError, RecursionError):  # also for b"", the end of the connection
            for fd in fds:
                os.close(fd)
            self._end()
            return
        self._on_message(message, fds[0] if fds else None)

    def _end(self) -> None:
        if self.open:
            self.close()
            self._on_end()
