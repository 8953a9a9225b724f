"""Doubles of the kernel and the server against peers that break the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.rigs.vocabulary import KEY, descriptor
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import VhciError
from usbip_plugin.model import InterfaceRules, UsbId
from usbip_plugin.usbip import wire as usbip_wire
from usbip_plugin.usbip.wire import ProtocolViolation
from usbip_sim.kernel import wire
from usbip_sim.kernel.channel import MAX_MESSAGE, Channel
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kernel.remote import RemoteVhci
from usbip_sim.kernel.service import KernelService
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import MAX_ECHO_BYTES, MAX_WAITING, Transfers, VirtualDevice
from usbip_sim.virtual.loop import SimClock, virtual

ECHO = VirtualDevice("1-1", UsbId(1, 2), echo=True, configured=True)
LIMIT_S = 20.0


@contextlib.asynccontextmanager
async def kernel_service(path: Path) -> AsyncIterator[None]:
    """Runs a simulated kernel that listens on a socket."""
    listening = asyncio.Event()
    service = KernelService(SimulatedKernel(SystemClock()), path)
    task = asyncio.create_task(service.run(listening=listening.set))
    await listening.wait()
    yield
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize(
    "message",
    [
        b"\xff",
        b"[" * 50_000,
        b'{"cancel": {}}',
        b'{"id": {}, "version": 5, "request": {"call": "ports"}}',
        b'{"id": 1, "version": 5, "request": {"call": "detach", "port": 0, "timeout": NaN}}',
        b'{"id": 1, "version": 5, "request": {"call": "inspect", "key": null, "port": 0}}',
    ],
    ids=lambda message: ascii(message[:60]),
)
async def test_the_simulated_kernel_serves_the_next_driver_after_a_malformed_message(
    tmp_path: Path, message: bytes
) -> None:
    loop = asyncio.get_running_loop()
    async with kernel_service(tmp_path / "socket"), asyncio.timeout(LIMIT_S):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hostile:
            hostile.setblocking(False)
            await loop.sock_connect(hostile, str(tmp_path / "socket"))
            await loop.sock_sendall(hostile, message[:MAX_MESSAGE])
            with contextlib.closing(RemoteVhci(tmp_path / "socket", SystemClock(), random.Random(0))) as driver:
                assert await driver.ports()


@pytest.mark.parametrize("children", [("../etc/x",), ("a/b",), ("",), ("tty",) * 33], ids=ascii)
def test_the_simulated_kernel_makes_no_nodes_outside_its_directory(children: tuple[str, ...]) -> None:
    request = wire.Enumerate(KEY, descriptor(KEY.busid), 0, (), 1.0, InterfaceRules(), 1.0)
    encoded = {**msgspec.to_builtins(request), "children": children}
    with pytest.raises(ValueError, match="children must be at most 32 names"):
        wire.read(encoded, wire.Request)


@pytest.mark.parametrize(
    "answer",
    [{}, {"id": []}, {"error": None}, {"error": {"name": "WrongDevice", "key": []}}, {"result": [[1, 2]]}],
    ids=ascii,
)
@virtual
async def test_a_driver_raises_an_error_of_its_own_for_a_malformed_answer(answer: dict[str, object]) -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    remote = RemoteVhci(Path("/nowhere"), SimClock(loop), random.Random(0))
    with ours, contextlib.closing(remote):
        for end in (ours, theirs):
            end.setblocking(False)
        remote._channel = Channel(theirs, remote._received, remote._ended)
        calling = asyncio.create_task(remote.ports())
        request = json.loads(await loop.sock_recv(ours, MAX_MESSAGE))
        ours.send(json.dumps({"id": request["id"], **answer}).encode())
        with pytest.raises(VhciError):
            await calling


@pytest.mark.parametrize(
    "value",
    ["x" * (wire.MAX_TEXT + 1), "\x1b", [0] * (wire.MAX_ITEMS + 1), -1, 1 << 32, {"port": 1 << 16}, {"interface": 256}],
    ids=lambda value: ascii(value)[:20],
)
def test_a_value_beyond_a_limit_is_refused_at_any_depth(value: Any) -> None:
    for _ in range(5_000):
        value = [{"x": value}]
    with pytest.raises(ValueError, match="expected"):
        wire.read(value, list)


def transfers() -> tuple[usbip_wire.Decoding[None], bytearray]:
    written = bytearray()
    steps = Transfers(ECHO, ECHO.usb_id, written.extend, lambda _value: None).run()
    next(steps)
    return steps, written


def test_reads_that_nobody_answers_are_bounded() -> None:
    steps, _ = transfers()
    for number in range(MAX_WAITING):
        steps.send(usbip_wire.encode_command(usbip_wire.Submit(number, 1, True, 1, 64)))
    with pytest.raises(ProtocolViolation, match="under way"):
        steps.send(usbip_wire.encode_command(usbip_wire.Submit(MAX_WAITING, 1, True, 1, 64)))


def test_writes_that_nobody_reads_are_bounded() -> None:
    steps, _ = transfers()
    most = usbip_wire.encode_command(usbip_wire.Submit(1, 1, False, 1, usbip_wire.MAX_TRANSFER_BYTES))
    for _ in range(MAX_ECHO_BYTES // usbip_wire.MAX_TRANSFER_BYTES):
        steps.send(most)
        steps.send(bytes(usbip_wire.MAX_TRANSFER_BYTES))
    steps.send(usbip_wire.encode_command(usbip_wire.Submit(2, 1, False, 1, 1)))
    with pytest.raises(ProtocolViolation, match="under way"):
        steps.send(b"!")


async def test_a_client_that_asks_without_reading_is_not_read_from() -> None:
    server = VirtualServer([ECHO])
    await server.start()
    reader, writer = await asyncio.open_connection(server.key.host, server.key.port)
    writer.write(usbip_wire.encode_import_request("1-1"))
    command = usbip_wire.encode_command(usbip_wire.Submit(1, 1, True, 0, 255, bytes([0x80, 6, 0, 1, 0, 0, 255, 0])))
    (connection,) = server._open or [None]
    while connection is None:
        await asyncio.sleep(0)
        (connection,) = server._open or [None]
    transport = connection._transport
    assert transport is not None
    sent = 0
    async with asyncio.timeout(LIMIT_S):
        while transport.is_reading():
            writer.write(command * 1000)
            sent += 1000
            await asyncio.sleep(0)
    assert transport.get_write_buffer_size() < 8 << 20
    # the server continues when the client reads
    writer.write_eof()
    async with asyncio.timeout(LIMIT_S):
        received = len(await reader.readexactly(320 + sent * (48 + 18)))
    assert received
    with contextlib.suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()
    await server.stop()


@pytest.mark.parametrize("steps", range(6))
async def test_a_connection_that_is_accepted_as_the_server_stops_is_closed(steps: int) -> None:
    server = VirtualServer([ECHO])
    await server.start()
    with socket.create_connection((server.key.host, server.key.port)) as client:
        for _ in range(steps):
            await asyncio.sleep(0)
        await server.stop()
        await server.start()  # at the same port
        await server.stop()
        client.setblocking(False)
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(LIMIT_S):
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
