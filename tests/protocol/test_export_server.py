"""The exporter's server over the loopback: the plugin's client, the bytes of the stock tool, misbehaving clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.rigs.command_rig import NEEDS_IPV6
from tests.rigs.exporter_rig import ExporterRig, closed
from tests.rigs.host_suite import CONVERTER, DISK, STICK
from tests.rigs.tasks import background
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import DeviceBusy, DeviceUnknown, ImportRefused, ListenFailed, MalformedReply, UsbipError
from usbip_plugin.exporter import exports, server
from usbip_plugin.exporter.host import StubStatus
from usbip_plugin.exporter.server import MAX_CONNECTIONS, MAX_PER_PEER, Dropped, ExportServer, bind_sockets
from usbip_plugin.model import DeviceKey, Endpoint, ServerKey
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.client import TcpUsbipClient

PATIENCE_S = 20.0
"""Limits a wait in seconds. Only a hanging test reaches it."""
SHORT_S = 0.2
"""Seconds given to a client that never asks."""
ASK_LIST = bytes.fromhex("0111 8005 00000000")
"""What `usbip list --remote` sends (op_common of tools/usb/usbip/src/usbip_network.h)."""


def ask_import(busid: str) -> bytes:
    """What `usbip attach` sends: op_common, then the bus ID in 32 bytes."""
    return bytes.fromhex("0111 8003 00000000") + busid.encode().ljust(32, b"\0")


class Lab(ExporterRig):
    """A served exporter. drops: the connections that did not get what they wanted."""

    limit_s = PATIENCE_S

    def __init__(self, state: Path, host: str) -> None:
        super().__init__(SystemClock(), state, reset_time=0.0)
        self.address = host
        self.client = TcpUsbipClient(SystemClock())
        self.drops: list[Dropped] = []

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with self.running():
            sockets = bind_sockets(self.address, 0)
            self.key = ServerKey(self.address, sockets[0].getsockname()[1])
            self.server = ExportServer(sockets, self.exports, self.clock, None, self.drops.append)
            self.server.listen()
            async with background(self.server.run()):
                yield

    @property
    def stick(self) -> DeviceKey:
        return DeviceKey(self.key, "1-1")

    async def devices(self) -> list[str]:
        return [device.busid for device in (await self.client.devlist(self.key, timeout=PATIENCE_S)).devices]

    async def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET)
        sock.setblocking(False)
        self.clients.append(sock)
        await asyncio.get_running_loop().sock_connect(sock, (self.key.host, self.key.port))
        return sock

    async def ask(self, request: bytes, size: int) -> tuple[socket.socket, bytes]:
        """Returns the connection and the first bytes of the answer, fewer if the exporter closes it."""
        sock = await self.connect()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, request)
        return sock, await self.read(sock, size)

    async def read(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionResetError):  # it was closed with bytes that nobody has read
                while len(data) < size and (
                    piece := await asyncio.get_running_loop().sock_recv(sock, size - len(data))
                ):
                    data += piece
        return data


@pytest.fixture(params=["127.0.0.1", pytest.param("::1", marks=NEEDS_IPV6)])
async def lab(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path, request.param)
    async with lab.serving():
        yield lab
    lab.client.close()
    lab.close()
    await asyncio.sleep(0)


async def test_the_plugins_client_lists_imports_and_reads_a_device(lab: Lab) -> None:
    stick, converter = (await lab.client.devlist(lab.key, timeout=PATIENCE_S)).devices
    assert (stick.busid, stick.usb_id, stick.configuration, stick.interfaces) == ("1-1", STICK.usb_id, 0, (DISK,))
    assert (converter.busid, converter.interfaces) == ("1-2.3", (CONVERTER.interface, *CONVERTER.more))
    imported = await lab.client.import_device(lab.stick, timeout=PATIENCE_S)
    assert imported.descriptor == lab.host.descriptor("1-1")
    assert await lab.devices() == ["1-2.3"]
    with pytest.raises(DeviceBusy):
        await lab.client.import_device(lab.stick, timeout=PATIENCE_S)
    identity = await lab.client.probe(imported, timeout=PATIENCE_S)
    assert (identity.serial, identity.interfaces) == (STICK.serial, (DISK,))
    await lab.freed("1-1")
    assert await lab.devices() == ["1-1", "1-2.3"]


async def test_the_peer_is_the_clients_own_end_of_the_connection(lab: Lab) -> None:
    imported = await lab.client.import_device(lab.stick, timeout=PATIENCE_S)
    assert isinstance(imported.sock, socket.socket)
    assert lab.exports.current["1-1"].peer == Endpoint.of(imported.sock.getsockname())
    imported.close()


async def test_the_stock_tool_gets_the_list_that_usbipd_sends(lab: Lab) -> None:
    sock, answer = await lab.ask(ASK_LIST, 12)
    assert answer == bytes.fromhex("0111 0005 00000000 00000002")
    device = await lab.read(sock, 312)
    assert device[256 : 256 + 32] == b"1-1".ljust(32, b"\0")
    busnum, devnum, speed, vendor, product, bcd, *rest = struct.unpack(">IIIHHHBBBBBB", device[288:])
    assert (busnum, speed, vendor, product, bcd) == (1, 3, 0x0951, 0x1666, 0x0100)
    assert rest == [0, 0, 0, 0, 1, 1], "class, subclass, protocol, configuration, configurations, interfaces"
    assert await lab.read(sock, 4) == bytes([*(8, 6, 0x50), 0])
    assert len(await lab.read(sock, 1000)) == 312 + 2 * 4, "the second device, and then the end"
    assert devnum


async def test_the_stock_tool_imports_and_the_kernel_gets_what_follows(lab: Lab) -> None:
    """The client's kernel may send at once: nothing of it may be read with the request."""
    setup = bytes([0x80, 6, 0, 1, 0, 0, 18, 0])
    descriptor = lab.host.descriptor("1-1")
    assert descriptor is not None
    submit = wire.encode_command(wire.Submit(1, descriptor.devid, True, 0, 18, setup))
    sock, answer = await lab.ask(ask_import("1-1") + submit, 8 + 312)
    assert answer[:8] == bytes.fromhex("0111 0003 00000000")
    returned = wire.decode_return(await lab.read(sock, wire.HEADER_BYTES))
    assert returned == wire.SubmitReturn(1, 0, 18)
    assert (await lab.read(sock, 18))[8:12] == struct.pack("<HH", 0x0951, 0x1666)


@pytest.mark.parametrize(
    ("prepare", "busid", "status", "error"),
    [
        (lambda lab: lab.host.hold("1-1"), "1-1", 2, DeviceBusy),
        (lambda lab: setattr(lab.host, "status", lambda _busid: StubStatus.ERROR), "1-1", 3, ImportRefused),
        (lambda _lab: None, "9-9", 4, DeviceUnknown),
        (lambda lab: lab.gate.refusals.update({"1-1": "its lock is held by node-b"}), "1-1", 1, ImportRefused),
    ],
)
async def test_a_refused_import_has_the_status_of_usbipd_and_closes(
    lab: Lab, prepare: Callable[[Lab], None], busid: str, status: int, error: type[UsbipError]
) -> None:
    prepare(lab)
    _, answer = await lab.ask(ask_import(busid), 1000)
    assert answer == bytes.fromhex("0111 0003") + struct.pack(">I", status)
    with pytest.raises(error, match=f"status {status}"):
        await lab.client.import_device(DeviceKey(lab.key, busid), timeout=PATIENCE_S)


async def test_a_client_that_is_not_allowed_gets_neither_list_nor_device(lab: Lab) -> None:
    lab.server.allow = [ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/32")]
    with pytest.raises(MalformedReply, match=r"refused DEVLIST \(status 1\)"):
        await lab.devices()
    with pytest.raises(ImportRefused, match="status 1"):
        await lab.client.import_device(lab.stick, timeout=PATIENCE_S)
    assert lab.gate.asked == []
    assert lab.drops == [Dropped.NOT_ALLOWED] * 2
    assert [line["reason"] for line in lab.logged("connection refused")] == ["not_allowed"], "logged once"
    lab.server.allow = [ipaddress.ip_network(lab.address)]
    assert await lab.devices() == ["1-1", "1-2.3"]


@pytest.mark.parametrize(
    "request_",
    [
        bytes.fromhex("0110 8005 00000000"),
        bytes.fromhex("0111 8007 00000000"),
        ask_import("../../etc"),
        bytes.fromhex("0111 8003 00000000") + b"1" * 32,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_a_request_that_is_not_usbip_ends_the_connection(lab: Lab, request_: bytes) -> None:
    _, answer = await lab.ask(request_, 1)
    assert answer == b""
    assert lab.drops == [Dropped.INVALID]
    assert await lab.devices() == ["1-1", "1-2.3"]


async def test_a_client_that_hangs_up_early_is_no_problem(lab: Lab) -> None:
    for begin in (b"", ASK_LIST[:3], ask_import("1-1")[:20]):
        sock = await lab.connect()
        await asyncio.get_running_loop().sock_sendall(sock, begin)
        sock.close()
    assert await lab.devices() == ["1-1", "1-2.3"]
    assert lab.drops == []


async def test_a_slow_client_delays_nobody_and_is_dropped(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_S", SHORT_S)
    slow = [await lab.connect() for _ in range(3)]
    await asyncio.get_running_loop().sock_sendall(slow[0], ASK_LIST[:7])
    assert await lab.devices() == ["1-1", "1-2.3"]
    for sock in slow:
        assert await lab.read(sock, 1) == b""
    await lab.until(lambda: lab.drops == [Dropped.TIMEOUT] * 3)


async def test_one_address_has_a_few_connections_at_once(lab: Lab) -> None:
    waiting = [await lab.connect() for _ in range(MAX_PER_PEER)]
    assert (await lab.ask(ASK_LIST, 1))[1] == b""
    assert lab.drops == [Dropped.TOO_MANY_OF_PEER]
    waiting[0].close()
    await lab.until(lambda: lab.server._open.total() < MAX_PER_PEER)
    assert await lab.devices() == ["1-1", "1-2.3"]


async def test_all_addresses_together_have_a_bound(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PER_PEER", MAX_CONNECTIONS + 1)
    waiting = [await lab.connect() for _ in range(MAX_CONNECTIONS)]
    assert (await lab.ask(ASK_LIST, 1))[1] == b""
    assert lab.drops == [Dropped.TOO_MANY]
    for sock in waiting:
        sock.close()
    await lab.until(lambda: not lab.server._open)
    assert await lab.devices() == ["1-1", "1-2.3"]


async def test_clients_that_are_not_allowed_share_one_bound(lab: Lab) -> None:
    """Else a few addresses of strangers could take all connections from those who are allowed."""
    lab.server.allow = []
    for _ in range(MAX_PER_PEER):
        await lab.connect()
    assert (await lab.ask(ASK_LIST, 1))[1] == b""
    lab.server.allow = None
    assert await lab.devices() == ["1-1", "1-2.3"]


async def test_an_imports_connection_does_not_count(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PER_PEER", 1)
    imported = await lab.client.import_device(lab.stick, timeout=PATIENCE_S)
    await lab.until(lambda: not lab.server._open)
    assert await lab.devices() == ["1-2.3"]
    imported.close()


async def test_a_dead_client_is_noticed_by_the_kernel(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """usbipd sets no keepalive: it exports a device to a node without power for ever."""
    options: list[int] = []
    export = lab.host.export

    async def looked_at(busid: str, fd: int) -> None:
        with socket.socket(fileno=socket.dup(fd)) as sock:
            tcp = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            options.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            options.extend(sock.getsockopt(socket.IPPROTO_TCP, option) for option in tcp)
        await export(busid, fd)

    monkeypatch.setattr(lab.host, "export", looked_at)
    (await lab.client.import_device(lab.stick, timeout=PATIENCE_S)).close()
    assert options == [1, 2, 1, 4, 6000], "set before the kernel has the socket"


async def test_an_import_whose_reply_cannot_be_sent_is_ended(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "POLL_S", 0.01)
    export = lab.host.export

    async def then_gone(busid: str, fd: int) -> None:
        await export(busid, fd)
        with socket.socket(fileno=socket.dup(fd)) as sock:
            sock.shutdown(socket.SHUT_WR)

    monkeypatch.setattr(lab.host, "export", then_gone)
    sock, answer = await lab.ask(ask_import("1-1"), 1)
    assert answer == b""
    await lab.until(lambda: not lab.exports.current)
    assert closed(sock)
    assert lab.host.status("1-1") is StubStatus.AVAILABLE


async def test_a_successor_serves_on_the_same_port_and_ends_nothing(lab: Lab) -> None:
    imported = await lab.client.import_device(lab.stick, timeout=PATIENCE_S)
    port = lab.key.port
    with pytest.raises(ListenFailed, match="stop the other server"):
        bind_sockets(lab.address, port)
    async with contextlib.AsyncExitStack() as stack:
        successor = Lab(lab.state._path.parent, lab.address)
        successor.host = lab.host
        lab.server._sockets[0].close()
        await stack.enter_async_context(successor.running())
        sockets = bind_sockets(lab.address, port)
        served = ExportServer(sockets, successor.exports, lab.clock, None)
        served.listen()
        await stack.enter_async_context(background(served.run()))
        assert await lab.devices() == ["1-2.3"]
        assert successor.exports.current["1-1"].peer == lab.exports.current["1-1"].peer
        assert (await lab.client.probe(imported, timeout=PATIENCE_S)).serial == STICK.serial
        successor.client.close()


async def test_a_client_is_refused_until_the_devices_are_bound(lab: Lab) -> None:
    """In the backlog it would wait for longer than it asks."""
    sockets = bind_sockets(lab.address, 0)
    server = ExportServer(sockets, lab.exports, lab.clock, None)
    here = sockets[0].getsockname()
    with contextlib.closing(sockets[0]):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(here[:2])
        server.listen()
        socket.create_connection(here[:2]).close()


def test_an_address_that_is_not_this_hosts_is_an_error_with_the_cure() -> None:
    with pytest.raises(ListenFailed, match=r"cannot listen on 192\.0\.2\.1:3240: .*; for --listen, use another"):
        bind_sockets("192.0.2.1", 3240)
    with pytest.raises(ListenFailed, match=r"cannot listen on no\.\.host:3240"):
        bind_sockets("no..host", 3240)


@NEEDS_IPV6
def test_every_address_of_both_families_is_served_on_one_port() -> None:
    sockets = bind_sockets(None, 0)
    try:
        assert sorted(sock.family for sock in sockets) == [socket.AF_INET, socket.AF_INET6]
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


def test_a_host_without_ipv6_is_served_over_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.bind

    def bind(sock: socket.socket, address: tuple[object, ...]) -> None:
        if sock.family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        real(sock, address)

    monkeypatch.setattr(socket.socket, "bind", bind)
    (sock,) = bind_sockets(None, 0)
    assert sock.family == socket.AF_INET
    sock.close()
