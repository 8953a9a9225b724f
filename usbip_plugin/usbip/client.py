"""The USB/IP client: lists and imports the devices of servers, and probes an imported device.

Connections are raw TCP sockets, because the file descriptor of an imported device goes to the kernel.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from usbip_plugin import model
from usbip_plugin.clock import Clock
from usbip_plugin.errors import (
    DeviceBusy,
    DeviceUnknown,
    ImportRefused,
    MalformedReply,
    ServerTimeout,
    ServerUnreachable,
    SourceClosing,
    UsbipError,
)
from usbip_plugin.model import Descriptor, DeviceKey, Endpoint, ServerKey
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.connect import Connector, Dialler, Source, reset
from usbip_plugin.usbip.identify import ControlPipe, DeviceIdentity, read_identity

log = logging.getLogger(__name__)

T = TypeVar("T")

DeviceList: TypeAlias = wire.DevlistReply
"""The devices that a server lists, and the problems of its list."""
why_unlisted = wire.why_unlisted

# Default limit for resolving the name and connecting (seconds).
CONNECT_TIMEOUT = 3.0
# Tries to bind the source port of a connection that the server is about to end, within 1.5 s. A server ends it within
# milliseconds; without an answer, this node's kernel forgets it after USER_TIMEOUT_MS.
BIND_ATTEMPTS = 6
BIND_FIRST_WAIT = 0.05
# Most source ports remembered from which a server does not answer.
MAX_MUTE_SOURCES = 64


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

    async def bind(self, server: ServerKey, last: Endpoint | None = None, *, timeout: float) -> Source:
        """Returns a local address and port from which to import. The caller must close it.

        last: from where this node has last imported the device. That is taken if possible, so that the import ends a
            half-open connection from there. Raises SourceClosing while that connection is closing.
        """

    async def end_half_open(self, server: ServerKey, source: Endpoint, *, timeout: float) -> bool:
        """Ends a connection of this node that is half-open at the server: connects once from its port, and closes.

        Returns False without connecting if the last connection from there has ended at both ends. Raises SourceNotLocal
        if the address is not of this node.
        """

    async def import_device(self, key: DeviceKey, *, source: Source | None = None, timeout: float) -> Imported:
        """Imports the device. The caller must close the result, and must compare its vendor:product.

        source: from where; None for any port. May be used again after DeviceBusy and other refusals.
        Raises DeviceBusy, DeviceUnknown or ImportRefused if the server refuses, MalformedReply if the reply is about
        another bus ID. Checks last that the server has not closed the connection: a closed socket must never reach the
        kernel.
        """

    async def probe(self, imported: Imported, *, timeout: float) -> DeviceIdentity:
        """Reads the identity from the device itself, as read_identity does. Closes the import whatever happens.

        Raises WrongDevice if vendor:product are not those of the import reply, UsbipError if a transfer failed. The
        server resets the device afterwards and answers busy for about 0.3 s.
        """


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
        self._connected: Counter[ServerKey] = Counter()
        self._mute: dict[Endpoint, None] = {}

    def close(self) -> None:
        self._connector.close()

    async def devlist(self, server: ServerKey, *, timeout: float) -> DeviceList:
        request = wire.encode_devlist_request()
        reply, sock = await self._ask(server, request, wire.devlist_reply(), "DEVLIST", timeout)
        sock.close()
        return reply

    async def bind(self, server: ServerKey, last: Endpoint | None = None, *, timeout: float) -> Source:
        if last in self._mute:
            last = None
        connect_timeout = min(self._connect_timeout, timeout)
        try:
            async with self._clock.timeout(connect_timeout):
                async for attempt in self._while_closing():
                    with attempt:
                        return await self._connector.bind(server, last)
        except TimeoutError as late:
            raise ServerTimeout(server, "name lookup or close of the last connection", connect_timeout) from late
        raise AssertionError("the retry policy re-raises")

    def _while_closing(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type(SourceClosing),
            stop=stop_after_attempt(BIND_ATTEMPTS),
            wait=wait_exponential(BIND_FIRST_WAIT),
            sleep=self._clock.sleep,
            reraise=True,
        )

    async def end_half_open(self, server: ServerKey, source: Endpoint, *, timeout: float) -> bool:
        try:
            async with self._clock.timeout(timeout):
                return await self._connector.end_half_open(server, source)
        except TimeoutError as late:
            raise ServerTimeout(server, f"connect from {source}", timeout) from late

    async def import_device(self, key: DeviceKey, *, source: Source | None = None, timeout: float) -> Imported:
        if not model.valid_busid(key.busid):
            raise DeviceUnknown(key)
        request, doing = wire.encode_import_request(key.busid), f"IMPORT {key.busid}"
        reply, sock = await self._ask(key.server, request, wire.import_reply(key.busid), doing, timeout, source)
        if reply.descriptor is None:
            reset(sock)
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
        self,
        server: ServerKey,
        request: bytes,
        reply: wire.Decoding[T],
        doing: str,
        timeout: float,
        source: Source | None = None,
    ) -> tuple[T, socket.socket]:
        connect_timeout = min(self._connect_timeout, timeout)
        connected = self._connected[server]
        stage, limit = "connect", connect_timeout
        until = self._clock.monotonic() + timeout
        sock: socket.socket | None = None
        try:
            async with self._clock.timeout(timeout):
                async with self._clock.timeout(connect_timeout):
                    sock = await (self._connector.connect(server) if source is None else source.connect())
                self._connected[server] += 1
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
                if source is not None and sock is None and self._connected[server] > connected:
                    self._note_mute(server, source.endpoint)
                raise ServerTimeout(server, stage, limit) from error
            raise

    def _note_mute(self, server: ServerKey, source: Endpoint) -> None:
        """Makes bind() take no such port again: the server has answered other connections while it did not answer this.

        A firewall may drop a SYN of what it takes for an open connection.
        """
        log.info("no answer to source port of the last import", extra={"server": str(server), "source": str(source)})
        self._mute[source] = None
        while len(self._mute) > MAX_MUTE_SOURCES:
            del self._mute[next(iter(self._mute))]


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
