"""The USB/IP client: connects to servers, lists and imports their devices, and probes an imported device.

Connections are raw TCP sockets, because the file descriptor of an imported device goes to the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import aiohappyeyeballs
from aiohappyeyeballs.types import AddrInfoType

from usbip_plugin import model
from usbip_plugin.clock import Clock
from usbip_plugin.errors import (
    DeviceBusy,
    DeviceUnknown,
    ImportRefused,
    MalformedReply,
    ServerTimeout,
    ServerUnreachable,
    UsbipError,
)
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.identify import ControlPipe, DeviceIdentity, read_identity

log = logging.getLogger(__name__)

T = TypeVar("T")

DeviceList: TypeAlias = wire.DevlistReply
"""The devices that a server lists, and the problems of its list."""
why_unlisted = wire.why_unlisted

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

Addresses: TypeAlias = Sequence[AddrInfoType]
# What getaddrinfo raises: for an unknown name, for text that cannot be a name, and for a port far out of range.
_NO_ADDRESS = (socket.gaierror, UnicodeError, OverflowError)


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
        raise ServerUnreachable(server, f"no such host: {reason}") from error


class Connector:
    """The Dialler that connects over TCP. The owner must close() it.

    Resolves each server's name in a thread of its own, at most one at a time, so that a dead name server delays neither
    the name of another server nor other code. A waiting thread takes 25 KiB, and does not keep the process from ending.
    """

    def __init__(self, resolve: Callable[[ServerKey], Addresses] = resolve) -> None:
        self._resolve = resolve
        self._lookups: dict[ServerKey, asyncio.Future[Addresses]] = {}

    def close(self) -> None:
        """Gives up the lookups under way. Does not wait for a name server."""
        for lookup in self._lookups.values():
            lookup.cancel()

    async def connect(self, server: ServerKey) -> socket.socket:
        """Returns a connected non-blocking socket with keepalive set. Tries every address, the next one after 0.25 s.

        Raises ServerUnreachable with the reason. Not bounded in time: the caller sets the timeout. Cancel-safe.
        """
        addresses = await self._addresses(server)
        try:
            sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1)
        except ConnectionRefusedError as refused:
            raise ServerUnreachable(
                server, "connection refused; check that usbipd is running on the server"
            ) from refused
        except OSError as error:
            raise ServerUnreachable(server, f"cannot connect: {error.strerror or error}") from error
        try:
            set_options(sock)
        except OSError as error:
            sock.close()
            raise ServerUnreachable(
                server, f"connection lost right after connecting: {error.strerror or error}"
            ) from error
        return sock

    async def _addresses(self, server: ServerKey) -> Addresses:
        with contextlib.suppress(*_NO_ADDRESS):  # a name, not an address
            return socket.getaddrinfo(
                server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            )
        lookup = self._lookups.get(server)
        if lookup is None:
            lookup = self._lookups[server] = asyncio.wrap_future(self._start(server))
            lookup.add_done_callback(lambda future: self._resolved(server, future))
        return await asyncio.shield(lookup)

    def _start(self, server: ServerKey) -> Future[Addresses]:
        """Starts a thread that resolves the server's name."""
        answer = Future[Addresses]()

        def work() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(self._resolve(server))
            except ServerUnreachable as error:
                answer.set_exception(error)

        threading.Thread(target=work, name=f"resolve {server}", daemon=True).start()
        return answer

    def _resolved(self, server: ServerKey, future: asyncio.Future[Addresses]) -> None:
        del self._lookups[server]
        if not future.cancelled():
            future.exception()  # marks an error as retrieved, as every waiting caller may have been cancelled


def set_options(sock: socket.socket) -> None:
    """Sets TCP_NODELAY, and keepalive and user timeout that find a dead peer within about 8 s.

    Raises OSError if the connection has ended.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


# Default limit for resolving the name and connecting (seconds).
CONNECT_TIMEOUT = 3.0


class ImportedSocket(Protocol):
    """The socket of an import. vhci_hcd's attach file takes its fileno()."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Imported:
    """A device exported to this node while sock, or the kernel's reference to it, is open. Always close it.

    descriptor: the device as the import reply describes it.
    """

    key: DeviceKey
    descriptor: Descriptor
    sock: ImportedSocket

    def close(self) -> None:
        """Closes the socket, which ends the import unless the kernel has taken the socket over. Idempotent."""
        self.sock.close()


class UsbipClient(Protocol):
    """A client of USB/IP servers.

    timeout (seconds) bounds each call as a whole. All calls are cancel-safe: one that does not return leaves no socket.
    Every call may raise ServerUnreachable, ServerTimeout or MalformedReply.
    """

    async def devlist(self, server: ServerKey, *, timeout: float) -> DeviceList:
        """Returns the devices that the server lists, in its order. usbipd lists only those free to import now."""

    async def import_device(self, key: DeviceKey, *, timeout: float) -> Imported:
        """Imports the device. The caller must close the result, and must compare its vendor:product.

        Raises DeviceBusy, DeviceUnknown or ImportRefused if the server refuses, MalformedReply if the reply is about
        another bus ID. Checks last that the server has not closed the connection: a closed socket must never reach the
        kernel.
        """

    async def probe(self, imported: Imported, *, timeout: float) -> DeviceIdentity:
        """Reads the identity from the device itself, as read_identity does. Closes the import whatever happens.

        Raises WrongDevice if vendor:product are not those of the import reply, UsbipError if a transfer failed. The
        server resets the device afterwards and answers busy for about 0.3 s.
        """


class Dialler(Protocol):
    """An opener of connections to servers. Connector is the real one."""

    async def connect(self, server: ServerKey) -> socket.socket: ...

    def close(self) -> None: ...


class TcpUsbipClient:
    """The UsbipClient over TCP. The owner must close() it, which closes its connector too.

    connect_timeout: limit for resolving the name and connecting (seconds), if a call's own timeout is not shorter.
    """

    def __init__(
        self, clock: Clock, connector: Dialler | None = None, connect_timeout: float = CONNECT_TIMEOUT
    ) -> None:
        self._clock = clock
        self._connector = connector or Connector()
        self._connect_timeout = connect_timeout

    def close(self) -> None:
        self._connector.close()

    async def devlist(self, server: ServerKey, *, timeout: float) -> DeviceList:
        request = wire.encode_devlist_request()
        reply, sock = await self._ask(server, request, wire.devlist_reply(), "DEVLIST", timeout)
        sock.close()
        return reply

    async def import_device(self, key: DeviceKey, *, timeout: float) -> Imported:
        if not model.valid_busid(key.busid):
            raise DeviceUnknown(key)
        request, doing = wire.encode_import_request(key.busid), f"IMPORT {key.busid}"
        reply, sock = await self._ask(key.server, request, wire.import_reply(key.busid), doing, timeout)
        if reply.descriptor is None:
            sock.close()
            raise refusal(key, reply.status)
        try:
            _still_open(key, sock)
        except UsbipError:
            sock.close()
            raise
        return Imported(key, reply.descriptor, sock)

    async def probe(self, imported: Imported, *, timeout: float) -> DeviceIdentity:
        key = imported.key
        try:
            sock = imported.sock
            if not isinstance(sock, socket.socket):
                raise TypeError("this import was not made by a TcpUsbipClient")
            conversation = _Conversation(key.server, sock, f"GET_DESCRIPTOR of {key.busid}")
            pipe = ControlPipe(key, imported.descriptor.devid, conversation.read, conversation.send)
            try:
                async with self._clock.timeout(timeout):
                    return await read_identity(key, imported.descriptor.usb_id, pipe)
            except TimeoutError as late:
                raise ServerTimeout(key.server, conversation.doing, timeout) from late
        finally:
            imported.close()

    async def _ask(
        self, server: ServerKey, request: bytes, reply: wire.Decoding[T], doing: str, timeout: float
    ) -> tuple[T, socket.socket]:
        connect_timeout = min(self._connect_timeout, timeout)
        stage, limit = "connect", connect_timeout
        until = self._clock.monotonic() + timeout
        sock: socket.socket | None = None
        try:
            async with self._clock.timeout(timeout):
                async with self._clock.timeout(connect_timeout):
                    sock = await self._connector.connect(server)
                stage, limit = doing, timeout
                # a process that was stopped meanwhile gets here before the event loop checks its timers
                _check_time(self._clock.monotonic(), until)
                conversation = _Conversation(server, sock, doing)
                await conversation.send(request)
                return await conversation.decode(reply), sock
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                raise ServerTimeout(server, stage, limit) from error
            raise


def _check_time(now: float, until: float) -> None:
    if now >= until:
        raise TimeoutError


def refusal(key: DeviceKey, status: int) -> ImportRefused:
    """Returns the error for the status of an IMPORT reply."""
    if status == wire.ST_DEV_BUSY:
        return DeviceBusy(key)
    if status == wire.ST_NODEV:
        return DeviceUnknown(key)
    return ImportRefused(key, status)


class _Conversation:
    """A connection to one server. Never reads more than asked for. Raises ServerUnreachable on socket errors."""

    def __init__(self, server: ServerKey, sock: socket.socket, doing: str) -> None:
        self.server, self.sock, self.doing = server, sock, doing

    async def send(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)
        except OSError as error:
            raise self._lost(error) from error

    async def read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < size:
            try:
                piece = await loop.sock_recv(self.sock, size - len(data))
            except OSError as error:
                raise self._lost(error) from error
            if not piece:
                raise ServerUnreachable(self.server, f"closed the connection instead of answering {self.doing}")
            data += piece
        return bytes(data)

    async def decode(self, reply: wire.Decoding[T]) -> T:
        try:
            need = next(reply)
            while True:
                need = reply.send(await self.read(need))
        except StopIteration as done:
            result: T = done.value
            return result
        except wire.ProtocolViolation as violation:
            raise MalformedReply(self.server, f"{self.doing}: {violation}") from violation

    def _lost(self, error: OSError) -> ServerUnreachable:
        return ServerUnreachable(self.server, f"connection lost during {self.doing}: {error.strerror or error}")


def _still_open(key: DeviceKey, sock: socket.socket) -> None:
    """Raises ServerUnreachable if the server has closed the connection, MalformedReply if it sent more than a reply."""
    try:
        more = sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    except OSError as error:
        raise ServerUnreachable(key.server, f"connection lost after IMPORT {key.busid}") from error
    if more:
        raise MalformedReply(key.server, f"IMPORT {key.busid}: unexpected bytes after the reply")
    raise ServerUnreachable(key.server, f"closed the connection after IMPORT {key.busid}")
