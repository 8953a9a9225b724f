"""The TCP client against servers that do not play by the rules: the right error, in time, and nothing left open."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import (
    DeviceBusy,
    DeviceUnknown,
    ImportRefused,
    MalformedReply,
    ServerTimeout,
    ServerUnreachable,
    UsbipError,
)
from usbip_plugin.model import DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip import client as usbip_client
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.client import Imported, TcpUsbipClient, refusal
from usbip_plugin.usbip.wire import ImportReply, encode_devlist_reply, encode_import_reply
from usbip_sim.server.usbdevice import VirtualDevice

# Seconds within which what must come has come, and seconds given to what never will.
PATIENCE = 10.0
SHORT = 0.1
DEVICE = VirtualDevice("1-1", UsbId(1, 2), serial="S1").descriptor(configured=False)
GOOD_IMPORT = encode_import_reply(ImportReply(0, DEVICE))

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Hostile:
    """A server that does handle with each connection; left is set when a client has gone."""

    handle: Handler
    key: ServerKey = field(default_factory=lambda: ServerKey("127.0.0.1", 0))
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                await self.handle(reader, writer)
                while await reader.read(65536):
                    pass
        finally:
            self.left.set()
            writer.close()


@contextlib.asynccontextmanager
async def serving(handle: Handler) -> AsyncIterator[Hostile]:
    hostile = Hostile(handle)
    server = await asyncio.start_server(hostile.serve, "127.0.0.1", 0)
    hostile.key = ServerKey("127.0.0.1", server.sockets[0].getsockname()[1])
    async with server:
        yield hostile
        async with asyncio.timeout(PATIENCE):
            await hostile.left.wait()


def says(data: bytes, *, then_close: bool = False) -> Handler:
    """Waits for the first byte of a request, answers with data."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(data)
        if then_close:
            writer.write_eof()

    return handle


@pytest.fixture
def client() -> Iterator[TcpUsbipClient]:
    client = TcpUsbipClient(SystemClock())
    yield client
    client.close()


async def devlist(client: TcpUsbipClient, hostile: Hostile, timeout: float = PATIENCE) -> int:
    return len(await client.devlist(hostile.key, timeout=timeout))


async def import_device(client: TcpUsbipClient, hostile: Hostile, timeout: float = PATIENCE) -> Imported:
    return await client.import_device(DeviceKey(hostile.key, "1-1"), timeout=timeout)


async def test_silence_is_a_timeout_that_says_what_was_asked(client: TcpUsbipClient) -> None:
    async with serving(says(b"")) as hostile:
        with pytest.raises(ServerTimeout, match=r"no answer to IMPORT 1-1 within 0\.1 s"):
            await import_device(client, hostile, SHORT)
    async with serving(says(b"")) as hostile:
        with pytest.raises(ServerTimeout, match="no answer to DEVLIST"):
            await devlist(client, hostile, SHORT)


async def test_bytes_that_trickle_do_not_extend_the_time(client: TcpUsbipClient) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in GOOD_IMPORT:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(SHORT / 10)

    async with serving(trickle) as hostile:
        with pytest.raises(ServerTimeout):
            await import_device(client, hostile, SHORT)


async def test_a_reply_in_single_bytes_is_read(client: TcpUsbipClient) -> None:
    async def pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in GOOD_IMPORT:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    async with serving(pieces) as hostile:
        imported = await import_device(client, hostile)
        assert imported.descriptor == DEVICE
        imported.close()


@pytest.mark.parametrize("sent", [0, 4, 8, 100, 319])
async def test_a_connection_closed_early_says_so(client: TcpUsbipClient, sent: int) -> None:
    async with serving(says(GOOD_IMPORT[:sent], then_close=True)) as hostile:
        with pytest.raises(ServerUnreachable, match="closed the connection instead of answering IMPORT 1-1"):
            await import_device(client, hostile)


async def test_a_reset_connection_is_unreachable(client: TcpUsbipClient) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with serving(reset) as hostile:
        with pytest.raises(ServerUnreachable, match="connection lost during IMPORT 1-1"):
            await import_device(client, hostile)


async def test_a_socket_that_the_server_closed_after_its_reply_is_not_handed_out(client: TcpUsbipClient) -> None:
    async with serving(says(GOOD_IMPORT, then_close=True)) as hostile:
        with pytest.raises(ServerUnreachable, match="closed the connection after IMPORT 1-1"):
            await import_device(client, hostile)


async def test_bytes_after_an_import_reply_are_refused(client: TcpUsbipClient) -> None:
    async with serving(says(GOOD_IMPORT + b"\0")) as hostile:
        with pytest.raises(MalformedReply, match="bytes after the reply"):
            await import_device(client, hostile)


async def test_an_endless_list_is_cut_off_at_its_announced_and_bounded_end(client: TcpUsbipClient) -> None:
    entry = encode_devlist_reply([DEVICE])[12:]

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack(">HHII", 0x0111, 5, 0, 256))
        while True:
            writer.write(entry * 100)
            await writer.drain()

    async with serving(endless) as hostile:
        assert await devlist(client, hostile) == 1


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack(">HHII", 0x0111, 5, 0, 0xFFFFFFFF),
        struct.pack(">HHII", 0x0111, 5, 0, 257),
        struct.pack(">HHII", 0x0111, 5, 1, 0),
        struct.pack(">HHII", 0x0110, 5, 0, 0),
        GOOD_IMPORT,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
    ],
)
async def test_what_is_no_list_is_malformed(client: TcpUsbipClient, reply: bytes) -> None:
    async with serving(says(reply)) as hostile:
        with pytest.raises(MalformedReply, match="DEVLIST"):
            await devlist(client, hostile)


async def test_an_import_reply_about_another_device_is_malformed(client: TcpUsbipClient) -> None:
    async with serving(says(GOOD_IMPORT)) as hostile:
        with pytest.raises(MalformedReply, match=r"expected a reply about 1-1\.4"):
            await client.import_device(DeviceKey(hostile.key, "1-1.4"), timeout=PATIENCE)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (1, ImportRefused),
        (2, DeviceBusy),
        (3, ImportRefused),
        (4, DeviceUnknown),
        (5, ImportRefused),
        (77, ImportRefused),
    ],
)
async def test_each_refusal_has_its_error(client: TcpUsbipClient, status: int, error: type[ImportRefused]) -> None:
    async with serving(says(encode_import_reply(ImportReply(status, None)))) as hostile:
        with pytest.raises(error, match=f"status {status}") as caught:
            await import_device(client, hostile)
        assert type(caught.value) is error
        assert type(refusal(DeviceKey(hostile.key, "1-1"), status)) is error


REAL = VirtualDevice("1-1", UsbId(1, 2)).usb_descriptor(1, 0, UsbId(1, 2)) or b""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (bytes(48), "expected RET_SUBMIT or RET_UNLINK"),
        (wire.encode_return(wire.SubmitReturn(7, 0, 18)) + REAL, "another transfer"),
        (wire.encode_return(wire.SubmitReturn(1, 0, 19)) + REAL + b"!", "another transfer"),
        (wire.encode_return(wire.UnlinkReturn(1, 0)), "another transfer"),
        (wire.encode_return(wire.SubmitReturn(1, -wire.EPIPE, 0)), "no device descriptor"),
        (wire.encode_return(wire.SubmitReturn(1, -71, 0)), "failed .status -71"),
        (wire.encode_return(wire.SubmitReturn(1, 0, 2)) + REAL[:2], "no device descriptor"),
    ],
)
async def test_a_device_that_answers_nonsense_is_an_error_and_let_go(
    client: TcpUsbipClient, answer: bytes, reason: str
) -> None:
    async def device(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(40)
        writer.write(GOOD_IMPORT)
        command = wire.decode_command(await reader.readexactly(wire.HEADER_BYTES))
        assert isinstance(command, wire.Submit)
        assert command.devid == DEVICE.devid
        writer.write(answer)

    async with serving(device) as hostile:
        imported = await import_device(client, hostile)
        with pytest.raises(UsbipError, match=f"1-1.*{reason}"):
            await client.probe(imported, timeout=PATIENCE)
        assert imported.sock.fileno() == -1


async def test_an_imported_socket_notices_a_dead_server_by_itself(client: TcpUsbipClient) -> None:
    async with serving(says(GOOD_IMPORT)) as hostile:
        imported = await import_device(client, hostile)
        with socket.socket(fileno=socket.dup(imported.sock.fileno())) as sock:
            read = sock.getsockopt
            assert read(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert read(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert read(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
            assert read(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 2
            assert read(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
            assert read(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == usbip_client.USER_TIMEOUT_MS == 8000
        imported.close()


async def test_a_server_that_takes_no_connection_is_a_timeout_of_the_connect() -> None:
    client = TcpUsbipClient(SystemClock(), connect_timeout=SHORT)
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than its queue holds: the kernel drops what comes next
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        with pytest.raises(ServerTimeout, match=r"no answer to connect within 0\.1 s"):
            await client.devlist(ServerKey(*full.getsockname()), timeout=PATIENCE)
    client.close()
