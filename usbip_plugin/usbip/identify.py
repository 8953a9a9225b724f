"""Reads the identity of an imported device in user space, without this node's kernel seeing the device.

DEVLIST carries no strings. It carries no interfaces either for a device that was never imported since it was bound:
usbip-host binds the whole device, which leaves it unconfigured. Both are read with GET_DESCRIPTOR (USB 2.0, 9.4.3).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from usbip_plugin.errors import MalformedReply, UsbipError, WrongDevice
from usbip_plugin.model import DeviceKey, InterfaceClass, UsbId
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.wire import ProtocolViolation

# Descriptor types (USB 2.0, table 9-5).
DEVICE = 1
CONFIG = 2
STRING = 3
INTERFACE = 4

# Longest configuration descriptor that is read (bytes); the rest is left out.
MAX_CONFIG_BYTES = 4096
# Language ID of US English, for a device that lists no language.
ENGLISH = 0x0409
_DEVICE_BYTES = 18
_CONFIG_BYTES = 9
_INTERFACE_BYTES = 9
_STRING_BYTES = 255
_DEVICE_TO_HOST = 0x80
_GET_DESCRIPTOR = 6

ReadExactly = Callable[[int], Awaitable[bytes]]
Send = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """The identity that was read from a device itself.

    serial: None if it is missing or not printable. interfaces: the first alternate setting of each interface.
    """

    usb_id: UsbId
    serial: str | None
    interfaces: tuple[InterfaceClass, ...]


class ControlPipe:
    """Control transfers on endpoint 0 of an imported device. Not bounded in time: the caller sets the timeout.

    devid: that of the import reply, as usbip-host drops a connection that names another.
    read: returns exactly as many bytes as asked for, and raises on EOF.
    """

    def __init__(self, key: DeviceKey, devid: int, read: ReadExactly, send: Send) -> None:
        self._key, self._devid, self._read, self._send = key, devid, read, send
        self._seqnum = 0

    async def get_descriptor(self, kind: int, index: int, language: int, length: int) -> bytes:
        """Reads a descriptor of at most length bytes. Returns b"" if the device stalls, as it does for what it lacks.

        Raises MalformedReply for a reply that does not fit the request, UsbipError for a transfer that failed.
        """
        self._seqnum += 1
        setup = bytes([_DEVICE_TO_HOST, _GET_DESCRIPTOR, index, kind])
        setup += language.to_bytes(2, "little") + length.to_bytes(2, "little")
        await self._send(wire.encode_command(wire.Submit(self._seqnum, self._devid, True, 0, length, setup)))
        try:
            answer = wire.decode_return(await self._read(wire.HEADER_BYTES))
        except ProtocolViolation as violation:
            raise MalformedReply(self._key.server, f"{self._key.busid}: {violation}") from violation
        if not isinstance(answer, wire.SubmitReturn) or answer.seqnum != self._seqnum or answer.actual_length > length:
            raise MalformedReply(self._key.server, f"{self._key.busid}: reply to another transfer")
        data = await self._read(answer.actual_length) if answer.actual_length else b""
        if answer.status == -wire.EPIPE:
            return b""
        if answer.status != 0:
            raise UsbipError(self._key.server, f"{self._key.busid}: GET_DESCRIPTOR failed (status {answer.status})")
        return data


async def read_identity(key: DeviceKey, expected: UsbId, pipe: ControlPipe) -> DeviceIdentity:
    """Reads the identity from the device, in at most five transfers.

    Raises WrongDevice if its vendor:product is not the expected one, MalformedReply if it has no device descriptor,
    UsbipError if a transfer failed.
    """
    device = await pipe.get_descriptor(DEVICE, 0, 0, _DEVICE_BYTES)
    if len(device) != _DEVICE_BYTES or device[1] != DEVICE:
        raise MalformedReply(key.server, f"{key.busid} has no device descriptor")
    found = UsbId(int.from_bytes(device[8:10], "little"), int.from_bytes(device[10:12], "little"))
    if found != expected:
        raise WrongDevice(key, expected, found)
    serial = await _read_string(pipe, device[16]) if device[16] else None
    config = await pipe.get_descriptor(CONFIG, 0, 0, _CONFIG_BYTES)
    if len(config) == _CONFIG_BYTES:
        total = min(int.from_bytes(config[2:4], "little"), MAX_CONFIG_BYTES)
        config = await pipe.get_descriptor(CONFIG, 0, 0, total)
    return DeviceIdentity(found, serial, parse_interfaces(config))


async def _read_string(pipe: ControlPipe, index: int) -> str | None:
    languages = await pipe.get_descriptor(STRING, 0, 0, _STRING_BYTES)
    # A device that has strings but no list of languages is read in English, as the kernel does (usb_get_langid).
    language = int.from_bytes(languages[2:4], "little") if len(languages) >= 4 else ENGLISH
    return parse_string(await pipe.get_descriptor(STRING, index, language, _STRING_BYTES))


def parse_string(descriptor: bytes) -> str | None:
    """Returns the text of a string descriptor without blanks at its ends, None if there is no printable text.

    Ends the text at a NUL and leaves out half a surrogate pair, as the kernel does (utf16s_to_utf8s).
    """
    if len(descriptor) < 2 or descriptor[1] != STRING:
        return None
    body = descriptor[2 : descriptor[0]]
    text = body[: len(body) & ~1].decode("utf-16-le", "ignore").partition("\0")[0].strip()
    return text if text and text.isprintable() else None


def parse_interfaces(config: bytes) -> tuple[InterfaceClass, ...]:
    """Returns the first alternate setting of each interface in a configuration descriptor, except for cut-off ones."""
    found: dict[int, InterfaceClass] = {}
    position = 0
    while position + 2 <= len(config) and config[position] >= 2:
        part = config[position : position + config[position]]
        if part[1] == INTERFACE and len(part) >= _INTERFACE_BYTES:
            found.setdefault(part[2], InterfaceClass(*part[5:8]))
        position += len(part)
    return tuple(found.values())
