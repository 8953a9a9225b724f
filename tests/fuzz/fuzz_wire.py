"""Targets: messages of a USB/IP server to the plugin, and of a client to the virtual server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from tests.fuzz.fuzz_target import Target, attempt, drive, fit_to_raise, fit_to_show
from tests.protocol.golden_files import golden
from usbip_plugin import model
from usbip_plugin.errors import ServerUnreachable, UsbipError
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip import identify, wire
from usbip_plugin.usbip.client import refusal
from usbip_plugin.usbip.wire import ProtocolViolation, decode
from usbip_sim.server.server import ServerConnection, VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

KEY = DeviceKey(ServerKey("10.0.0.1"), "1-2")
STORAGE = UsbId(0x46F4, 0x0001)
DEVICE = VirtualDevice("1-2", STORAGE, serial="S-1", echo=True, configured=True)
MAX_TRANSFERS = 5


def check_descriptor(device: Descriptor) -> None:
    assert model.valid_busid(device.busid)
    assert device.speed in wire.SPEEDS.values()
    assert 0 <= device.devid < 1 << 32
    assert len(device.interfaces) <= wire.MAX_INTERFACES
    fit_to_show(device.path, 255)
    fit_to_show(str(device.usb_id), 9)


def encodable(device: Descriptor) -> bool:
    """Returns whether a device can be encoded again: its path was valid UTF-8."""
    return "\ufffd" not in device.path


def devlist_reply(data: bytes) -> None:
    decoded = attempt(ProtocolViolation, decode, wire.devlist_reply(), data)
    if decoded is None:
        return
    reply = decoded[0]
    assert len(reply.devices) <= wire.MAX_DEVICES
    assert len(reply.problems) <= wire.MAX_DEVICES + 1
    assert len({device.busid for device in reply.devices}) == len(reply.devices)
    for device in reply.devices:
        check_descriptor(device)
    for reason in reply.problems:
        fit_to_show(reason, 200)
    kept = tuple(filter(encodable, reply.devices))
    again = decode(wire.devlist_reply(), wire.encode_devlist_reply(kept))
    assert again == (wire.DevlistReply(kept), b"")


def import_reply(data: bytes) -> None:
    decoded = attempt(ProtocolViolation, decode, wire.import_reply(KEY.busid), data)
    if decoded is None:
        return
    reply = decoded[0]
    if reply.descriptor is None:
        assert reply.status != 0
        fit_to_raise(refusal(KEY, reply.status))
        return
    check_descriptor(reply.descriptor)
    assert reply.descriptor.busid == KEY.busid
    if encodable(reply.descriptor):
        assert decode(wire.import_reply(KEY.busid), wire.encode_import_reply(reply)) == (reply, b"")


def request(data: bytes) -> None:
    asked, _ = attempt(ProtocolViolation, decode, wire.request(), data) or (None, b"")
    if isinstance(asked, wire.ImportRequest):
        assert decode(wire.request(), wire.encode_import_request(asked.busid)) == (asked, b"")


def transfer_header(data: bytes) -> None:
    header = data[: wire.HEADER_BYTES].ljust(wire.HEADER_BYTES, b"\0")
    answer = attempt(ProtocolViolation, wire.decode_return, header)
    assert answer is None or wire.decode_return(wire.encode_return(answer)) == answer
    if isinstance(answer, wire.SubmitReturn):
        assert 0 <= answer.actual_length <= wire.MAX_TRANSFER_BYTES
    command = attempt(ProtocolViolation, wire.decode_command, header)
    assert command is None or wire.decode_command(wire.encode_command(command)) == command
    if isinstance(command, wire.Submit):
        assert 0 <= command.length <= wire.MAX_TRANSFER_BYTES


def _identify(read: Callable[[int], bytes], sent: Callable[[bytes], None]) -> None:
    """Reads the identity of a device. read: returns the server's answers."""

    async def receive(size: int) -> bytes:
        assert 0 < size <= identify.MAX_CONFIG_BYTES
        return read(size)

    commands = 0

    async def send(command: bytes) -> None:
        nonlocal commands
        commands += 1
        assert commands <= MAX_TRANSFERS
        sent(command)

    pipe = identify.ControlPipe(KEY, 1, receive, send)
    identity = attempt(UsbipError, drive, identify.read_identity(KEY, STORAGE, pipe))
    if identity is None:
        return
    assert identity.usb_id == STORAGE
    assert identity.serial != ""
    fit_to_show(identity.serial, 126)
    assert len(identity.interfaces) <= 256


def conversation(data: bytes) -> None:
    """Reads an identity from any bytes that a server sends after an import."""
    left = bytearray(data)

    def read(size: int) -> bytes:
        if len(left) < size:
            raise ServerUnreachable(KEY.server, "closed the connection")
        piece = bytes(left[:size])
        del left[:size]
        return piece

    _identify(read, lambda _command: None)


def descriptors(data: bytes) -> None:
    """Reads an identity from valid answers with any descriptors, each with a length byte before it."""
    left = bytearray(data)
    answers = bytearray()

    def sent(command: bytes) -> None:
        asked = wire.decode_command(command)
        assert isinstance(asked, wire.Submit)
        length = left.pop(0) if left else 0
        body = bytes(left[:length])[: asked.length]
        del left[:length]
        answers.extend(wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, len(body))) + body)

    def read(size: int) -> bytes:
        piece = bytes(answers[:size])
        del answers[:size]
        return piece

    _identify(read, sent)


def one_descriptor(data: bytes) -> None:
    text = identify.parse_string(data)
    fit_to_show(text, 126)
    assert text is None or text == text.strip() != ""
    assert len(identify.parse_interfaces(data)) <= min(256, len(data) // 9)


class _Sink(asyncio.Transport):
    """A transport that discards what a connection writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.reading = True
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += len(data)

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def virtual_server(data: bytes) -> None:
    """Sends any bytes to a virtual server, in pieces of 97."""
    server = VirtualServer([DEVICE], port=3240, listen=False)
    connection = ServerConnection(server)
    connection._transport = transport = _Sink()
    server.opened(connection)
    for start in range(0, len(data), 97):
        if not transport.closing:
            connection.data_received(data[start : start + 97])
    connection.connection_lost(None)
    assert server.violations == []
    assert server.importers(DEVICE.busid) == 0


def _commands() -> Iterable[bytes]:
    """Yields imports with transfers, as a kernel sends them."""
    ask = wire.encode_import_request(DEVICE.busid)
    setups = [bytes([0x80, 6, index, kind, 0, 0, 255, 0]) for kind, index in ((1, 0), (2, 0), (3, 0), (3, 3))]
    submits = [wire.encode_command(wire.Submit(i, 1, True, 0, 255, setup)) for i, setup in enumerate(setups)]
    yield ask + b"".join(submits)
    out = wire.encode_command(wire.Submit(9, 1, False, 1, 5)) + b"hello"
    back = wire.encode_command(wire.Submit(10, 1, True, 1, 64))
    yield ask + out + back + back + wire.encode_command(wire.Unlink(12, 10))
    yield wire.encode_devlist_request()


def _answers() -> Iterable[bytes]:
    """Yields all answers of a probe: the golden ones, with their sequence numbers."""
    parts = [golden(name) for name in ("urb_device_descriptor_storage", "urb_string_langs_storage")]
    parts += [golden("urb_string_serial_storage"), golden("urb_config_storage"), golden("urb_config_storage")]
    numbered = []
    for number, part in enumerate(parts, 1):
        answer = wire.decode_return(part[: wire.HEADER_BYTES])
        body = part[wire.HEADER_BYTES :][: 9 if number == 4 else None]
        assert isinstance(answer, wire.SubmitReturn)
        numbered.append(wire.encode_return(replace(answer, seqnum=number, actual_length=len(body))) + body)
    yield b"".join(numbered)
    yield b"".join(numbered[:1]) + wire.encode_return(wire.SubmitReturn(2, -wire.EPIPE, 0)) * 3
    yield wire.encode_return(wire.UnlinkReturn(1, -wire.ECONNRESET))


def _bodies() -> Iterable[bytes]:
    names = ("urb_device_descriptor_storage", "urb_string_langs_storage", "urb_string_serial_storage")
    bodies = [golden(name)[wire.HEADER_BYTES :] for name in names]
    config = golden("urb_config_storage")[wire.HEADER_BYTES :]
    yield b"".join(bytes([len(body)]) + body for body in (*bodies, config[:9], config))
    unpaired = b"\x06\x03\x00\xd8A\x00"
    yield b"".join(bytes([len(body)]) + body for body in (bodies[0], bodies[1], unpaired, config[:9], config))


def _strings() -> Iterable[bytes]:
    yield golden("urb_string_serial_storage")[wire.HEADER_BYTES :]
    yield golden("urb_config_kbd")[wire.HEADER_BYTES :]
    yield b"\x06\x03\x00\xd8A\x00"


TARGETS = (
    Target(
        "devlist-reply",
        devlist_reply,
        lambda: (golden(name) for name in ("devlist_three", "devlist_after_use", "devlist_empty_all_in_use")),
    ),
    Target(
        "import-reply",
        import_reply,
        lambda: (golden(name) for name in ("import_ok_kbd", "import_busy", "import_unknown")),
        longest=400,
    ),
    Target("request", request, lambda: (wire.encode_devlist_request(), wire.encode_import_request("1-2")), 64),
    Target("transfer-header", transfer_header, lambda: (part[:48] for part in (*_answers(), *_commands())), 48),
    Target("probe-conversation", conversation, _answers, 1024),
    Target("probe-descriptors", descriptors, _bodies, 1024),
    Target("descriptor", one_descriptor, _strings, 1024),
    Target("virtual-server", virtual_server, _commands),
)
