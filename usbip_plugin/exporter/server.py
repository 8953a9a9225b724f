"""The TCP server of the exporter: reads one request of each connection, as usbipd does, within bounds.

Works on raw sockets and reads no byte too many, because the kernel gets the connection of an import.
"""

from __future__ import annotations

import asyncio
import collections
import enum
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.config.export import IpNetwork
from usbip_plugin.errors import ListenFailed
from usbip_plugin.exporter.exports import Exports, ImportResult
from usbip_plugin.exporter.repeats import FirstTimes
from usbip_plugin.model import Endpoint, ServerKey
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.connect import set_options

log = logging.getLogger(__name__)

T = TypeVar("T")

CLIENT_PROBE_S, CLIENT_PROBES = 1, 4
"""Keepalive of clients: seconds between probes, and their number. A client that answers nothing is gone after 6 s.

Another node begins to watch its lock when it finds the device listed again, up to 3 s later. So a takeover is complete
within the lock's duration and 10 s.
"""
REQUEST_S = 5.0
"""Seconds from the begin of a connection to the end of the reply. A fence that reads a lock takes 2 s of them."""
MAX_CONNECTIONS = 64
"""Connections that are being served at once; one that the kernel has got does not count."""
MAX_PER_PEER = 8
"""Connections of one address at once, and of all addresses that are not allowed."""
BACKLOG = 128
"""Connections that wait to be accepted."""
ACCEPT_RETRY_S = 1.0
"""Seconds until connections are accepted again after the process ran out of descriptors or memory."""

_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""Errors of a socket for all addresses of a family that is switched off, IPv6 mostly."""
_STATUS = {
    ImportResult.OK: wire.ST_OK,
    ImportResult.REFUSED: wire.ST_NA,
    ImportResult.BUSY: wire.ST_DEV_BUSY,
    ImportResult.ERROR: wire.ST_DEV_ERR,
    ImportResult.NO_DEVICE: wire.ST_NODEV,
    ImportResult.FAILED: wire.ST_NA,
}


class Dropped(enum.Enum):
    """Why a connection ended without the answer that it wanted. The values are those of the label `reason`.

    NOT_ALLOWED: its address is not in `allow`.
    TOO_MANY: MAX_CONNECTIONS. TOO_MANY_OF_PEER: MAX_PER_PEER.
    TIMEOUT: REQUEST_S. INVALID: its request is not USB/IP 1.1.1.
    """

    NOT_ALLOWED = "not_allowed"
    TOO_MANY = "too_many"
    TOO_MANY_OF_PEER = "too_many_of_peer"
    TIMEOUT = "timeout"
    INVALID = "invalid"


def bind_sockets(host: str | None, port: int) -> tuple[socket.socket, ...]:
    """Returns sockets bound to every address of host, or to all addresses (None). With port 0, to a free one.

    They do not listen yet. IPv4 and IPv6 have a socket each, as with usbipd. Raises ListenFailed.
    """
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, (address, _, *scope) in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                sockets.append(_bound(family, (address, port, *scope)))
            except OSError as error:
                if host is not None or error.errno not in _NO_FAMILY:
                    raise
            else:
                port = sockets[-1].getsockname()[1]
    except (OSError, UnicodeError) as error:
        for sock in sockets:
            sock.close()
        raise ListenFailed(str(ServerKey(host or "", port)), error) from error
    return tuple(sockets)


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the kernel has connections of this port
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


class ExportServer:
    """Serves DEVLIST and IMPORT on the sockets of bind_sockets(), which it closes at the end.

    allow: the networks whose clients are served; None for every client. May be replaced at any time.
    on_drop: called for each connection that does not get what it wants.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        exports: Exports,
        clock: Clock,
        allow: Sequence[IpNetwork] | None,
        on_drop: Callable[[Dropped], None] = lambda _why: None,
    ) -> None:
        self._sockets = tuple(sockets)
        self._exports = exports
        self._clock = clock
        self._on_drop = on_drop
        self._open: collections.Counter[str] = collections.Counter()
        self._dropped = FirstTimes[tuple[str, Dropped]]()
        self.allow = allow

    def listen(self) -> None:
        """Begins to listen, to be called before run(). Raises ListenFailed.

        Not before the devices are bound: a client that waited in the backlog has given up by then, and its import would
        be answered all the same.
        """
        for sock in self._sockets:
            try:
                sock.listen(BACKLOG)
            except OSError as error:
                raise ListenFailed(str(Endpoint.of(sock.getsockname())), error) from error

    async def run(self) -> None:
        """Serves until cancelled. A connection that is being served then is closed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for listener in self._sockets:
                    tasks.create_task(self._accept(listener, tasks), name="accept")
        finally:
            for listener in self._sockets:
                listener.close()

    async def _accept(self, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, name = await loop.sock_accept(listener)
            except ConnectionError:  # the client has gone
                continue
            except OSError as error:
                log.warning("connections not accepted", extra={"cause": str(error), "retry_s": ACCEPT_RETRY_S})
                await self._clock.sleep(ACCEPT_RETRY_S)
                continue
            peer = Endpoint.of(name)
            group = peer.address if self.allows(peer) else ""
            if self._open.total() >= MAX_CONNECTIONS or self._open[group] >= MAX_PER_PEER:
                many = self._open.total() >= MAX_CONNECTIONS
                self._drop(peer, Dropped.TOO_MANY if many else Dropped.TOO_MANY_OF_PEER)
                sock.close()
                continue
            self._open[group] += 1
            tasks.create_task(self._serve(sock, peer, group), name="connection")

    def allows(self, peer: Endpoint) -> bool:
        address = ipaddress.ip_address(peer.address)
        return self.allow is None or any(address in network for network in self.allow)

    async def _serve(self, sock: socket.socket, peer: Endpoint, group: str) -> None:
        try:
            set_options(sock, CLIENT_PROBE_S, CLIENT_PROBES)
            async with self._clock.timeout(REQUEST_S):
                await self._answer(sock, peer, allowed=bool(group))
        except TimeoutError:
            self._drop(peer, Dropped.TIMEOUT)
        except wire.ProtocolViolation as violation:
            self._drop(peer, Dropped.INVALID, str(violation))
        except OSError as error:  # also if the client has closed
            log.debug("connection lost", extra={"peer": str(peer), "cause": str(error)})
        finally:
            sock.close()
            self._open[group] -= 1
            if not self._open[group]:
                del self._open[group]

    async def _answer(self, sock: socket.socket, peer: Endpoint, *, allowed: bool) -> None:
        loop = asyncio.get_running_loop()
        request = await _decode(sock, wire.request())
        if not allowed:
            self._drop(peer, Dropped.NOT_ALLOWED)
            refusal = wire.encode_import_reply(wire.ImportReply(wire.ST_NA, None))
            if isinstance(request, wire.DevlistRequest):
                refusal = wire.encode_devlist_refusal(wire.ST_NA)
            await loop.sock_sendall(sock, refusal)
            return
        if isinstance(request, wire.DevlistRequest):
            await loop.sock_sendall(sock, wire.encode_devlist_reply(self._exports.devlist()))
            return
        answer = await self._exports.import_device(request.busid, peer, sock.fileno())
        replied = False
        try:
            reply = wire.ImportReply(_STATUS[answer.result], answer.descriptor)
            await loop.sock_sendall(sock, wire.encode_import_reply(reply))
            replied = True
        finally:
            if answer.descriptor is not None and not replied:
                self._exports.abandon(request.busid, peer)

    def _drop(self, peer: Endpoint, why: Dropped, cause: str = "") -> None:
        self._on_drop(why)
        extra = {"peer": str(peer), "reason": why.value, "cause": cause}
        if self._dropped.is_new((peer.address, why)):
            log.info("connection refused", extra=extra)
        else:
            log.debug("connection refused", extra=extra)


async def _decode(sock: socket.socket, decoding: wire.Decoding[T]) -> T:
    """Reads what the decoding needs from the socket, and no byte more. Raises ConnectionError at its end."""
    loop = asyncio.get_running_loop()
    try:
        need = next(decoding)
        while True:
            data = b""
            while len(data) < need:
                piece = await loop.sock_recv(sock, need - len(data))
                if not piece:
                    raise ConnectionResetError("closed by the client")
                data += piece
            need = decoding.send(data)
    except StopIteration as done:
        result: T = done.value
        return result
