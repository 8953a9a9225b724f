"""Reads who a device is over an import, in user space, without this node's kernel seeing it.

DEVLIST carries no strings, and no interfaces either for a device that was never imported since it was bound (usbip-host
binds the whole device, which leaves it unconfigured). Both are read with GET_DESCRIPTOR (USB 2.0, 9.4.3).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from usbip_plugin.errors import MalformedReply, UsbipError, WrongDevice
from usbip_plugin.model import DeviceKey, InterfaceClass, UsbId
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.wire import ProtocolViolation

DEVICE = 1
CONFIG = 2
STRING = 3
INTERFACE = 4

MAX_CONFIG_BYTES = 4096
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
    """What the device itself says. serial: None if it has none, or none that can be printed."""

    usb_id: UsbId
    serial: str | None
    interfaces: tuple[InterfaceClass, ...]


class ControlPipe:
    """Control transfers on endpoint 0 of an imported device. read raises on EOF; the caller bounds it in time.

    devid must be that of the import reply: usbip-host drops a connection that names another.
    """

    def __init__(self, key: DeviceKey, devid: int, read: ReadExactly, send: Send) -> None:
        self._key, self._devid, self._read, self._send = key, devid, read, send
        self._seqnum = 0

    async def get_descriptor(self, kind: int, index: int, language: int, length: int) -> bytes:
        """At most length bytes; none if the device stalls. MalformedReply, or UsbipError for a transfer that failed."""
        self._seqnum += 1
        setup = bytes([_DEVICE_TO_HOST, _GET_DESCRIPTOR, index, kind])
        setup += language.to_bytes(2, "little") + length.to_bytes(2, "little")
        await self._send(wire.encode_command(wire.Submit(self._seqnum, self._devid, True, 0, length, setup)))
        try:
            answer = wire.decode_return(await self._read(wire.HEADER_BYTES))
        except ProtocolViolation as violation:
            raise MalformedReply(self._key.server, f"{self._key.busid}: {violation}") from violation
        if not isinstance(answer, wire.SubmitReturn) or answer.seqnum != self._seqnum or answer.actual_length > length:
            raise MalformedReply(self._key.server, f"{self._key.busid}: answer to another transfer than the one asked")
        data = await self._read(answer.actual_length) if answer.actual_length else b""
        if answer.status == -wire.EPIPE:
            return b""
        if answer.status != 0:
            raise UsbipError(self._key.server, f"{self._key.busid}: GET_DESCRIPTOR failed with {answer.status}")
        return data


async def read_identity(key: DeviceKey, promised: UsbId, pipe: ControlPipe) -> DeviceIdentity:
    """Ask the device who it is: at most five transfers. WrongDevice if it is not the promised vendor:product."""
    device = await pipe.get_descriptor(DEVICE, 0, 0, _DEVICE_BYTES)
    if len(device) != _DEVICE_BYTES or device[1] != DEVICE:
        raise MalformedReply(key.server, f"{key.busid} has no device descriptor")
    found = UsbId(int.from_bytes(device[8:10], "little"), int.from_bytes(device[10:12], "little"))
    if found != promised:
        raise WrongDevice(key, promised, found)
    serial = await _read_string(pipe, device[16]) if device[16] else None
    config = await pipe.get_descriptor(CONFIG, 0, 0, _CONFIG_BYTES)
    if len(config) == _CONFIG_BYTES:
        total = min(int.from_bytes(config[2:4], "little"), MAX_CONFIG_BYTES)
        config = await pipe.get_descriptor(CONFIG, 0, 0, total)
    return DeviceIdentity(found, serial, parse_interfaces(config))


async def _read_string(pipe: ControlPipe, index: int) -> str | None:
    languages = await pipe.get_descriptor(STRING, 0, 0, _STRING_BYTES)
    # A device that has strings but no list of languages is read as the kernel reads it (usb_get_langid).
    language = int.from_bytes(languages[2:4], "little") if len(languages) >= 4 else ENGLISH
    return parse_string(await pipe.get_descriptor(STRING, index, language, _STRING_BYTES))


def parse_string(descriptor: bytes) -> str | None:
    """The text of a string descriptor without surrounding space, None if there is none that can be printed.

    Half a surrogate is left out, as the kernel does (utf16s_to_utf8s).
    """
    if len(descriptor) < 2 or descriptor[1] != STRING:
        return None
    body = descriptor[2 : descriptor[0]]
    text = body[: len(body) & ~1].decode("utf-16-le", "ignore").strip("\0 ")
    return text if text and text.isprintable() else None


def parse_interfaces(config: bytes) -> tuple[InterfaceClass, ...]:
    """The first alternate setting of each interface in a configuration descriptor; what is cut off is left out."""
    found: dict[int, InterfaceClass] = {}
    position = 0
    while position + 2 <= len(config) and config[position] >= 2:
        part = config[position : position + config[position]]
        if part[1] == INTERFACE and len(part) >= _INTERFACE_BYTES:
            found.setdefault(part[2], InterfaceClass(*part[5:8]))
        position += len(part)
    return tuple(found.values())
