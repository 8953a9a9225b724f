"""Half-open connections of real TCP, between two network namespaces: how a server without keepalive is rid of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.rigs.two_hosts import BUSID, CLIENT, SERVER, Hosts, run_case, unshare
from usbip_plugin.attach.pipeline import import_busy
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import DeviceBusy, ServerUnreachable
from usbip_plugin.model import DeviceKey, Endpoint
from usbip_plugin.usbip.client import Imported, TcpUsbipClient

TIMEOUT = 5.0
"""Seconds for each call of the client."""
DEVICE = DeviceKey(SERVER, BUSID)


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[TcpUsbipClient]:
    with contextlib.closing(TcpUsbipClient(SystemClock())) as made:
        yield made


async def imported_from(node: TcpUsbipClient, last: Endpoint | None = None) -> tuple[Imported, Endpoint]:
    """Imports the device from a source port, as an attach does, and returns the import and the port."""
    with contextlib.closing(await node.bind(SERVER, last, timeout=TIMEOUT)) as source:
        async for attempt in import_busy(SystemClock(), random.Random(1)):
            with attempt:
                return await node.import_device(DEVICE, source=source, timeout=TIMEOUT), source.endpoint
    raise AssertionError


async def die(imported: Imported) -> None:
    """Waits until this host's kernel finds the connection dead, by keepalive as for an attached device but sooner."""
    sock = imported.sock
    assert isinstance(sock, socket.socket)
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_USER_TIMEOUT, 1000)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    with pytest.raises(TimeoutError):
        await asyncio.get_running_loop().sock_recv(sock, 1)
    imported.close()


async def half_open(hosts: Hosts, node: TcpUsbipClient) -> Endpoint:
    """Cuts the cable until a connection is dead at this host, and returns its port. The server does not know of it."""
    imported, source = await imported_from(node)
    assert await hosts.importers() == [source]
    assert source.address == CLIENT
    await hosts.cut()
    await die(imported)
    await hosts.mend()
    assert await hosts.importers() == [source]
    return source


async def case_import(hosts: Hosts) -> None:
    async with client() as node:
        last = await half_open(hosts, node)
        with pytest.raises(DeviceBusy):
            await imported_from(node)
        again, source = await imported_from(node, last)
        assert source == last
        assert await hosts.importers() == [last]
        again.close()
        await hosts.until_importers([])


async def case_connect(hosts: Hosts) -> None:
    async with client() as node:
        last = await half_open(hosts, node)
        assert (await node.devlist(SERVER, timeout=TIMEOUT)).devices == ()
        assert await node.end_half_open(SERVER, last, timeout=TIMEOUT)
        await hosts.until_importers([])
        imported, _ = await imported_from(node)
        imported.close()


async def case_live(hosts: Hosts) -> None:
    async with client() as node:
        imported, source = await imported_from(node)
        with pytest.raises(ServerUnreachable, match="Cannot assign requested address"):
            await node.end_half_open(SERVER, source, timeout=TIMEOUT)
        other = await node.bind(SERVER, source, timeout=TIMEOUT)
        assert other.endpoint != source
        other.close()
        await node.probe(imported, timeout=TIMEOUT)
        await hosts.until_importers([])
        assert not await node.end_half_open(SERVER, source, timeout=TIMEOUT), "both kernels know that it has ended"


async def case_orphan(hosts: Hosts) -> None:
    """A connection that is closed during a cut: its FIN is repeated for a while, and the port is not free so long."""
    async with client() as node:
        imported, source = await imported_from(node)
        sock = imported.sock
        assert isinstance(sock, socket.socket)
        await hosts.cut()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
        imported.close()
        bound: list[Endpoint] = []
        while not bound:
            with contextlib.suppress(ServerUnreachable):
                port = await node.bind(SERVER, source, timeout=TIMEOUT)
                bound.append(port.endpoint)
                port.close()
        assert bound == [source], "no other port was bound meanwhile: nobody would have known of this one"
        await hosts.mend()
        assert await hosts.importers() == [source]
        again, _ = await imported_from(node, source)
        again.close()


@pytest.mark.parametrize("case", [case_import, case_connect, case_live, case_orphan])
def test_on_two_hosts(case: Callable[[Hosts], Awaitable[None]], needs: Callable[[bool, str], None]) -> None:
    needs(unshare() is not None, "network namespaces, and the programs unshare, nsenter and ip")
    run_case(case)
