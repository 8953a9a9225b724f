"""The USB/IP wire format 1.1.1 of both sides: requests, replies, and USB request blocks. Pure functions without I/O.

Sources: Documentation/usb/usbip_protocol.rst, drivers/usb/usbip/usbip_common.h, and
tools/usb/usbip/src/usbip_network.h for what the daemon does. Everything is big-endian. Isochronous transfers are not
supported.

Each conversation is a generator. It yields how many bytes it needs next, is sent exactly that many, and returns what
it decoded. So no reader takes a byte too many, and what follows an IMPORT reply on the socket is left for the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from usbip_plugin.model import Descriptor, InterfaceClass, UsbId, valid_busid

T = TypeVar("T")

Decoding: TypeAlias = Generator[int, bytes, T]
"""A decoder that yields how many bytes it needs next, is sent exactly those, and returns the decoded value."""

# Protocol version 1.1.1, and the operation codes (Documentation/usb/usbip_protocol.rst of the kernel).
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

# Most devices read from one DEVLIST reply.
MAX_DEVICES = 256
# Most interfaces kept of one device: USB_MAXINTERFACES of the kernel. The number on the wire is a byte.
MAX_INTERFACES = 32
# The speeds on the wire, and the speed of the kernel's enum usb_device_speed that each of them means. Servers on libusb
# send its LIBUSB_SPEED_SUPER (4), which is wireless USB to the kernel. No such device was ever exported.
SPEEDS = {1: 1, 2: 2, 3: 3, 4: 5, 5: 5, 6: 6}

_OP = struct.Struct(">HHI")  # version, code, status
_COUNT = struct.Struct(">I")
_DEVICE = struct.Struct(">256s32sIIIHHHBBBBBB")
_INTERFACE = struct.Struct(">BBBx")
_PATH_BYTES = 256
_BUSID_BYTES = 32


WHOLE_LIST = "the list"
"""The name of the whole list in a problem. It is not a valid bus ID."""


class ProtocolViolation(ValueError):
    """An error for bytes that are not USB/IP 1.1.1 or exceed the limits of this module."""


@dataclass(frozen=True, slots=True)
class DevlistReply:
    """The reply to a DEVLIST request.

    devices: the usable entries, each bus ID once.
    problems: for each entry that was skipped or cut, its bus ID or number, and why. First, whether the list was cut.
    """

    devices: tuple[Descriptor, ...]
    problems: tuple[str, ...] = ()


def why_unlisted(problems: Iterable[str], busid: str) -> str:
    """Returns why a list with these problems may lack a bus ID, "" if they do not explain it."""
    return "; ".join(problem for problem in problems if problem.startswith((f"{WHOLE_LIST}: ", f"{busid}: ")))


@dataclass(frozen=True, slots=True)
class ImportReply:
    """The reply to an IMPORT request. status: an ST_ value. descriptor: the device if it is ST_OK, else None."""

    status: int
    descriptor: Descriptor | None


@dataclass(frozen=True, slots=True)
class DevlistRequest:
    pass


@dataclass(frozen=True, slots=True)
class ImportRequest:
    busid: str


def encode_devlist_request() -> bytes:
    return _OP.pack(VERSION, OP_REQ_DEVLIST, 0)


def encode_import_request(busid: str) -> bytes:
    """Returns an IMPORT request. Raises ProtocolViolation if the bus ID is not valid."""
    return _OP.pack(VERSION, OP_REQ_IMPORT, 0) + _busid_field(busid)


def encode_devlist_reply(devices: Iterable[Descriptor]) -> bytes:
    """Returns a DEVLIST reply. For num_interfaces of a device, it carries the number of its interfaces, which follow.

    Raises ProtocolViolation if a bus ID is not valid or a path is too long.
    """
    entries = [
        _encode_device(device, len(device.interfaces))
        + b"".join(_INTERFACE.pack(i.class_, i.subclass, i.protocol) for i in device.interfaces)
        for device in devices
    ]
    return _OP.pack(VERSION, OP_REP_DEVLIST, ST_OK) + _COUNT.pack(len(entries)) + b"".join(entries)


def encode_devlist_refusal(status: int) -> bytes:
    """Returns a DEVLIST reply without devices, for a client that may not see any. status: other than ST_OK."""
    return _OP.pack(VERSION, OP_REP_DEVLIST, status)


def encode_import_reply(reply: ImportReply) -> bytes:
    head = _OP.pack(VERSION, OP_REP_IMPORT, reply.status)
    return head + _encode_device(reply.descriptor, reply.descriptor.num_interfaces) if reply.descriptor else head


def devlist_reply() -> Decoding[DevlistReply]:
    """Decodes OP_REP_DEVLIST.

    Skips an entry whose text, numbers or speed cannot be used, and keeps the first of two entries with one bus ID: one
    odd device must not hide the rest. Leaves what follows the first MAX_DEVICES entries unread. Raises
    ProtocolViolation if the header is wrong or the status is not ST_OK.
    """
    status = _decode_header((yield _OP.size), OP_REP_DEVLIST)
    if status != ST_OK:
        raise ProtocolViolation(f"the server refused DEVLIST (status {status})")
    (count,) = _COUNT.unpack((yield _COUNT.size))
    devices: dict[str, Descriptor] = {}
    problems: list[str] = []
    if count > MAX_DEVICES:
        problems.append(f"{WHOLE_LIST}: only the first {MAX_DEVICES} of {count} devices are read")
    for number in range(min(count, MAX_DEVICES)):
        raw = yield _DEVICE.size
        interfaces = raw[-1]  # bNumInterfaces is the last byte: the number of interface entries that follow
        tail = (yield interfaces * _INTERFACE.size) if interfaces else b""
        name = f"entry {number + 1}"
        try:
            name = _decode_busid(raw[_PATH_BYTES : _PATH_BYTES + _BUSID_BYTES])
            device = _decode_device(raw)
        except ProtocolViolation as violation:
            problems.append(f"{name}: {violation}")
            continue
        if name in devices:
            problems.append(f"{name}: listed more than once, only the first entry is used")
            continue
        classes = tuple(InterfaceClass(*fields) for fields in _INTERFACE.iter_unpack(tail))
        if interfaces > MAX_INTERFACES:  # some servers count each alternate setting
            classes = tuple(dict.fromkeys(classes))
            if len(classes) > MAX_INTERFACES:
                problems.append(f"{name}: only the first {MAX_INTERFACES} of {len(classes)} interface classes are used")
        devices[name] = replace(device, interfaces=classes[:MAX_INTERFACES])
    return DevlistReply(tuple(devices.values()), tuple(problems))


def import_reply(busid: str) -> Decoding[ImportReply]:
    """Decodes OP_REP_IMPORT. Raises ProtocolViolation also if the reply is about another bus ID than the given one."""
    status = _decode_header((yield _OP.size), OP_REP_IMPORT)
    if status != ST_OK:
        return ImportReply(status, None)
    device = _decode_device((yield _DEVICE.size))
    if device.busid != busid:
        raise ProtocolViolation(f"expected a reply about {busid}, got one about {device.busid}")
    return ImportReply(ST_OK, device)


def request() -> Decoding[DevlistRequest | ImportRequest]:
    """Decodes a client's request, on the server's side. Ignores the request's status field, which has no use.

    Raises ProtocolViolation for another version or operation, or a bus ID that is not valid.
    """
    version, code, _ = _OP.unpack((yield _OP.size))
    if version != VERSION:
        raise ProtocolViolation(f"expected version {VERSION:#06x}, got {version:#06x}")
    if code == OP_REQ_DEVLIST:
        return DevlistRequest()
    if code == OP_REQ_IMPORT:
        return ImportRequest(_decode_busid((yield _BUSID_BYTES)))
    raise ProtocolViolation(f"expected DEVLIST or IMPORT, got operation {code:#06x}")


def decode(decoding: Decoding[T], data: bytes) -> tuple[T, bytes]:
    """Returns what bytes in memory decode to, and the bytes left over. Raises ProtocolViolation if they end early."""
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
    if raw.startswith(b"HTTP"):
        raise ProtocolViolation("the port is that of a web server, which answers HTTP")
    if version != VERSION:
        raise ProtocolViolation(f"expected version {VERSION:#06x}, got {version:#06x}")
    if code != expected:
        raise ProtocolViolation(f"expected reply code {expected:#06x}, got {code:#06x}")
    return int(status)


def _decode_device(raw: bytes) -> Descriptor:
    path, busid, busnum, devnum, speed, vendor, product, bcd, *rest = _DEVICE.unpack(raw)
    if speed not in SPEEDS:
        raise ProtocolViolation(f"speed {speed} is not a valid USB speed")
    speed = SPEEDS[speed]
    if busnum > 0xFFFF or devnum > 0xFFFF:
        raise ProtocolViolation(f"bus {busnum} and device {devnum} must fit in 16 bits each")
    name = _decode_busid(busid)
    return Descriptor(name, _decode_path(path), busnum, devnum, speed, UsbId(vendor, product), bcd, *rest)


def _encode_device(device: Descriptor, num_interfaces: int) -> bytes:
    path = device.path.encode()
    if len(path) >= _PATH_BYTES:
        raise ProtocolViolation(f"path must have at most {_PATH_BYTES - 1} bytes, got {len(path)}")
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
        raise ProtocolViolation(f"{what} is not NUL-terminated")
    return text


def _decode_busid(raw: bytes) -> str:
    text = _text(raw, "bus ID").decode("ascii", "backslashreplace")
    if not valid_busid(text):
        raise ProtocolViolation(f"bus ID {text!r} is not valid")
    return text


def _decode_path(raw: bytes) -> str:
    text = _text(raw, "path").decode("utf-8", "replace")
    if not text.isprintable():
        raise ProtocolViolation("path has unprintable characters")
    return text


def _busid_field(busid: str) -> bytes:
    if not valid_busid(busid):
        raise ProtocolViolation(f"bus ID {busid!r} is not valid")
    return busid.encode("ascii").ljust(_BUSID_BYTES, b"\0")


# Size of the header of every command and return (bytes).
HEADER_BYTES = 48
# Largest buffer accepted for one transfer (bytes).
MAX_TRANSFER_BYTES = 4 << 20

# Linux errno numbers, which the wire uses on every system: EPIPE for a stall, ECONNRESET for a cancelled transfer.
EPIPE = 32
ECONNRESET = 104

_CMD_SUBMIT = 1
_CMD_UNLINK = 2
_RET_SUBMIT = 3
_RET_UNLINK = 4
_BASIC = struct.Struct(">IIIII")  # command, seqnum, devid, direction, endpoint
_SUBMIT = struct.Struct(">Iiiii8s")  # transfer_flags, length, start_frame, number_of_packets, interval, setup
_RETURN = struct.Struct(">iiiii8x")  # status, actual_length, start_frame, number_of_packets, error_count
_UNLINK = struct.Struct(">I24x")
_STATUS = struct.Struct(">i24x")
# number_of_packets of a transfer that is not isochronous. The kernel's usbip_protocol.rst says -1, vhci_hcd sends 0.
_NOT_ISOCHRONOUS = (0, -1)


@dataclass(frozen=True, slots=True)
class Submit:
    """The command USBIP_CMD_SUBMIT, which starts a transfer.

    incoming: True for a transfer from the device to the host.
    length: size of the buffer (bytes). With incoming False, that many bytes follow the header.
    setup: the setup packet of a control transfer, 8 bytes; zeros for any other transfer.
    """

    seqnum: int
    devid: int
    incoming: bool
    endpoint: int
    length: int
    setup: bytes = bytes(8)
    transfer_flags: int = 0
    interval: int = 0


@dataclass(frozen=True, slots=True)
class Unlink:
    """The command USBIP_CMD_UNLINK, which cancels a transfer. victim: seqnum of that transfer."""

    seqnum: int
    victim: int


@dataclass(frozen=True, slots=True)
class SubmitReturn:
    """The answer USBIP_RET_SUBMIT to a Submit.

    status: 0 or a negative errno.
    actual_length: bytes transferred. For an incoming transfer, that many bytes follow the header.
    """

    seqnum: int
    status: int
    actual_length: int


@dataclass(frozen=True, slots=True)
class UnlinkReturn:
    """The answer USBIP_RET_UNLINK. status: -ECONNRESET if the transfer was cancelled, 0 if it had ended already."""

    seqnum: int
    status: int


def encode_command(command: Submit | Unlink) -> bytes:
    if isinstance(command, Unlink):
        return _BASIC.pack(_CMD_UNLINK, command.seqnum, 0, 0, 0) + _UNLINK.pack(command.victim)
    basic = _BASIC.pack(_CMD_SUBMIT, command.seqnum, command.devid, int(command.incoming), command.endpoint)
    return basic + _SUBMIT.pack(command.transfer_flags, command.length, 0, 0, command.interval, command.setup)


def decode_command(header: bytes) -> Submit | Unlink:
    """Decodes the header of a command, exactly HEADER_BYTES.

    Raises ProtocolViolation for another command, and for a SUBMIT that is isochronous or whose direction, endpoint or
    length is out of range.
    """
    code, seqnum, devid, direction, endpoint = _BASIC.unpack_from(header)
    if code == _CMD_UNLINK:
        return Unlink(seqnum, *_UNLINK.unpack_from(header, _BASIC.size))
    if code != _CMD_SUBMIT:
        raise ProtocolViolation(f"expected SUBMIT or UNLINK, got command {code}")
    flags, length, _, packets, interval, setup = _SUBMIT.unpack_from(header, _BASIC.size)
    if direction > 1 or endpoint > 15:
        raise ProtocolViolation(f"direction {direction} or endpoint {endpoint} is not valid")
    if not 0 <= length <= MAX_TRANSFER_BYTES:
        raise ProtocolViolation(f"transfer length {length} is not valid")
    if packets not in _NOT_ISOCHRONOUS:
        raise ProtocolViolation("isochronous transfers are not supported")
    return Submit(seqnum, devid, direction == 1, endpoint, length, setup, flags, interval)


def encode_return(answer: SubmitReturn | UnlinkReturn) -> bytes:
    if isinstance(answer, UnlinkReturn):
        return _BASIC.pack(_RET_UNLINK, answer.seqnum, 0, 0, 0) + _STATUS.pack(answer.status)
    basic = _BASIC.pack(_RET_SUBMIT, answer.seqnum, 0, 0, 0)
    return basic + _RETURN.pack(answer.status, answer.actual_length, 0, 0, 0)


def decode_return(header: bytes) -> SubmitReturn | UnlinkReturn:
    """Decodes the header of an answer, exactly HEADER_BYTES.

    Raises ProtocolViolation for anything but a RET_UNLINK or a RET_SUBMIT within the limits.
    """
    code, seqnum, _, _, _ = _BASIC.unpack_from(header)
    if code == _RET_UNLINK:
        return UnlinkReturn(seqnum, *_STATUS.unpack_from(header, _BASIC.size))
    if code != _RET_SUBMIT:
        raise ProtocolViolation(f"expected RET_SUBMIT or RET_UNLINK, got code {code}")
    status, length, _, _, _ = _RETURN.unpack_from(header, _BASIC.size)
    if not 0 <= length <= MAX_TRANSFER_BYTES:
        raise ProtocolViolation(f"transfer length {length} is not valid")
    return SubmitReturn(seqnum, status, length)
