"""Messages of a real usbipd are decoded, and encoded again to equal bytes. golden/README.md has their origin."""

import pytest

from tests.protocol.golden_files import golden
from usbip_plugin.model import InterfaceClass, UsbId
from usbip_plugin.usbip import identify, wire
from usbip_plugin.usbip.wire import (
    ImportReply,
    decode,
    devlist_reply,
    encode_devlist_reply,
    encode_devlist_request,
    encode_import_reply,
    encode_import_request,
    import_reply,
)

STORAGE, SERIAL, KEYBOARD = UsbId(0x46F4, 0x0001), UsbId(0x0403, 0x6001), UsbId(0x0627, 0x0001)


def test_requests_are_those_that_were_sent() -> None:
    assert encode_devlist_request().hex() == "0111800500000000"
    assert encode_import_request("1-2").hex() == "0111800300000000" + b"1-2".hex() + "00" * 29


def test_a_list_of_devices_never_used_has_no_interfaces() -> None:
    reply, rest = decode(devlist_reply(), golden("devlist_three"))
    assert rest == b""
    assert reply.skipped == ()
    assert [(d.busid, d.usb_id, d.speed) for d in reply.devices] == [
        ("2-1", STORAGE, 5),
        ("1-3", SERIAL, 2),
        ("1-2", KEYBOARD, 3),
    ]
    assert [(d.configuration, d.num_configurations, d.interfaces) for d in reply.devices] == [(0, 1, ())] * 3
    assert reply.devices[0].path == "/sys/devices/pci0000:00/0000:00:06.0/usb2/2-1"
    assert reply.devices[0].devid == 2 << 16 | 2


def test_a_list_after_use_has_the_interfaces() -> None:
    reply, rest = decode(devlist_reply(), golden("devlist_after_use"))
    assert rest == b""
    assert [(d.busid, d.configuration, d.interfaces) for d in reply.devices] == [
        ("2-1", 1, (InterfaceClass(8, 6, 0x50),)),
        ("1-3", 1, (InterfaceClass(0xFF, 0xFF, 0xFF),)),
        ("1-2", 1, (InterfaceClass(3, 1, 1),)),
    ]


@pytest.mark.parametrize("name", ["devlist_three", "devlist_after_use", "devlist_empty_all_in_use"])
def test_lists_encode_to_the_same_bytes(name: str) -> None:
    reply, _ = decode(devlist_reply(), golden(name))
    assert encode_devlist_reply(reply.devices) == golden(name)


@pytest.mark.parametrize(
    ("name", "busid", "usb_id", "configuration"),
    [
        ("import_ok_storage", "2-1", STORAGE, 0),
        ("import_ok_serial", "1-3", SERIAL, 0),
        ("import_ok_serial_configured", "1-3", SERIAL, 1),
        ("import_ok_kbd", "1-2", KEYBOARD, 0),
    ],
)
def test_an_import_describes_the_device(name: str, busid: str, usb_id: UsbId, configuration: int) -> None:
    reply, rest = decode(import_reply(busid), golden(name))
    assert rest == b""
    assert reply.status == 0
    assert reply.descriptor is not None
    assert (reply.descriptor.busid, reply.descriptor.usb_id) == (busid, usb_id)
    assert (reply.descriptor.configuration, reply.descriptor.interfaces) == (configuration, ())
    assert encode_import_reply(reply) == golden(name)


@pytest.mark.parametrize(("name", "status"), [("import_busy", 2), ("import_unknown", 4)])
def test_a_refusal_is_eight_bytes(name: str, status: int) -> None:
    reply, rest = decode(import_reply("1-2"), golden(name))
    assert (reply, rest) == (ImportReply(status, None), b"")
    assert encode_import_reply(reply) == golden(name)


@pytest.mark.parametrize(
    ("name", "seqnum", "length"),
    [
        ("urb_device_descriptor_storage", 1, 18),
        ("urb_string_serial_storage", 3, 20),
        ("urb_set_configuration_kbd", 18, 0),
    ],
)
def test_answers_to_transfers(name: str, seqnum: int, length: int) -> None:
    raw = golden(name)
    header, data = raw[: wire.HEADER_BYTES], raw[wire.HEADER_BYTES :]
    answer = wire.decode_return(header)
    assert answer == wire.SubmitReturn(seqnum, 0, length)
    assert len(data) == length
    assert wire.encode_return(answer) == header


def test_descriptors() -> None:
    string = golden("urb_string_serial_storage")[wire.HEADER_BYTES :]
    assert identify.parse_string(string) == "STOR-0001"
    assert identify.parse_string(golden("urb_string_serial_serial")[wire.HEADER_BYTES :]) == "QEMU USB BAUM BRAILLE"
    storage = golden("urb_config_storage")[wire.HEADER_BYTES :]
    assert identify.parse_interfaces(storage) == (InterfaceClass(8, 6, 0x50),)
    assert identify.parse_interfaces(golden("urb_config_kbd")[wire.HEADER_BYTES :]) == (InterfaceClass(3, 1, 1),)
