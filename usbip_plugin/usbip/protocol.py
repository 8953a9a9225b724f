"""The USB/IP wire format 1.1.1, operations: DEVLIST and IMPORT, both sides. Pure; URBs are in urb.py.

Source: Documentation/usb/usbip_protocol.rst, and tools/usb/usbip/src/usbip_network.h for what the daemon does.
Everything is big-endian. Each conversation is a generator: it yields how many bytes it needs next, is sent exactly
that many, and returns what it decoded. So no reader of it takes a byte too many, and what follows an IMPORT reply on
the socket is left for the kernel.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from usbip_plugin.model import Descriptor, InterfaceClass, UsbId

T = TypeVar("T")
Decoding: TypeAlias = Generator[int, bytes, T]

VERSION = 0x0111
OP_REQ_DEVLIST = 0x8005
OP_REP_DEVLIST = 0x0005
OP_REQ_IMPORT = 0x8003
OP_REP_IMPORT = 0x0003

ST_OK = 0
ST_NA = 1
ST_DEV_BUSY = 2
ST_DEV_ERR = 3
ST_NODEV = 4
ST_ERROR = 5

MAX_DEVICES = 256
MAX_INTERFACES = 32  # USB_MAXINTERFACES of the kernel
SPEEDS = range(1, 7)  # enum usb_device_speed, low to super-plus

_OP = struct.Struct(">HHI")  # version, code, status
_COUNT = struct.Struct(">I")
_DEVICE = struct.Struct(">256s32sIIIHHHBBBBBB")
_INTERFACE = struct.Struct(">BBBx")
_PATH_BYTES = 256
_BUSID_BYTES = 32
# Safe as a file name and in a sysfs write: no slash, no space, not "." or "..", shorter than the field.
_BUSID = re.compile(r"[0-9A-Za-z][0-9A-Za-z.-]{0,30}", re.ASCII)


class ProtocolViolation(ValueError):
    """Bytes that are not USB/IP 1.1.1, or beyond the bounds set here."""


@dataclass(frozen=True, slots=True)
class DevlistReply:
    """devices: usable entries, each busid once. skipped: for each other entry, why it cannot be used."""

    devices: tuple[Descriptor, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImportReply:
    """status 0 and a descriptor, or another status and None."""

    status: int
    descriptor: Descriptor | None


@dataclass(frozen=True, slots=True)
class DevlistRequest:
    pass


@dataclass(frozen=True, slots=True)
class ImportRequest:
    busid: str


def valid_busid(text: str) -> bool:
    """Whether a bus id fits the wire and is safe as a file name."""
    return _BUSID.fullmatch(text) is not None


def encode_devlist_request() -> bytes:
    return _OP.pack(VERSION, OP_REQ_DEVLIST, 0)


def encode_import_request(busid: str) -> bytes:
    """ProtocolViolation if the bus id is not valid."""
    return _OP.pack(VERSION, OP_REQ_IMPORT, 0) + _busid_field(busid)


def encode_devlist_reply(devices: Iterable[Descriptor]) -> bytes:
    """num_interfaces of each device goes out as the number of its interfaces, which follow."""
    entries = [
        _encode_device(device, len(device.interfaces))
        + b"".join(_INTERFACE.pack(i.class_, i.subclass, i.protocol) for i in device.interfaces)
        for device in devices
    ]
    return _OP.pack(VERSION, OP_REP_DEVLIST, ST_OK) + _COUNT.pack(len(entries)) + b"".join(entries)


def encode_import_reply(reply: ImportReply) -> bytes:
    head = _OP.pack(VERSION, OP_REP_IMPORT, reply.status)
    return head + _encode_device(reply.descriptor, reply.descriptor.num_interfaces) if reply.descriptor else head


def devlist_reply() -> Decoding[DevlistReply]:
    """Decode OP_REP_DEVLIST.

    An entry whose text or speed cannot be used is skipped, and of two entries with one busid the first is kept: one odd
    device must not hide the rest. Counts beyond the bounds, a wrong header or a status end it: ProtocolViolation.
    """
    status = _decode_header((yield _OP.size), OP_REP_DEVLIST)
    if status != ST_OK:
        raise ProtocolViolation(f"DEVLIST answered with status {status}")
    (count,) = _COUNT.unpack((yield _COUNT.size))
    if count > MAX_DEVICES:
        raise ProtocolViolation(f"DEVLIST announces {count} devices, more than {MAX_DEVICES}")
    devices: dict[str, Descriptor] = {}
    skipped = []
    for _ in range(count):
        raw = yield _DEVICE.size
        interfaces = raw[-1]  # bNumInterfaces is the last byte, and says how much follows
        if interfaces > MAX_INTERFACES:
            raise ProtocolViolation(f"DEVLIST entry announces {interfaces} interfaces, more than {MAX_INTERFACES}")
        tail = (yield interfaces * _INTERFACE.size) if interfaces else b""
        try:
            device = _decode_device(raw)
        except ProtocolViolation as violation:
            skipped.append(str(violation))
            continue
        if device.busid in devices:
            skipped.append(f"busid {device.busid} listed twice")
            continue
        classes = tuple(InterfaceClass(*fields) for fields in _INTERFACE.iter_unpack(tail))
        devices[device.busid] = replace(device, interfaces=classes)
    return DevlistReply(tuple(devices.values()), tuple(skipped))


def import_reply(busid: str) -> Decoding[ImportReply]:
    """Decode OP_REP_IMPORT. ProtocolViolation also if the reply is about another busid than the one asked for."""
    status = _decode_header((yield _OP.size), OP_REP_IMPORT)
    if status != ST_OK:
        return ImportReply(status, None)
    device = _decode_device((yield _DEVICE.size))
    if device.busid != busid:
        raise ProtocolViolation(f"asked for {busid}, the reply is about {device.busid}")
    return ImportReply(ST_OK, device)


def request() -> Decoding[DevlistRequest | ImportRequest]:
    """Decode what a client asks: the server's side. The status of a request is not used and not looked at."""
    version, code, _ = _OP.unpack((yield _OP.size))
    if version != VERSION:
        raise ProtocolViolation(f"version {version:#06x} instead of {VERSION:#06x}")
    if code == OP_REQ_DEVLIST:
        return DevlistRequest()
    if code == OP_REQ_IMPORT:
        return ImportRequest(_decode_busid((yield _BUSID_BYTES)))
    raise ProtocolViolation(f"operation {code:#06x} is neither DEVLIST nor IMPORT")


def decode(decoding: Decoding[T], data: bytes) -> tuple[T, bytes]:
    """Run a decoding over bytes in memory: its result and what was left over. ProtocolViolation if they end early."""
    try:
        need = next(decoding)
        while True:
            if len(data) < need:
                raise ProtocolViolation(f"ends early: {len(data)} of {need} bytes")
            piece, data = data[:need], data[need:]
            need = decoding.send(piece)
    except StopIteration as done:
        result: T = done.value
        return result, data


def _decode_header(raw: bytes, expected: int) -> int:
    version, code, status = _OP.unpack(raw)
    if version != VERSION:
        raise ProtocolViolation(f"version {version:#06x} instead of {VERSION:#06x}")
    if code != expected:
        raise ProtocolViolation(f"reply code {code:#06x} instead of {expected:#06x}")
    return int(status)


def _decode_device(raw: bytes) -> Descriptor:
    path, busid, busnum, devnum, speed, vendor, product, bcd, *rest = _DEVICE.unpack(raw)
    if speed not in SPEEDS:
        raise ProtocolViolation(f"speed {speed} is none that USB has")
    if busnum > 0xFFFF or devnum > 0xFFFF:
        raise ProtocolViolation(f"bus {busnum}, device {devnum} do not fit a device id of 16 bits each")
    name = _decode_busid(busid)
    return Descriptor(name, _decode_path(path), busnum, devnum, speed, UsbId(vendor, product), bcd, *rest)


def _encode_device(device: Descriptor, num_interfaces: int) -> bytes:
    path = device.path.encode()
    if len(path) >= _PATH_BYTES:
        raise ProtocolViolation(f"path of {len(path)} bytes, more than {_PATH_BYTES - 1}")
    return _DEVICE.pack(
        path,
        _busid_field(device.busid),
        device.busnum,
        device.devnum,
        device.speed,
        device.usb_id.vendor,
        device.usb_id.product,
        device.bcd_device,
        device.device_class,
        device.device_subclass,
        device.device_protocol,
        device.configuration,
        device.num_configurations,
        num_interfaces,
    )


def _text(raw: bytes, what: str) -> bytes:
    text, end, _ = raw.partition(b"\0")
    if not end:
        raise ProtocolViolation(f"{what} without an end")
    return text


def _decode_busid(raw: bytes) -> str:
    text = _text(raw, "busid").decode("ascii", "backslashreplace")
    if not valid_busid(text):
        raise ProtocolViolation(f"busid {text!r} is not one")
    return text


def _decode_path(raw: bytes) -> str:
    text = _text(raw, "path").decode("utf-8", "replace")
    if not text.isprintable():
        raise ProtocolViolation("path with characters that cannot be printed")
    return text


def _busid_field(busid: str) -> bytes:
    if not valid_busid(busid):
        raise ProtocolViolation(f"busid {busid!r} is not one")
    return busid.encode("ascii").ljust(_BUSID_BYTES, b"\0")
