"""Enumeration by a simulated kernel: reads a device's identity, and chooses its drivers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from usbip_plugin.clock import Clock
from usbip_plugin.errors import UsbipError
from usbip_plugin.model import Descriptor, DeviceKey, InterfaceClass, UsbId
from usbip_plugin.usbip.identify import ControlPipe, parse_interfaces, parse_string

ANSWER_S = 5.0
"""Seconds for all answers of a device together. A kernel waits this long for each answer (USB_CTRL_GET_TIMEOUT)."""

_DEVICE, _CONFIG, _STRING = 1, 2, 3
_DEVICE_BYTES, _STRING_BYTES, _CONFIG_BYTES = 18, 255, 4096
_ENGLISH = 0x0409
_VENDOR = 0xFF

SERIAL_CONVERTERS = frozenset(
    {UsbId(0x0403, 0x6001), UsbId(0x0403, 0x6015), UsbId(0x10C4, 0xEA60), UsbId(0x1A86, 0x7523), UsbId(0x067B, 0x2303)}
)
"""Serial converters with interfaces of vendor class, which ftdi_sio, cp210x, ch341 and pl2303 match by their ids."""

_DRIVERS: dict[tuple[int, int], tuple[str, ...]] = {
    (0x01, 0x02): ("sound",),  # snd-usb-audio, a streaming interface
    (0x02, 0x02): ("acm",),  # cdc_acm
    (0x03, 0x00): ("hidraw",),
    (0x03, 0x01): ("hidraw", "input"),  # a keyboard or mouse
    (0x07, 0x01): ("printer",),  # usblp
    (0x0E, 0x01): ("video4linux", "video4linux"),  # uvcvideo: one node for images, one for their metadata
}
"""Names in children.CHILDREN of the nodes that drivers make, by class and subclass of an interface."""


@dataclass(frozen=True, slots=True)
class Enumerated:
    """Identity that a device reports in its descriptors. A text is "" where the device has none."""

    usb_id: UsbId
    serial: str
    manufacturer: str
    product: str
    interfaces: tuple[InterfaceClass, ...]


async def enumerate_device(key: DeviceKey, descriptor: Descriptor, fd: int, clock: Clock) -> Enumerated | None:
    """Reads the identity of the device that was imported over this socket. The caller keeps fd open.

    Returns None if the device does not answer within ANSWER_S, or sends an invalid answer. Cancel-safe.
    """
    loop = asyncio.get_running_loop()
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            sock.setblocking(False)

            async def read(count: int) -> bytes:
                data = b""
                while len(data) < count:
                    piece = await loop.sock_recv(sock, count - len(data))
                    if not piece:
                        raise ConnectionResetError
                    data += piece
                return data

            async with clock.timeout(ANSWER_S):
                return await _ask(ControlPipe(key, descriptor.devid, read, lambda data: loop.sock_sendall(sock, data)))
    except (OSError, UsbipError, TimeoutError):
        return None


async def _ask(pipe: ControlPipe) -> Enumerated | None:
    device = await pipe.get_descriptor(_DEVICE, 0, 0, _DEVICE_BYTES)
    if len(device) != _DEVICE_BYTES:
        return None
    texts = []
    for index in device[14:17]:
        raw = await pipe.get_descriptor(_STRING, index, _ENGLISH, _STRING_BYTES) if index else b""
        texts.append(parse_string(raw) or "")
    config = await pipe.get_descriptor(_CONFIG, 0, 0, _CONFIG_BYTES)
    usb_id = UsbId(int.from_bytes(device[8:10], "little"), int.from_bytes(device[10:12], "little"))
    manufacturer, product, serial = texts
    return Enumerated(usb_id, serial, manufacturer, product, parse_interfaces(config))


def drivers_children(usb_id: UsbId, interfaces: tuple[InterfaceClass, ...]) -> Iterator[tuple[int, str]]:
    """Yields the child nodes that a usual kernel's drivers make for a device: (interface, name in children.CHILDREN).

    Omits block devices, because every simulated node is a character device.
    """
    for number, interface in enumerate(interfaces):
        yield from ((number, name) for name in _DRIVERS.get((interface.class_, interface.subclass), ()))
        if interface.class_ == _VENDOR and usb_id in SERIAL_CONVERTERS:
            yield number, "tty"
