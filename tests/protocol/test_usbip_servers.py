"""Replies as other servers form them, made by hand from the field order and the habits of their sources."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from usbip_plugin.errors import DeviceBusy, ImportRefused
from usbip_plugin.model import DeviceKey, InterfaceClass, ServerKey, UsbId
from usbip_plugin.usbip.client import refusal
from usbip_plugin.usbip.wire import ProtocolViolation, decode, devlist_reply, import_reply

STICK, HUB = UsbId(0x0951, 0x1666), UsbId(0x1D6B, 0x0003)
STORAGE = InterfaceClass(8, 6, 0x50)


def record(
    path: str,
    busid: str,
    numbers: tuple[int, int, int],
    usb_id: UsbId = STICK,
    *,
    bcd: int = 0x0110,
    classes: tuple[int, int, int] = (0, 0, 0),
    configuration: int = 1,
    interfaces: tuple[InterfaceClass, ...] = (STORAGE,),
) -> tuple[bytes, bytes]:
    """Returns the record of a device and the records of its interfaces. numbers: bus, device, speed."""
    device = struct.pack(">256s32sIII", path.encode(), busid.encode(), *numbers)
    device += struct.pack(">HHHBBB", usb_id.vendor, usb_id.product, bcd, *classes)
    device += bytes([configuration, 1, len(interfaces)])
    return device, b"".join(bytes([one.class_, one.subclass, one.protocol, 0]) for one in interfaces)


@dataclass(frozen=True)
class Server:
    """A server's record of the stick, those listed before it, and the status of its refusals."""

    busid: str
    stick: tuple[bytes, bytes]
    before: tuple[tuple[bytes, bytes], ...] = ()
    refuses: int = 1
    interfaces: tuple[InterfaceClass, ...] = (STORAGE,)
    devid: int = 1 << 16 | 4

    @property
    def devlist(self) -> bytes:
        entries = (*self.before, self.stick)
        return struct.pack(">HHII", 0x0111, 5, 0, len(entries)) + b"".join(map(b"".join, entries))


SERVERS = {
    "usbipd": Server(
        "1-1.4",
        record(
            "/sys/devices/pci0000:00/0000:00:14.0/usb1/1-1/1-1.4", "1-1.4", (1, 4, 5), configuration=0, interfaces=()
        ),
        refuses=2,
        interfaces=(),
    ),
    # versions of before Linux 4.18 have one status for every refusal
    "usbipd-old": Server("1-1.4", record("/sys/bus/usb/devices/1-1.4", "1-1.4", (1, 4, 3))),
    # a Windows path; the device number is the port
    "usbipd-win": Server("1-4", record("USB\\VID_0951&PID_1666\\STICK0001", "1-4", (1, 4, 6)), refuses=2),
    # no release number or configuration before an import; alternate settings are interfaces; an unknown speed is 0
    "android": Server(
        "1-4",
        record("/dev/bus/usb/001/004", "1-4", (1, 4, 3), bcd=0xFFFF, configuration=0, interfaces=(STORAGE,) * 3),
        before=(record("/dev/bus/usb/001/009", "1-9", (1, 9, 0), UsbId(1, 2), bcd=0xFFFF, configuration=0),),
        interfaces=(STORAGE,) * 3,
    ),
    # two dashes in the bus ID; the device number is the port; libusb's number of SuperSpeed
    "jiegec/usbip": Server("1-9-4", record("/sys/bus/1/9/4", "1-9-4", (1, 4, 4))),
    # hubs are listed, and USB 3 as high speed
    "pyusbip": Server(
        "1-4",
        record("pyusbip/1/4", "1-4", (1, 4, 3)),
        before=(
            record("pyusbip/2/1", "2-1", (2, 1, 3), HUB, classes=(9, 0, 3), interfaces=(InterfaceClass(9, 0, 0),)),
        ),
    ),
    # the device number has a digit for each port; one interface of class 0, whatever the device has
    "usbipd-mac": Server(
        "32-2.1.3",
        record("/sys/devices/32-2.1.3", "32-2.1.3", (32, 0x213, 4), bcd=0, interfaces=(InterfaceClass(0, 0, 0),)),
        interfaces=(InterfaceClass(0, 0, 0),),
        devid=32 << 16 | 0x213,
    ),
}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS.keys())
def test_the_replies_of_other_servers_are_understood(server: Server) -> None:
    listed, rest = decode(devlist_reply(), server.devlist)
    assert rest == b""
    device = {device.busid: device for device in listed.devices}[server.busid]
    assert (device.usb_id, device.devid, device.interfaces) == (STICK, server.devid, server.interfaces)
    assert 0 < device.speed < 7

    reply, rest = decode(import_reply(server.busid), struct.pack(">HHI", 0x0111, 3, 0) + server.stick[0] + b"URBs")
    assert rest == b"URBs"
    assert reply.descriptor is not None
    assert (reply.descriptor.usb_id, reply.descriptor.devid) == (STICK, server.devid)

    refused, _ = decode(import_reply(server.busid), struct.pack(">HHI", 0x0111, 3, server.refuses))
    error = refusal(DeviceKey(ServerKey("lab"), server.busid), refused.status)
    assert isinstance(error, DeviceBusy if server.refuses == 2 else ImportRefused)


def test_nothing_is_read_out_of_the_broken_lists_of_an_early_usbipd_mac() -> None:
    """It sent four bytes too many after the count, no release numbers, and no interfaces."""
    device, _ = record("/sys/devices/20/2.1", "20", (20, 1, 3))
    broken = struct.pack(">HHIII", 0x0111, 5, 0, 2, 0) + (device[:304] + device[306:]) * 2
    with pytest.raises(ProtocolViolation):
        decode(devlist_reply(), broken)
    with pytest.raises(ProtocolViolation):
        decode(import_reply("20"), struct.pack(">HHII", 0x0111, 3, 0, 0) + device[:304] + device[306:])
