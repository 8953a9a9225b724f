"""TCP connections to USB/IP servers, as raw sockets: their file descriptors go to the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import aiohappyeyeballs
from aiohappyeyeballs.types import AddrInfoType

from usbip_plugin.errors import ServerUnreachable
from usbip_plugin.model import ServerKey

KEEPALIVE_IDLE_S = 2
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3
# Keepalive watches an idle connection only; with data under way the kernel would try again for a quarter of an hour.
USER_TIMEOUT_MS = (KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT) * 1000
NEXT_ADDRESS_S = 0.25
_RESOLVER_THREADS = 4

Addresses: TypeAlias = Sequence[AddrInfoType]
# What getaddrinfo raises for names, for text that cannot be one, and for ports far out of range.
_NO_ADDRESS = (socket.gaierror, UnicodeError, OverflowError)


def resolve(server: ServerKey) -> Addresses:
    """Blocking. ServerUnreachable if there is no such host."""
    try:
        return socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except _NO_ADDRESS as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else str(error)
        raise ServerUnreachable(server, f"no such host: {reason}") from error


class Connector:
    """Connects to servers. close() it.

    Names are resolved in threads of its own, one at a time for each server: a dead name server takes no thread from
    anybody else.
    """

    def __init__(self, resolve: Callable[[ServerKey], Addresses] = resolve) -> None:
        self._resolve = resolve
        self._threads = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="resolver")
        self._asked: dict[ServerKey, asyncio.Future[Addresses]] = {}

    def close(self) -> None:
        """Does not wait for a name server."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def connect(self, server: ServerKey) -> socket.socket:
        """A connected non-blocking socket with keepalive set. Every address is tried, the next one after 0.25 s.

        ServerUnreachable says why. Not bounded in time: the caller is. Cancel-safe.
        """
        addresses = await self._addresses(server)
        try:
            sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1)
        except ConnectionRefusedError as refused:
            raise ServerUnreachable(server, "connection refused; is usbipd running there?") from refused
        except OSError as error:
            raise ServerUnreachable(server, f"cannot connect: {error.strerror or error}") from error
        try:
            set_options(sock)
        except OSError as error:
            sock.close()
            raise ServerUnreachable(server, f"connection lost at once: {error.strerror or error}") from error
        return sock

    async def _addresses(self, server: ServerKey) -> Addresses:
        with contextlib.suppress(*_NO_ADDRESS):  # a name, not an address
            return socket.getaddrinfo(
                server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            )
        asked = self._asked.get(server)
        if asked is None:
            asked = self._asked[server] = asyncio.get_running_loop().run_in_executor(
                self._threads, self._resolve, server
            )
            asked.add_done_callback(lambda future: self._answered(server, future))
        return await asyncio.shield(asked)

    def _answered(self, server: ServerKey, future: asyncio.Future[Addresses]) -> None:
        del self._asked[server]
        if not future.cancelled():
            future.exception()  # seen: those who asked may have gone


def set_options(sock: socket.socket) -> None:
    """No delays, and keepalive that finds a dead other end within about 8 s. OSError if the connection has ended."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
