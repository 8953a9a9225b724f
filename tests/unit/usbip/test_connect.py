"""Names and addresses of servers: every address is tried, and a dead name server is nobody else's trouble."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from usbip_plugin.errors import ServerUnreachable
from usbip_plugin.model import ServerKey
from usbip_plugin.usbip.client import Addresses, Connector

# Seconds within which what must come has come, and seconds given to what never will.
PATIENCE = 10.0
SHORT = 0.1


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


class StuckNames:
    """A name server that does not answer until told to."""

    def __init__(self, answer: Addresses) -> None:
        self.answer, self.asked, self.go = answer, 0, threading.Event()

    def __call__(self, server: ServerKey) -> Addresses:
        self.asked += 1
        assert self.go.wait(PATIENCE)
        return self.answer


async def test_a_name_is_asked_for_once_at_a_time_and_gives_up_no_thread(listener: socket.socket) -> None:
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
    assert names.asked == 2, "an old answer was kept for ever"
    connector.close()


@pytest.mark.parametrize("host", ["no..host", "x" * 300])
async def test_an_impossible_name_is_no_such_host(host: str) -> None:
    connector = Connector()
    with pytest.raises(ServerUnreachable, match="no such host"):
        await connector.connect(ServerKey(host))
    connector.close()
