"""TCP connections to USB/IP servers: names, addresses, socket options, and the source port of an import.

A server that sets no keepalive does not notice that the network or this node has failed. It goes on exporting a device
to a connection that is half-open (RFC 9293, 3.5.1). A SYN from the source port of that connection ends it: the server's
kernel answers with a challenge ACK (RFC 5961, 4), this node's kernel knows no such connection and resets it, and the
repeated SYN is accepted. So a device is imported from the source port of its last import, if that is possible.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import aiohappyeyeballs
from aiohappyeyeballs.types import AddrInfoType

from usbip_plugin.errors import ServerUnreachable, SourceClosing, SourceNotLocal
from usbip_plugin.model import Endpoint, ServerKey
from usbip_plugin.sockets import set_tcp_options
from usbip_plugin.sync import OwnThreads

log = logging.getLogger(__name__)

# TCP keepalive: seconds of silence before the first probe, seconds between probes, and unanswered probes until the
# connection ends. A dead server is found within about 8 s.
KEEPALIVE_IDLE_S = 2
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3
# Time for which sent data may stay unacknowledged (milliseconds), the same 8 s. Keepalive watches an idle connection
# only; with data under way, the kernel would try again for a quarter of an hour.
USER_TIMEOUT_MS = (KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT) * 1000
# Wait for one address before the next is tried beside it (seconds), as RFC 8305 recommends.
NEXT_ADDRESS_S = 0.25
HOSTS = Path("/etc/hosts")
# Bytes of HOSTS that are read: a node has a few KiB there.
MAX_HOSTS_BYTES = 1 << 20
# States in /proc/net/tcp of a connection that this node has ended and the server has not (include/net/tcp_states.h).
_FIN_WAIT = ("04", "05")
_TIME_WAIT = "06"  # both have ended it

Addresses: TypeAlias = Sequence[AddrInfoType]
# What getaddrinfo raises: for an unknown name, for text that cannot be a name, and for a port far out of range.
_NO_ADDRESS = (socket.gaierror, UnicodeError, OverflowError)


class Source(Protocol):
    """A local address and port, held for imports from one server until close().

    endpoint: this node's end of the connections, as the server sees it.
    """

    @property
    def endpoint(self) -> Endpoint: ...

    async def connect(self) -> socket.socket:
        """Returns a new connection from here, as Dialler.connect does. The one before must be closed by reset()."""

    def close(self) -> None: ...


class Dialler(Protocol):
    """An opener of connections to servers. Connector is the real one.

    No call is bounded in time: the caller sets the timeout. All are cancel-safe and raise ServerUnreachable.
    """

    async def connect(self, server: ServerKey) -> socket.socket:
        """Returns a connected non-blocking socket with keepalive set."""

    async def bind(self, server: ServerKey, last: Endpoint | None = None) -> Source:
        """Returns a source port for the server. The caller must close it.

        last: the source port to take. Another is taken if `last` is not of this host, if a socket has it, or if the
            connection from there has ended at both ends. Raises SourceClosing if it has ended at this end only.
        """

    async def end_half_open(self, server: ServerKey, source: Endpoint) -> bool:
        """Connects once from a source port and closes: a connection from there that was half-open has ended then.

        Returns False without connecting if the last connection from there has ended at both ends. Raises SourceNotLocal
        if the address is not of this host, ServerUnreachable also if a socket here has the port.
        """

    def close(self) -> None: ...


def resolver_names(host: str, hosts: str) -> Sequence[str]:
    """Returns what to ask the resolver for, given a server's host name and the text of /etc/hosts.

    A name with a dot is absolute: with the search path of a pod, lab.lan would first be Service lab of namespace lan,
    and whoever owns that namespace would be the server. The resolver does not find an absolute name in /etc/hosts, so
    the addresses that the file has for the name are returned instead. A name without a dot is searched for as usual.
    """
    if "." not in host.rstrip("."):
        return (host,)
    lines = (line.partition("#")[0].lower().split() for line in hosts.splitlines())
    return [fields[0] for fields in lines if host.lower() in fields[1:]] or (f"{host}.",)


def resolve(server: ServerKey) -> Addresses:
    """Resolves the server's host name. Blocks. Raises ServerUnreachable if there is no such host."""
    try:
        with HOSTS.open(encoding="ascii", errors="replace") as file:
            hosts = file.read(MAX_HOSTS_BYTES)
    except OSError:
        hosts = ""
    try:
        return [
            address
            for name in resolver_names(server.host, hosts)
            for address in socket.getaddrinfo(name, server.port, type=socket.SOCK_STREAM)
        ]
    except _NO_ADDRESS as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else str(error)
        is_multicast = server.host.lower().rstrip(".").endswith(".local")  # RFC 6762
        cure = "; pods do not resolve names that end in .local: use its address" if is_multicast else ""
        raise ServerUnreachable(server, f"no such host: {reason}{cure}") from error


class Connector:
    """The Dialler that connects over TCP. The owner must close() it.

    Resolves each server's name in a thread of its own, at most one at a time, so that a dead name server delays neither
    the name of another server nor other code. A waiting thread takes 25 KiB, and does not keep the process from ending.
    """

    def __init__(self, resolve: Callable[[ServerKey], Addresses] = resolve) -> None:
        self._resolve = resolve
        self._lookups: dict[ServerKey, asyncio.Future[Addresses]] = {}
        self._answered: dict[ServerKey, tuple[Any, ...]] = {}  # by server: the address of the last connection

    def close(self) -> None:
        """Gives up the lookups under way. Does not wait for a name server."""
        for lookup in self._lookups.values():
            lookup.cancel()

    async def connect(self, server: ServerKey) -> socket.socket:
        """As Dialler.connect. Tries every address, the next one after 0.25 s."""
        addresses = await self._addresses(server)
        try:
            sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1)
        except OSError as error:
            raise _cannot_connect(server, error) from error
        self._answered[server] = _prepared(server, sock).getpeername()
        return sock

    async def bind(self, server: ServerKey, last: Endpoint | None = None) -> SourcePort:
        """As Dialler.bind. Takes the server's address of the last connection, if there was one."""
        problem = OSError("no address")
        for address in await self._by_preference(server):
            try:
                return SourcePort(server, address, last)
            except OSError as error:
                problem = error
        raise _cannot_connect(server, problem) from problem

    async def end_half_open(self, server: ServerKey, source: Endpoint) -> bool:
        family = socket.AF_INET6 if ":" in source.address else socket.AF_INET
        remote = next((one[4] for one in await self._by_preference(server) if one[0] == family), None)
        if remote is None:
            raise SourceNotLocal(server, source)
        name = _local_name(source, remote)
        try:
            sock = _bound(family, name, shared=True)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise SourceNotLocal(server, source) from error
            raise _cannot_connect(server, error) from error
        try:
            if _connection_state(family, name, remote) == _TIME_WAIT:
                return False
            await asyncio.get_running_loop().sock_connect(sock, remote)
        except ConnectionRefusedError:
            pass  # nobody listens; the server's kernel knows no connection from there
        except OSError as error:
            raise _cannot_connect(server, error) from error
        finally:
            reset(sock)
        return True

    async def _by_preference(self, server: ServerKey) -> Addresses:
        answered = self._answered.get(server)
        return sorted(await self._addresses(server), key=lambda address: address[4] != answered)

    async def _addresses(self, server: ServerKey) -> Addresses:
        with contextlib.suppress(*_NO_ADDRESS):  # a name, not an address
            return socket.getaddrinfo(
                server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            )
        lookup = self._lookups.get(server)
        if lookup is None:
            thread = OwnThreads(f"resolve {server}")
            lookup = asyncio.get_running_loop().run_in_executor(thread, self._resolve, server)
            self._lookups[server] = lookup
            lookup.add_done_callback(lambda future: self._resolved(server, future))
        return await asyncio.shield(lookup)

    def _resolved(self, server: ServerKey, future: asyncio.Future[Addresses]) -> None:
        del self._lookups[server]
        if not future.cancelled():
            future.exception()  # marks an error as retrieved, as every waiting caller may have been cancelled


class SourcePort:
    """The Source of a Connector. Its port stays bound between connections, so that no other program takes it."""

    def __init__(self, server: ServerKey, address: AddrInfoType, last: Endpoint | None) -> None:
        """Binds a port for this address of the server. Raises OSError if there is no route, and SourceClosing."""
        self._server, self._family, self._remote = server, address[0], address[4]
        again = self._bind_again(last) if last is not None else None
        self._held = again or _bound(self._family, _any_port(self._family, self._remote))
        self.endpoint = Endpoint.of(self._held.getsockname())

    def _bind_again(self, last: Endpoint) -> socket.socket | None:
        if (":" in last.address) != (self._family == socket.AF_INET6):
            return None
        name = _local_name(last, self._remote)
        try:
            return _bound(self._family, name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return None
            state = _connection_state(self._family, name, self._remote)
            if state in _FIN_WAIT:
                raise SourceClosing(self._server, last) from error
            if state is None:
                extra = {"server": str(self._server), "source": str(last)}
                log.info("source port of the last import is in use by another program", extra=extra)
            return None

    async def connect(self) -> socket.socket:
        sock = _bound(self._family, self._held.getsockname(), shared=True)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._remote)
        except OSError as error:
            sock.close()
            raise _cannot_connect(self._server, error) from error
        except asyncio.CancelledError:
            sock.close()
            raise
        return _prepared(self._server, sock)

    def close(self) -> None:
        self._held.close()


def set_options(sock: socket.socket, interval_s: int = KEEPALIVE_INTERVAL_S, count: int = KEEPALIVE_COUNT) -> None:
    """Sets TCP_NODELAY, and keepalive and user timeout that find a dead peer, by default within about 8 s.

    Raises OSError if the connection has ended.

    interval_s: seconds between the probes that follow 2 s of silence. count: unanswered probes that end the connection.
    """
    set_tcp_options(
        sock,
        TCP_NODELAY=1,
        TCP_KEEPIDLE=KEEPALIVE_IDLE_S,
        TCP_KEEPINTVL=interval_s,
        TCP_KEEPCNT=count,
        TCP_USER_TIMEOUT=(KEEPALIVE_IDLE_S + interval_s * count) * 1000,
    )


def reset(sock: socket.socket) -> None:
    """Closes a connection with a RST, which leaves nothing of it here: its source port can be used at once."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _prepared(server: ServerKey, sock: socket.socket) -> socket.socket:
    """Returns a new connection with its options set, or closes it and raises ServerUnreachable."""
    try:
        set_options(sock)
        sock.getpeername()
    except OSError as error:
        sock.close()
        raise ServerUnreachable(server, f"connection lost right after connecting: {error.strerror or error}") from error
    return sock


def _cannot_connect(server: ServerKey, error: OSError) -> ServerUnreachable:
    if isinstance(error, ConnectionRefusedError):
        return ServerUnreachable(server, "connection refused; check that usbipd is running on the server")
    return ServerUnreachable(server, f"cannot connect: {error.strerror or error}")


def _bound(family: int, name: tuple[Any, ...], *, shared: bool = False) -> socket.socket:
    """Returns a non-blocking TCP socket bound to a local name, and allows others to bind to it later.

    shared: whether other sockets of this host may have the name already, also those of dead connections.
    """
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError:
        sock.close()
        raise
    return sock


def _local_name(endpoint: Endpoint, remote: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the socket name of an endpoint, with the scope of the address that it connects to."""
    return (endpoint.address, endpoint.port, *remote[2:])


def _any_port(family: int, remote: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the local name, with port 0, from which the kernel would connect to this address. Sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(remote)
        address, _, *scope = sock.getsockname()
    return (address, 0, *scope)


def _connection_state(family: int, local: tuple[Any, ...], remote: tuple[Any, ...]) -> str | None:
    """Returns the state of a TCP connection as /proc/net/tcp has it, None if this host has no such connection."""
    ends = [_as_listed(family, local), _as_listed(family, remote)]
    with Path("/proc/self/net", "tcp6" if family == socket.AF_INET6 else "tcp").open(encoding="ascii") as table:
        return next((row[3] for line in table if (row := line.split(maxsplit=4))[1:3] == ends), None)


def _as_listed(family: int, name: tuple[Any, ...]) -> str:
    packed = socket.inet_pton(family, name[0].partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{name[1]:04X}"
