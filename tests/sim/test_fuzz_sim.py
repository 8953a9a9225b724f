"""The stand-ins for kernel and server against peers that do not keep to their rules."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import msgspec
import pytest

from tests.sim.fuzz_sim import DESCRIPTOR, KEY, kernel_answers, kernel_requests
from usbip_plugin.errors import ConfigError
from usbip_plugin.model import UsbId
from usbip_plugin.usbip import wire as usbip_wire
from usbip_plugin.usbip.wire import ProtocolViolation
from usbip_sim.kernel import wire
from usbip_sim.server.command import parse_listen
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import MAX_ECHO_BYTES, MAX_WAITING, Transfers, VirtualDevice

ECHO = VirtualDevice("1-1", UsbId(1, 2), echo=True, configured=True)
DESCRIPTION = msgspec.to_builtins(DESCRIPTOR)
PATIENCE = 20.0


def request(call: str, **fields: Any) -> bytes:
    whole = {"key": msgspec.to_builtins(KEY), "descriptor": DESCRIPTION, "port": 0, "timeout": 1}
    waits = {"children": [], "children_timeout": 1}
    request = {"call": call, **whole, **waits, **fields}
    return json.dumps({"id": 1, "version": wire.VERSION, "request": request}).encode()


@pytest.mark.parametrize(
    "message",
    [
        b'{"cancel": []}',
        b'{"cancel": {}}',
        b'{"id": {}, "version": 5, "request": {"call": "ports"}}',
        b"[" * 100_000,
        b'{"id": 1, "x": ' + b"[" * 100_000 + b"}",
        request("detach", timeout=float("nan")),
        request("detach", timeout=float("inf")),
        request("detach", timeout=10**400),
        request("detach", timeout="1"),
        request("detach", timeout=-1),
        request("detach", port=-1),
        request("detach", port=10**9),
        request("detach", port=True),
        request("inspect", key=None),
        request("inspect", key="abc"),
        request("inspect", key={"server": {"host": "\ud800"}, "busid": "1-1"}),
        request("inspect", key={"server": {"host": "h", "port": 70000}, "busid": "1-1"}),
        request("inspect", port=4095),
        request("enumerate", port=4095),
        request("enumerate", children=["nothing"]),
        b'{"id": 1, "version": 5, "request": {"call": "forget", "key": ' + b"[" * 900 + b"]" * 900 + b"}}",
        request("attach", descriptor={}),
        request("attach", descriptor={**DESCRIPTION, "speed": "x"}),
        request("attach", descriptor={**DESCRIPTION, "speed": 10**400}),
        request("attach", descriptor={**DESCRIPTION, "interfaces": [{"class_": 1}]}),
        request("enumerate", descriptor=[1, 2]),
        request([], port=1),  # type: ignore[arg-type]
        b"\n".join(request("enumerate", timeout=3600) for _ in range(8)),
    ],
    ids=lambda message: ascii(message[:60]),
)
def test_the_simulated_kernel_answers_the_next_driver_whatever_one_sent(message: bytes) -> None:
    kernel_requests(message)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"id": []},
        {"changed": []},
        {"error": None},
        {"error": {}},
        {"error": {"name": []}},
        {"error": {"name": "PortsExhausted"}},
        {"error": {"name": "WrongDevice", "text": "x"}},
        {"error": {"name": "WrongDevice", "text": "x", "key": [], "expected": {}, "found": {}}},
        {"error": {"name": "AttachStuck", "text": "x" * 100_000}},
        {"error": {"name": "AttachStuck", "text": "\x1b[2J"}},
        {"result": [[1, 2]]},
        {"result": [{"number": 0, "hub": "hs", "status": 99}]},
        {"result": [{"number": 0, "hub": [], "status": 4}]},
        {"result": {"nodes": None}},
        {"result": {"loaded": 1, "problems": []}},
        {"result": -1},
        {"result": 10**400},
        {"result": "9" * 5000},
    ],
    ids=lambda answer: ascii(answer)[:60],
)
def test_a_driver_takes_nonsense_from_the_simulated_kernel_for_an_error(answer: dict[str, Any]) -> None:
    kernel_answers(json.dumps(answer).encode())


@pytest.mark.parametrize(
    "value",
    ["x" * (wire.MAX_TEXT + 1), "\x1b", [0] * (wire.MAX_ITEMS + 1), -1, 1 << 32, {"port": 1 << 16}, {"interface": 256}],
    ids=lambda value: ascii(value)[:20],
)
def test_a_value_beyond_a_limit_is_refused_however_deep_it_is(value: Any) -> None:
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
    async with asyncio.timeout(PATIENCE):
        while transport.is_reading():
            writer.write(command * 1000)
            sent += 1000
            await asyncio.sleep(0)
    assert transport.get_write_buffer_size() < 8 << 20
    # it goes on where it left off when the client reads
    writer.write_eof()
    async with asyncio.timeout(PATIENCE):
        received = len(await reader.readexactly(320 + sent * (48 + 18)))
    assert received
    with contextlib.suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()
    await server.stop()


@pytest.mark.parametrize("text", ["h:" + "9" * 5000, "h:²", "h:-1", "h:70000", "h:"])
def test_an_address_to_listen_at_is_refused_in_the_usual_way(text: str) -> None:
    with pytest.raises(ConfigError, match="must be ADDRESS:PORT"):
        parse_listen(text)
