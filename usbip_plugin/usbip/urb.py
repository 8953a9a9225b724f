"""The USB/IP wire format 1.1.1, transfers: the 48-byte headers that follow an import, both sides. Pure.

Source: Documentation/usb/usbip_protocol.rst and drivers/usb/usbip/usbip_common.h. Isochronous transfers are not spoken.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from usbip_plugin.usbip.protocol import ProtocolViolation

HEADER_BYTES = 48
MAX_TRANSFER_BYTES = 4 << 20

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
_NOT_ISOCHRONOUS = (0, -1)  # the document says -1, vhci_hcd sends 0


@dataclass(frozen=True, slots=True)
class Submit:
    """USBIP_CMD_SUBMIT. length: bytes of the buffer; with incoming False that many follow the header."""

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
    """USBIP_CMD_UNLINK: take back the transfer numbered victim."""

    seqnum: int
    victim: int


@dataclass(frozen=True, slots=True)
class SubmitReturn:
    """USBIP_RET_SUBMIT. status: 0 or a negative errno; for an incoming transfer actual_length bytes follow."""

    seqnum: int
    status: int
    actual_length: int


@dataclass(frozen=True, slots=True)
class UnlinkReturn:
    """USBIP_RET_UNLINK. status: -ECONNRESET if the transfer was taken back, 0 if it had ended already."""

    seqnum: int
    status: int


def encode_command(command: Submit | Unlink) -> bytes:
    if isinstance(command, Unlink):
        return _BASIC.pack(_CMD_UNLINK, command.seqnum, 0, 0, 0) + _UNLINK.pack(command.victim)
    basic = _BASIC.pack(_CMD_SUBMIT, command.seqnum, command.devid, int(command.incoming), command.endpoint)
    return basic + _SUBMIT.pack(command.transfer_flags, command.length, 0, 0, command.interval, command.setup)


def decode_command(header: bytes) -> Submit | Unlink:
    """header: exactly 48 bytes. ProtocolViolation for anything else than a bounded SUBMIT or an UNLINK."""
    code, seqnum, devid, direction, endpoint = _BASIC.unpack_from(header)
    if code == _CMD_UNLINK:
        return Unlink(seqnum, *_UNLINK.unpack_from(header, _BASIC.size))
    if code != _CMD_SUBMIT:
        raise ProtocolViolation(f"command {code} is neither SUBMIT nor UNLINK")
    flags, length, _, packets, interval, setup = _SUBMIT.unpack_from(header, _BASIC.size)
    if direction > 1 or endpoint > 15:
        raise ProtocolViolation(f"direction {direction}, endpoint {endpoint}")
    if not 0 <= length <= MAX_TRANSFER_BYTES:
        raise ProtocolViolation(f"transfer of {length} bytes")
    if packets not in _NOT_ISOCHRONOUS:
        raise ProtocolViolation("isochronous transfer")
    return Submit(seqnum, devid, direction == 1, endpoint, length, setup, flags, interval)


def encode_return(answer: SubmitReturn | UnlinkReturn) -> bytes:
    if isinstance(answer, UnlinkReturn):
        return _BASIC.pack(_RET_UNLINK, answer.seqnum, 0, 0, 0) + _STATUS.pack(answer.status)
    basic = _BASIC.pack(_RET_SUBMIT, answer.seqnum, 0, 0, 0)
    return basic + _RETURN.pack(answer.status, answer.actual_length, 0, 0, 0)


def decode_return(header: bytes) -> SubmitReturn | UnlinkReturn:
    """header: exactly 48 bytes. ProtocolViolation for anything else than a bounded RET_SUBMIT or a RET_UNLINK."""
    code, seqnum, _, _, _ = _BASIC.unpack_from(header)
    if code == _RET_UNLINK:
        return UnlinkReturn(seqnum, *_STATUS.unpack_from(header, _BASIC.size))
    if code != _RET_SUBMIT:
        raise ProtocolViolation(f"answer {code} is neither RET_SUBMIT nor RET_UNLINK")
    status, length, _, _, _ = _RETURN.unpack_from(header, _BASIC.size)
    if not 0 <= length <= MAX_TRANSFER_BYTES:
        raise ProtocolViolation(f"transfer of {length} bytes")
    return SubmitReturn(seqnum, status, length)
