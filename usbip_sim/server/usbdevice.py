"""Virtual USB devices with enough of USB 2.0 chapter 9 that a real vhci_hcd enumerates them.

A device has an identity, and no endpoints unless it is an echo.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from usbip_plugin.model import Descriptor, InterfaceClass, UsbId
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.wire import Decoding, ProtocolViolation

VENDOR_CLASS = InterfaceClass(0xFF, 0, 0)
HIGH_SPEED, SUPER_SPEED = 3, 5
_LANGUAGE = 0x0409
_BULK_BYTES = 512
_BCD_USB, _BCD_USB_SUPER = 0x0200, 0x0300
_MAX_PACKET_0, _MAX_PACKET_0_SUPER = 64, 9
"""Maximum packet size of endpoint 0: in bytes, and for SuperSpeed as an exponent of 2."""
_BCD_DEVICE = 0x0100
_MANUFACTURER, _PRODUCT, _SERIAL = 1, 2, 3
_GET_STATUS, _CLEAR_FEATURE, _SET_FEATURE, _GET_DESCRIPTOR, _GET_CONFIGURATION, _SET_CONFIGURATION = 0, 1, 3, 6, 8, 9
_SET_INTERFACE = 11
_SILENT_OK = frozenset({_CLEAR_FEATURE, _SET_FEATURE, _SET_INTERFACE})
STALL = -wire.EPIPE
MAX_WAITING = 256
"""Limit of reads from an echo device that wait for data, for each importer."""
MAX_ECHO_BYTES = 4 * wire.MAX_TRANSFER_BYTES
"""Limit of bytes that an echo device holds until they are read, for each importer."""


@dataclass(frozen=True, slots=True)
class VirtualDevice:
    """Device that can be plugged into a virtual server.

    serial: "" for a device without a serial number.
    echo: returns on bulk endpoint 0x81 the data that it received on 0x01; of high speed only.
    more: interfaces after the first.
    speed: HIGH_SPEED or SUPER_SPEED.
    configured: DEVLIST lists interfaces. False on usbip-host until the first importer has set a configuration.
    """

    busid: str
    usb_id: UsbId
    serial: str = ""
    product: str = "virtual device"
    manufacturer: str = "usbip-plugin"
    echo: bool = False
    interface: InterfaceClass = VENDOR_CLASS
    more: tuple[InterfaceClass, ...] = ()
    speed: int = HIGH_SPEED
    configured: bool = False

    def descriptor(self, configured: bool) -> Descriptor:
        """Returns the device as in a DEVLIST reply."""
        bus = self.busid.partition("-")[0]
        return Descriptor(
            busid=self.busid,
            path=f"/sys/devices/virtual/usb/{self.busid}",
            busnum=int(bus) if bus.isdecimal() and bus.isascii() else 1,
            devnum=2 + zlib.crc32(self.busid.encode()) % 126,
            speed=self.speed,
            usb_id=self.usb_id,
            bcd_device=_BCD_DEVICE,
            device_class=0,
            device_subclass=0,
            device_protocol=0,
            configuration=int(configured),
            num_configurations=1,
            num_interfaces=1 + len(self.more) if configured else 0,
            interfaces=(self.interface, *self.more) if configured else (),
        )

    def usb_descriptor(self, kind: int, index: int, real: UsbId) -> bytes | None:
        """Returns the answer to GET_DESCRIPTOR for a descriptor type and index, None if the device stalls.

        real: vendor and product in the device descriptor.
        """
        if kind == 1:
            ids = struct.pack("<HHH", real.vendor, real.product, _BCD_DEVICE)
            serial = _SERIAL if self.serial else 0
            fast = self.speed >= SUPER_SPEED
            version, packet = (_BCD_USB_SUPER, _MAX_PACKET_0_SUPER) if fast else (_BCD_USB, _MAX_PACKET_0)
            head = struct.pack("<BBHBBBB", 18, 1, version, 0, 0, 0, packet)
            return head + ids + bytes([_MANUFACTURER, _PRODUCT, serial, 1])
        if kind == 2 and index == 0:
            bulk = b"".join(struct.pack("<BBBBHB", 7, 5, address, 2, _BULK_BYTES, 0) for address in (0x81, 0x01))
            ends = bulk if self.echo else b""
            faces = b""
            for number, i in enumerate((self.interface, *self.more)):
                faces += bytes([9, 4, number, 0, 0 if number or not ends else 2, i.class_, i.subclass, i.protocol, 0])
                faces += b"" if number else ends
            return struct.pack("<BBHBBBBB", 9, 2, 9 + len(faces), 1 + len(self.more), 1, 0, 0x80, 50) + faces
        if kind == 3:
            return self._string(index)
        return None

    def _string(self, index: int) -> bytes | None:
        if index == 0:
            return struct.pack("<BBH", 4, 3, _LANGUAGE)
        text = {_MANUFACTURER: self.manufacturer, _PRODUCT: self.product, _SERIAL: self.serial}.get(index)
        if not text:
            return None
        body = text.encode("utf-16-le")
        return bytes([2 + len(body), 3]) + body


class Transfers:
    """Transfers between one importer and one device.

    write: sends bytes to the importer.
    on_configure: called with each configuration that the importer sets.
    """

    def __init__(
        self, device: VirtualDevice, real: UsbId, write: Callable[[bytes], None], on_configure: Callable[[int], None]
    ) -> None:
        self._device, self._real, self._write, self._on_configure = device, real, write, on_configure
        self._configuration = int(device.configured)
        self._echo = bytearray()
        self._waiting: list[wire.Submit] = []

    def run(self) -> Decoding[None]:
        """Serves one command after the other, without end.

        Raises ProtocolViolation, also for more than MAX_WAITING reads or MAX_ECHO_BYTES of writes under way.
        """
        while True:
            command = wire.decode_command((yield wire.HEADER_BYTES))
            if isinstance(command, wire.Unlink):
                self._unlink(command)
                continue
            data = (yield command.length) if command.length and not command.incoming else b""
            if command.endpoint == 0:
                self._control(command)
            elif self._device.echo and command.endpoint == 1:
                self._bulk(command, data)
            else:
                self._answer(command, STALL, b"")

    def _answer(self, command: wire.Submit, status: int, data: bytes) -> None:
        length = command.length if not command.incoming and status == 0 else len(data)
        self._write(wire.encode_return(wire.SubmitReturn(command.seqnum, status, length)) + data)

    def _control(self, command: wire.Submit) -> None:
        data = self._standard_request(command.setup)
        if data is None:
            self._answer(command, STALL, b"")
        else:
            self._answer(command, 0, data[: command.length] if command.incoming else b"")

    def _standard_request(self, setup: bytes) -> bytes | None:
        request_type, request, value, _, _ = struct.unpack("<BBHHH", setup)
        if request_type & 0x60:  # a class or vendor request: this device supports none
            return None
        if request == _GET_DESCRIPTOR:
            return self._device.usb_descriptor(value >> 8, value & 0xFF, self._real)
        if request == _GET_STATUS:
            return bytes(2)
        if request == _GET_CONFIGURATION:
            return bytes([self._configuration])
        if request == _SET_CONFIGURATION and value <= 1:
            self._configuration = value
            self._on_configure(value)
            return b""
        return b"" if request in _SILENT_OK else None

    def _bulk(self, command: wire.Submit, data: bytes) -> None:
        if len(self._waiting) >= MAX_WAITING or len(self._echo) + len(data) > MAX_ECHO_BYTES:
            raise ProtocolViolation("too many transfers under way")
        if command.incoming:
            self._waiting.append(command)
        else:
            self._echo += data
            self._answer(command, 0, b"")
        while self._waiting and self._echo:
            reader = self._waiting.pop(0)
            self._answer(reader, 0, bytes(self._echo[: reader.length]))
            del self._echo[: reader.length]

    def _unlink(self, command: wire.Unlink) -> None:
        before = len(self._waiting)
        self._waiting = [waiting for waiting in self._waiting if waiting.seqnum != command.victim]
        status = -wire.ECONNRESET if len(self._waiting) < before else 0
        self._write(wire.encode_return(wire.UnlinkReturn(command.seqnum, status)))
