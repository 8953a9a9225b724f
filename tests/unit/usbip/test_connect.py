"""Connections to servers: every address is tried, a silent name server delays nothing else, a dead peer is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import DeviceBusy, ServerTimeout, ServerUnreachable
from usbip_plugin.model import DeviceKey, Endpoint, ServerKey, UsbId
from usbip_plugin.usbip import connect as connect_module
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.usbip.connect import USER_TIMEOUT_MS, Addresses, Connector, SourcePort, resolve
from usbip_plugin.usbip.wire import ST_DEV_BUSY, ImportReply, encode_import_reply
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

PATIENCE = 10.0
"""Limits a wait for an answer that must come, in seconds. Only a hanging test reaches it."""
SHORT = 0.1
"""Seconds given to an answer that never comes."""


def address(host: str, port: int) -> tuple[int, int, int, str, tuple[str, int]]:
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def test_the_next_address_is_tried_when_one_refuses(listener: socket.socket, closed_port: int) -> None:
    port = listener.getsockname()[1]
    connector = Connector(lambda _: [address("127.0.0.1", closed_port), address("127.0.0.1", port)])
    async with asyncio.timeout(PATIENCE):
        sock = await connector.connect(ServerKey("lab-pc.test"))
    assert sock.getpeername() == ("127.0.0.1", port)
    assert sock.gettimeout() == 0
    sock.close()
    connector.close()


async def test_refused_by_all_names_the_server(closed_port: int) -> None:
    connector = Connector(lambda _: [address("127.0.0.1", closed_port)])
    with pytest.raises(ServerUnreachable, match=r"USB/IP server lab-pc.test:3240: connection refused"):
        await connector.connect(ServerKey("lab-pc.test"))
    connector.close()


async def test_a_source_port_is_for_the_address_that_answered_last(listener: socket.socket, closed_port: int) -> None:
    server, port = ServerKey("lab-pc.test"), listener.getsockname()[1]
    connector = Connector(lambda _: [address("127.0.0.1", closed_port), address("127.0.0.1", port)])
    (await connector.connect(server)).close()
    source = await connector.bind(server)
    sock = await source.connect()
    assert (sock.getpeername()[1], Endpoint.of(sock.getsockname())) == (port, source.endpoint)
    sock.close()
    source.close()
    connector.close()


async def test_a_server_without_a_route_is_unreachable() -> None:
    connector = Connector(lambda _: [address("255.255.255.255", 3240)])
    with pytest.raises(ServerUnreachable, match="cannot connect"):
        await connector.bind(ServerKey("lab-pc.test"))
    connector.close()


async def test_a_refused_import_is_repeated_from_the_same_port_also_if_the_server_keeps_the_connection() -> None:
    kept: list[asyncio.StreamWriter] = []

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept.append(writer)
        writer.write(encode_import_reply(ImportReply(ST_DEV_BUSY, None)))

    with contextlib.closing(TcpUsbipClient(SystemClock())) as client:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            key = DeviceKey(ServerKey(*server.sockets[0].getsockname()), "1-1")
            with contextlib.closing(await client.bind(key.server, timeout=PATIENCE)) as source:
                for _ in range(3):
                    with pytest.raises(DeviceBusy):
                        await client.import_device(key, source=source, timeout=PATIENCE)
    for writer in kept:
        writer.transport.abort()


class Mute:
    """A source port from which a server does not answer until the time is over."""

    endpoint = Endpoint("127.0.0.1", 40123)

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def connect(self) -> socket.socket:
        await self.over.wait()
        raise TimeoutError

    def close(self) -> None:
        pass


class AskedConnector(Connector):
    """A Connector that records the ports that it was asked to bind again."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[Endpoint | None] = []

    async def bind(self, server: ServerKey, last: Endpoint | None = None) -> SourcePort:
        self.last.append(last)
        return await super().bind(server, last)


@pytest.mark.parametrize("answers_others", [True, False])
async def test_a_port_is_given_up_if_the_server_answers_others_only(answers_others: bool) -> None:
    """A firewall may drop the SYN of a connection that it takes for open. In a cut, nobody gets an answer."""
    connector = AskedConnector()
    client = TcpUsbipClient(SystemClock(), connector, connect_timeout=PATIENCE)
    server = VirtualServer()
    await server.start()
    key = DeviceKey(server.key, "1-1")
    mute = Mute()
    asking = asyncio.ensure_future(client.import_device(key, source=mute, timeout=PATIENCE))
    await asyncio.sleep(0)  # the import has begun
    if answers_others:
        await client.devlist(server.key, timeout=PATIENCE)
    mute.over.set()
    with pytest.raises(ServerTimeout):
        await asking
    (await client.bind(server.key, Mute.endpoint, timeout=PATIENCE)).close()
    await server.stop()
    client.close()
    assert connector.last == [None if answers_others else Mute.endpoint]


class StuckNames:
    """A name server that does not answer until `go` is set."""

    def __init__(self, answer: Addresses) -> None:
        self.answer, self.asked, self.go = answer, 0, threading.Event()

    def __call__(self, server: ServerKey) -> Addresses:
        self.asked += 1
        assert self.go.wait(PATIENCE)
        return self.answer


async def test_a_name_is_looked_up_once_at_a_time_and_in_one_thread(listener: socket.socket) -> None:
    names = StuckNames([address(*listener.getsockname())])
    connector = Connector(names)
    for _ in range(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT / 10):
                await connector.connect(ServerKey("lab-pc.test"))
    assert names.asked <= 1
    async with asyncio.timeout(PATIENCE):
        (await connector.connect(ServerKey(*listener.getsockname()))).close()  # an address needs no name server
        waiting = asyncio.ensure_future(connector.connect(ServerKey("lab-pc.test")))
        names.go.set()
        (await waiting).close()
    assert names.asked == 1
    async with asyncio.timeout(PATIENCE):
        (await connector.connect(ServerKey("lab-pc.test"))).close()
    assert names.asked == 2, "an answer is not kept"
    connector.close()


async def test_names_that_are_not_answered_delay_no_other_name(listener: socket.socket) -> None:
    stuck = StuckNames([])

    def resolve(server: ServerKey) -> Addresses:
        return [address(*listener.getsockname())] if server.host == "lab-pc.test" else stuck(server)

    connector = Connector(resolve)
    waiting = [asyncio.ensure_future(connector.connect(ServerKey(f"pc-{number}.silent"))) for number in range(40)]
    await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        (await connector.connect(ServerKey("lab-pc.test"))).close()
    assert not any(one.done() for one in waiting)
    connector.close()
    stuck.go.set()
    assert all(
        isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*waiting, return_exceptions=True)
    )


REAL, OF_A_SERVICE = "192.0.2.1", "10.96.0.66"
"""Addresses of the server that an administrator means, and of a Service that a user of the cluster named like it."""


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A resolver with a pod's search path, by a dict of absolute names; /etc/hosts is an empty file."""
    answers: dict[str, str] = {}

    def getaddrinfo(host: str, port: int, **_: object) -> Addresses:
        search = (
            () if host.endswith(".") else ("usbip-system.svc.cluster.local.", "svc.cluster.local.", "cluster.local.")
        )
        for name in (*(f"{host}.{suffix}" for suffix in search), host if host.endswith(".") else f"{host}."):
            if name in answers:
                return [address(answers[name], port)]
        if host in answers.values():
            return [address(host, port)]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(connect_module, "HOSTS", tmp_path / "hosts")
    (tmp_path / "hosts").write_text("")
    return answers


@pytest.mark.parametrize("real_name_exists", [True, False])
def test_no_service_takes_the_name_of_a_server(names: dict[str, str], real_name_exists: bool) -> None:
    names["lab-pi.lan.svc.cluster.local."] = OF_A_SERVICE
    names["lab-pi.lan.usbip-system.svc.cluster.local."] = OF_A_SERVICE
    if not real_name_exists:
        with pytest.raises(ServerUnreachable, match="no such host"):
            resolve(ServerKey("lab-pi.lan"))
        return
    names["lab-pi.lan."] = REAL
    assert resolve(ServerKey("lab-pi.lan")) == [address(REAL, 3240)]


def test_a_name_without_a_dot_is_a_service_of_the_plugins_namespace(names: dict[str, str]) -> None:
    names["usbip-server.usbip-system.svc.cluster.local."] = OF_A_SERVICE
    assert resolve(ServerKey("usbip-server")) == [address(OF_A_SERVICE, 3240)]


def test_the_hosts_file_comes_first(names: dict[str, str], tmp_path: Path) -> None:
    names["lab-pi.lan."] = OF_A_SERVICE
    names["x."] = REAL
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n# {OF_A_SERVICE} lab-pi.lan\n{REAL}\tpi Lab-Pi.lan # x\n")
    assert resolve(ServerKey("lab-pi.LAN")) == [address(REAL, 3240)]
    (tmp_path / "hosts").unlink()
    assert resolve(ServerKey("lab-pi.lan")) == [address(OF_A_SERVICE, 3240)]


@pytest.mark.usefixtures("names")
def test_a_name_of_multicast_dns_is_explained() -> None:
    with pytest.raises(ServerUnreachable, match=r"no such host: .*; pods do not resolve names that end in \.local"):
        resolve(ServerKey("raspberrypi.local"))
    with pytest.raises(ServerUnreachable) as other:
        resolve(ServerKey("raspberrypi.lan"))
    assert ".local" not in str(other.value)


@pytest.mark.parametrize("host", ["no..host", "x" * 300])
async def test_an_impossible_name_is_an_unknown_host(host: str) -> None:
    connector = Connector()
    with pytest.raises(ServerUnreachable, match="no such host"):
        await connector.connect(ServerKey(host))
    connector.close()


@contextlib.asynccontextmanager
async def imports_from(*, reset: bool) -> AsyncIterator[tuple[TcpUsbipClient, DeviceKey]]:
    """Runs a server that answers an import, or resets the connection instead."""
    device, ended = VirtualDevice("1-1", UsbId(1, 2)).descriptor(configured=False), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        else:
            writer.write(encode_import_reply(ImportReply(0, device)))
            await reader.read()
            writer.close()
        ended.set()

    client = TcpUsbipClient(SystemClock())
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield client, DeviceKey(ServerKey(*server.sockets[0].getsockname()), "1-1")
        await ended.wait()
    client.close()


async def test_a_reset_connection_is_unreachable() -> None:
    async with imports_from(reset=True) as (client, key):
        with pytest.raises(ServerUnreachable, match="connection lost during IMPORT 1-1"):
            await client.import_device(key, timeout=PATIENCE)


async def test_an_imported_socket_notices_a_dead_server_by_itself() -> None:
    async with imports_from(reset=False) as (client, key):
        imported = await client.import_device(key, timeout=PATIENCE)
        with socket.socket(fileno=socket.dup(imported.sock.fileno())) as sock:
            read = sock.getsockopt
            assert read(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert read(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert read(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
            assert read(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 2
            assert read(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
            assert read(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_MS == 8000
        imported.close()


async def test_a_server_that_accepts_no_connection_is_a_timeout_of_the_connect() -> None:
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
