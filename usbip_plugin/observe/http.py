"""The HTTP server of the pages, which no peer can use to stop the plugin or to fill its memory.

It serves GET and HEAD, one request a connection, within the bounds below. A peer that does not keep to them costs a
closed connection and one counted line in the log. Accepting, reading and sending have a rate each, for all peers
together, so that most of the event loop is left to the plugin, however many peers ask and however quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from usbip_plugin.clock import Clock
from usbip_plugin.observe.listen import split_addresses

log = logging.getLogger(__name__)

MAX_CONNECTIONS, MAX_PER_PEER = 64, 4
"""Connections that are open at a time, in all and from one peer."""
MAX_HEADER_BYTES = 8 * 1024
"""Bytes of a request with its headers. A browser sends 1 KiB."""
HEADERS_S = 5.0
"""Seconds in which a request must be complete."""
ANSWER_S = 30.0
"""Seconds from then on in which the answer must be made and read."""
SEND_BUFFER_BYTES, RECEIVE_BUFFER_BYTES = 64 * 1024, 16 * 1024
"""Bytes of the kernel's buffers for a connection. Its defaults would hold megabytes for a peer that does not read."""
PIECE_BYTES, PIECE_S = 32 * 1024, 0.001
"""Bytes of an answer that are sent at a time, and seconds between two times, to all peers together."""
READ_S = 0.02
"""Seconds between two reads of one request. Clients send it in one or two segments, and not in single bytes."""
BACKLOG = 64
"""Connections that the kernel keeps while the event loop is busy."""
ACCEPT_S = 0.002
"""Seconds between two connections. A flood of them takes a tenth of the event loop; the rest waits in the kernel."""
ACCEPT_PAUSE_S = 1.0
"""Seconds until the next try after a connection could not be accepted, for instance for lack of file descriptors."""

TEXT = "text/plain; charset=utf-8"
METHODS = ("GET", "HEAD")
END = b"\r\n\r\n"
HEADERS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request. content_type may include a charset."""

    body: bytes
    content_type: str = TEXT
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


def encoded(answer: Answer) -> bytes:
    """Returns the status line and the headers of an answer."""
    status = HTTPStatus(answer.status)
    headers = {"Content-Type": answer.content_type, "Content-Length": len(answer.body), **HEADERS, **answer.headers}
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


PageHandler = Callable[[], Answer | Awaitable[Answer]]
"""Called in the event loop for every request. Must not block."""


class BadRequest(ValueError):
    """A request that is not valid HTTP/1.x, or larger than MAX_HEADER_BYTES. The text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request. path: decoded, without the query. host: the value of the Host header.

    trusted_origin: whether a browser says that the page's site is one of this machine, or has TLS: it then sends
        Sec-Fetch-Site, which no script can set. Behind `kubectl proxy`, the host is the API server's name.
    """

    method: str
    path: str
    host: str
    trusted_origin: bool = False


_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]")
_HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")


def parse_request(head: bytes) -> Request:
    """Returns the request in its lines, which end with an empty one. Raises BadRequest."""
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    request = _REQUEST_LINE.fullmatch(first)
    headers = [_HEADER_LINE.fullmatch(line) for line in lines]
    if request is None or None in headers:
        raise BadRequest("not an HTTP request")
    hosts = [header[2] for header in headers if header is not None and header[1].lower() == "host"]
    if len(hosts) != 1:
        raise BadRequest(f"expected one Host header, got {len(hosts)}")
    trusted = any(header[1].lower() == "sec-fetch-site" for header in headers if header is not None)
    return Request(request[1], unquote(request[2].partition("?")[0]), hosts[0], trusted)


def is_served(host: str, names: Collection[str]) -> bool:
    """Returns whether a Host header has an address, localhost or one of these names.

    A page of another site cannot read this one by letting its own name point here (DNS rebinding). Such a site has no
    TLS, because this server has none, so that a browser sends no Sec-Fetch-Site: see Request.
    """
    bare = re.sub(r":[0-9]*$", "", host)
    if bare.startswith("[") and bare.endswith("]"):
        bare = bare[1:-1]
    elif ":" in bare:
        return False
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        return bare.lower() in {"localhost", *(name.lower() for name in names)}
    return True


def peer_of(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Returns what counts as one peer: an IPv4 address, or an IPv6 network of 64 bits, in which addresses are free."""
    found = ipaddress.ip_address(address[0].partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


@dataclass(eq=False, slots=True)
class Connection:
    """A connection of a peer. received: the beginning of its request. waiting: whether that is not complete yet."""

    sock: socket.socket
    peer: str
    received: bytearray = field(default_factory=bytearray)
    waiting: bool = True
    task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Ends the task, which closes the socket."""
        if self.task is not None:
            self.task.cancel()


def in_the_way(connections: Collection[Connection], peer: str) -> tuple[Connection, ...] | None:
    """Returns the connections of which the first must be closed before one of this peer is accepted; None if none must.

    A connection that waits gives way to a new one: whoever sends a request at once is served, however many wait.
    """
    same = [one for one in connections if one.peer == peer]
    if len(same) < MAX_PER_PEER and len(connections) < MAX_CONNECTIONS:
        return None
    return tuple(one for one in (same if len(same) >= MAX_PER_PEER else connections) if one.waiting)


class HttpServer:
    """HTTP server of pages. Works only while run() runs.

    listen: as split_addresses() accepts it. Port 0 picks a free port.
    pages: by path.
    below: pages by the beginning of their path, which ends in "/"; called with the rest of the path.
    names: host names under which pages are served, besides addresses, localhost and those in `listen`.
    started: set while the server serves.
    port: the port that is bound, the first one of several, known once `started` is set.
    """

    def __init__(
        self,
        listen: str,
        pages: Mapping[str, PageHandler],
        clock: Clock,
        *,
        below: Mapping[str, Callable[[str], Answer | Awaitable[Answer]]] | None = None,
        names: Collection[str] = (),
    ) -> None:
        self._listen = split_addresses(listen)
        self._pages = dict(pages)
        self._below = dict(below or {})
        self._clock = clock
        self._names = (*names, *(host for host, _port in self._listen if host is not None))
        self._open: dict[Connection, None] = {}
        self._turn = asyncio.Lock()
        self.started = asyncio.Event()
        self.port = 0

    async def run(self) -> None:
        """Serves until cancelled, then closes every connection. Raises OSError if an address cannot be bound."""
        with contextlib.ExitStack() as stack:
            listeners = []
            for host, port in self._listen:
                for family, address in await _addresses(host, port):
                    listeners.append(stack.enter_context(_listening(family, address)))
            self.port = int(listeners[0].getsockname()[1])
            self.started.set()
            try:
                async with asyncio.TaskGroup() as tasks:
                    for listener in listeners:
                        tasks.create_task(self._accept(listener, tasks), name="accept HTTP")
            finally:
                self.started.clear()

    async def _accept(self, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        while True:
            try:
                sock, address = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                log.warning("HTTP connection not accepted", extra={"cause": error.strerror or str(error)})
                await self._clock.sleep(ACCEPT_PAUSE_S)
                continue
            self._admit(sock, peer_of(address), tasks)
            await self._clock.sleep(ACCEPT_S)

    def _admit(self, sock: socket.socket, peer: str, tasks: asyncio.TaskGroup) -> None:
        if (waiting := in_the_way(self._open, peer)) is not None:
            if not waiting:
                sock.close()
                return
            del self._open[waiting[0]]
            waiting[0].close()
        connection = Connection(sock, peer)
        self._open[connection] = None
        connection.task = tasks.create_task(self._serve(connection), name="HTTP request")
        # not in the task, which may be cancelled before it begins
        connection.task.add_done_callback(partial(self._ended, connection))

    def _ended(self, connection: Connection, _task: asyncio.Task[None]) -> None:
        self._open.pop(connection, None)
        connection.sock.close()

    async def _serve(self, connection: Connection) -> None:
        try:
            try:
                async with self._clock.timeout(HEADERS_S):
                    request = parse_request(await self._read_head(connection))
            except TimeoutError as error:
                raise BadRequest(f"not complete within {HEADERS_S:g} s") from error
            finally:
                connection.waiting = False
            async with self._clock.timeout(ANSWER_S):
                answer = await self._answer(request)
                await self._send(connection.sock, encoded(answer))
                if request.method != "HEAD":
                    await self._send(connection.sock, answer.body)
        except BadRequest as error:
            if connection.received:
                log.info("HTTP request refused", extra={"peer": connection.peer, "cause": str(error)})
        except OSError as error:  # the peer has closed the connection, or did not read in time
            log.debug("HTTP connection ended", extra={"peer": connection.peer, "cause": str(error)})

    async def _read_head(self, connection: Connection) -> bytes:
        """Returns the request up to the empty line. Raises BadRequest, and OSError if the connection breaks."""
        received = connection.received
        while (end := received.find(END)) < 0:
            if len(received) >= MAX_HEADER_BYTES:
                raise BadRequest(f"longer than {MAX_HEADER_BYTES} bytes")
            if received:
                await self._clock.sleep(READ_S)
            wanted = MAX_HEADER_BYTES - len(received)
            piece = await asyncio.get_running_loop().sock_recv(connection.sock, wanted)
            if not piece:
                raise BadRequest("connection closed")
            received += piece
        return bytes(received[: end + len(END)])

    async def _send(self, sock: socket.socket, data: bytes) -> None:
        """Sends a piece every PIECE_S, also if many peers read quickly."""
        view = memoryview(data)
        for start in range(0, len(data), PIECE_BYTES):
            async with self._turn:
                await self._clock.sleep(PIECE_S)
            await asyncio.get_running_loop().sock_sendall(sock, view[start : start + PIECE_BYTES])

    async def _answer(self, request: Request) -> Answer:
        if not request.trusted_origin and not is_served(request.host, self._names):
            text = f"no page by this host name; use an address, or one of: {', '.join(('localhost', *self._names))}\n"
            return Answer(text.encode(), status=HTTPStatus.MISDIRECTED_REQUEST)
        page = self._find(request.path)
        if page is None:
            return Answer(b"page not found\n", status=HTTPStatus.NOT_FOUND)
        if request.method not in METHODS:
            return Answer(b"", status=HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": ", ".join(METHODS)})
        try:
            answer = page()
            return answer if isinstance(answer, Answer) else await answer
        except Exception:  # a fault in a page must not end the plugin
            log.warning("page failed", extra={"page": request.path}, exc_info=True)
            return Answer(b"page failed, see the log\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)

    def _find(self, path: str) -> PageHandler | None:
        if (page := self._pages.get(path)) is not None:
            return page
        for beginning, below in self._below.items():
            if path.startswith(beginning):
                return lambda: below(path.removeprefix(beginning))
        return None


async def _addresses(host: str | None, port: int) -> Iterable[tuple[int, tuple[Any, ...]]]:
    """Returns the families and addresses to bind for a host, None for every address. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    skipped = None if host is not None or socket.has_dualstack_ipv6() else socket.AF_INET6
    return [(family, address) for family, *_, address in dict.fromkeys(found) if family != skipped]


def _listening(family: int, address: tuple[Any, ...]) -> socket.socket:
    try:
        sock = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        raise OSError(error.errno, f"cannot listen on {address[0]} port {address[1]}: {why}") from error
    sock.setblocking(False)
    # accepted connections inherit these
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
