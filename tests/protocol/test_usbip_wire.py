"""USB/IP messages: those of a real usbipd, any others, and invalid ones. fuzz/fuzz_wire.py adds noise.

golden/README.md has the origin of the real messages.
"""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.golden_files import golden
from usbip_plugin.model import Descriptor, InterfaceClass, UsbId, valid_busid
from usbip_plugin.usbip import identify, wire
from usbip_plugin.usbip.wire import (
    MAX_DEVICES,
    MAX_INTERFACES,
    DevlistReply,
    DevlistRequest,
    ImportReply,
    ImportRequest,
    ProtocolViolation,
    decode,
    devlist_reply,
    encode_devlist_reply,
    encode_devlist_request,
    encode_import_reply,
    encode_import_request,
    import_reply,
    request,
    why_unlisted,
)

STORAGE, SERIAL, KEYBOARD = UsbId(0x46F4, 0x0001), UsbId(0x0403, 0x6001), UsbId(0x0627, 0x0001)


def test_requests_are_those_that_were_sent() -> None:
    assert encode_devlist_request().hex() == "0111800500000000"
    assert encode_import_request("1-2").hex() == "0111800300000000" + b"1-2".hex() + "00" * 29


def test_a_list_of_devices_never_used_has_no_interfaces() -> None:
    reply, rest = decode(devlist_reply(), golden("devlist_three"))
    assert rest == b""
    assert reply.problems == ()
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


# any messages


U8 = st.integers(0, 0xFF)
U16 = st.integers(0, 0xFFFF)
BUSIDS = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z.\-]{0,30}", fullmatch=True)
PATHS = st.text(st.characters(categories=["L", "N", "P"]), max_size=60)


@st.composite
def descriptors(draw: st.DrawFn) -> Descriptor:
    interfaces = tuple(draw(st.lists(st.builds(InterfaceClass, U8, U8, U8), max_size=MAX_INTERFACES)))
    return Descriptor(
        busid=draw(BUSIDS),
        path=draw(PATHS),
        busnum=draw(U16),
        devnum=draw(U16),
        speed=draw(st.sampled_from(sorted(set(wire.SPEEDS.values())))),
        usb_id=UsbId(draw(U16), draw(U16)),
        bcd_device=draw(U16),
        device_class=draw(U8),
        device_subclass=draw(U8),
        device_protocol=draw(U8),
        configuration=draw(U8),
        num_configurations=draw(U8),
        num_interfaces=len(interfaces),
        interfaces=interfaces,
    )


@given(st.lists(descriptors(), max_size=8, unique_by=lambda device: device.busid), st.binary(max_size=8))
def test_a_list_survives_the_wire_and_leaves_what_follows(devices: list[Descriptor], follows: bytes) -> None:
    decoded = decode(devlist_reply(), encode_devlist_reply(devices) + follows)
    assert decoded == (DevlistReply(tuple(devices)), follows)


@given(descriptors(), st.binary(max_size=8))
def test_an_import_survives_the_wire_and_leaves_what_follows(device: Descriptor, follows: bytes) -> None:
    reply = ImportReply(0, replace(device, interfaces=()))
    assert decode(import_reply(device.busid), encode_import_reply(reply) + follows) == (reply, follows)


@given(BUSIDS)
def test_requests_survive_the_wire(busid: str) -> None:
    assert decode(request(), encode_import_request(busid)) == (ImportRequest(busid), b"")
    assert decode(request(), encode_devlist_request()) == (DevlistRequest(), b"")


def test_the_largest_numbers_that_make_a_device_id_and_the_longest_path_survive_the_wire() -> None:
    device, *_ = decode(devlist_reply(), golden("devlist_three"))[0].devices
    largest = replace(device, busnum=0xFFFF, devnum=0xFFFF, path="/" + "é" * 127)
    assert len(largest.path.encode()) == 255
    assert decode(devlist_reply(), encode_devlist_reply([largest]))[0].devices == (largest,)


def test_a_path_that_leaves_no_room_for_its_end_is_not_sent() -> None:
    device, *_ = decode(devlist_reply(), golden("devlist_three"))[0].devices
    with pytest.raises(ProtocolViolation, match="path must have at most 255 bytes, got 256"):
        encode_devlist_reply([replace(device, path="/" * 256)])


@given(st.sampled_from(["devlist_three", "devlist_after_use", "import_ok_kbd"]), st.data())
def test_every_cut_of_a_real_reply_ends_early(name: str, data: st.DataObject) -> None:
    raw = golden(name)
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(ProtocolViolation, match="ends early"):
        decode(devlist_reply() if name.startswith("devlist") else import_reply("1-2"), raw[:cut])


@pytest.mark.parametrize("count", [MAX_DEVICES + 1, 0xFFFFFFFF])
def test_a_list_of_more_devices_than_are_read_is_cut(count: int) -> None:
    device, *_ = decode(devlist_reply(), golden("devlist_three"))[0].devices
    raw = encode_devlist_reply(replace(device, busid=f"1-{number}") for number in range(MAX_DEVICES))
    reply, rest = decode(devlist_reply(), struct.pack(">HHII", 0x0111, 5, 0, count) + raw[12:])
    assert rest == b""
    assert len(reply.devices) == MAX_DEVICES
    assert reply.problems == (f"the list: only the first 256 of {count} devices are read",)
    assert why_unlisted(reply.problems, "2-1") == reply.problems[0]


def test_a_web_server_is_recognised() -> None:
    for reply in (devlist_reply(), import_reply("1-2")):
        with pytest.raises(ProtocolViolation, match="a web server"):
            decode(reply, b"HTTP/1.1 400 Bad Request\r\n")


@pytest.mark.parametrize("number", [MAX_INTERFACES + 1, 40, 0xFF])
def test_a_device_with_more_interfaces_than_are_kept_hides_nothing(number: int) -> None:
    stick, camera, _ = decode(devlist_reply(), golden("devlist_three"))[0].devices
    settings = (InterfaceClass(0x0E, 1, 0), *(InterfaceClass(0x0E, 2, n) for n in range(number - 1)))
    raw = encode_devlist_reply([replace(camera, interfaces=settings), stick])
    reply, rest = decode(devlist_reply(), raw)
    assert rest == b""
    assert reply.devices == (replace(camera, num_interfaces=number, interfaces=settings[:MAX_INTERFACES]), stick)
    assert reply.problems == (f"1-3: only the first 32 of {number} interface classes are used",)


def test_interfaces_that_are_listed_for_each_alternate_setting_lose_no_class() -> None:
    camera, *_ = decode(devlist_reply(), golden("devlist_three"))[0].devices
    classes = (InterfaceClass(0x0E, 1, 0), InterfaceClass(0x0E, 2, 0), InterfaceClass(1, 1, 0))
    listed = (*classes[:1], *(classes[1:2] * 40), *classes[2:])
    reply, _ = decode(devlist_reply(), encode_devlist_reply([replace(camera, interfaces=listed)]))
    assert (reply.devices[0].interfaces, reply.problems) == (classes, ())


@pytest.mark.parametrize(("sent", "expected"), [(1, 1), (2, 2), (3, 3), (4, 5), (5, 5), (6, 6)])
def test_the_speeds_of_libusb_are_those_of_the_kernel(sent: int, expected: int) -> None:
    """LIBUSB_SPEED_SUPER is 4, which no device of the kernel ever has."""
    raw = bytearray(golden("devlist_three"))
    raw[12 + 296 : 12 + 300] = struct.pack(">I", sent)
    assert decode(devlist_reply(), bytes(raw))[0].devices[0].speed == expected
    raw = bytearray(golden("import_ok_kbd"))
    raw[8 + 296 : 8 + 300] = struct.pack(">I", sent)
    descriptor = decode(import_reply("1-2"), bytes(raw))[0].descriptor
    assert descriptor is not None
    assert descriptor.speed == expected


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (256, b"../../x\0", "bus ID"),
        (256, b"1-1/2\0", "bus ID"),
        (256, b"\0", "bus ID"),
        (256, b".\0", "bus ID"),
        (256, b"1 1\0", "bus ID"),
        (256, b"1-1\n\0", "bus ID"),
        (256, b"x" * 32, "not NUL-terminated"),
        (0, b"/" * 256, "not NUL-terminated"),
        (0, b"/sys\x1b[31m\0", "unprintable"),
        (288, b"\0\1\0\0", "must fit"),
        (292, b"\0\1\0\0", "must fit"),
        (296, b"\0\0\0\0", "speed 0"),
        (296, b"\0\0\0\x07", "speed 7"),
    ],
)
def test_an_entry_that_cannot_be_used_hides_no_other_and_is_never_imported(
    offset: int, value: bytes, reason: str
) -> None:
    raw = bytearray(golden("devlist_three"))
    raw[12 + offset : 12 + offset + len(value)] = value
    reply, rest = decode(devlist_reply(), bytes(raw))
    assert rest == b""
    assert [device.busid for device in reply.devices] == ["1-3", "1-2"]
    assert len(reply.problems) == 1
    assert reason in reply.problems[0]
    raw = bytearray(golden("import_ok_kbd"))
    raw[8 + offset : 8 + offset + len(value)] = value
    with pytest.raises(ProtocolViolation, match=reason):
        decode(import_reply("1-2"), bytes(raw))


def test_of_two_entries_with_one_busid_the_first_is_kept() -> None:
    first, *_ = decode(devlist_reply(), golden("devlist_three"))[0].devices
    second = replace(first, usb_id=UsbId(1, 2))
    reply, _ = decode(devlist_reply(), encode_devlist_reply([first, second]))
    assert reply.devices == (first,)
    assert reply.problems == ("2-1: listed more than once, only the first entry is used",)
    assert why_unlisted(reply.problems, "2-10") == ""


def test_a_path_that_is_not_utf_8_is_shown_with_replacements() -> None:
    raw = bytearray(golden("devlist_three"))
    raw[12 : 12 + 6] = b"/dev/\xff"
    reply, _ = decode(devlist_reply(), bytes(raw))
    assert (len(reply.devices), reply.problems) == (3, ())
    assert reply.devices[0].path.startswith("/dev/\ufffd")


def test_a_reply_about_another_device_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match=r"expected a reply about 1-1\.2, got one about 1-2"):
        decode(import_reply("1-1.2"), golden("import_ok_kbd"))


@pytest.mark.parametrize("header", ["0106000500000000", "0111000300000000", "0111000500000001"])
def test_a_list_with_another_version_code_or_status_is_refused(header: str) -> None:
    with pytest.raises(ProtocolViolation):
        decode(devlist_reply(), bytes.fromhex(header) + bytes(4))


@given(st.text(max_size=40))
def test_a_valid_busid_is_safe_as_a_file_name(text: str) -> None:
    if valid_busid(text):
        assert text not in {"", ".", ".."}
        assert len(text) < 32
        assert not set(text) & set("/\0 \n")
        assert text.isascii()
    else:
        with pytest.raises(ProtocolViolation):
            encode_import_request(text)


U32 = st.integers(0, 0xFFFFFFFF)
I32 = st.integers(-(1 << 31), (1 << 31) - 1)
LENGTHS = st.integers(0, wire.MAX_TRANSFER_BYTES)


@given(
    st.one_of(
        st.builds(
            wire.Submit,
            U32,
            U32,
            st.booleans(),
            st.integers(0, 15),
            LENGTHS,
            st.binary(min_size=8, max_size=8),
            U32,
            I32,
        ),
        st.builds(wire.Unlink, U32, U32),
    )
)
def test_commands_survive_the_wire(command: wire.Submit | wire.Unlink) -> None:
    assert wire.decode_command(wire.encode_command(command)) == command


@given(st.one_of(st.builds(wire.SubmitReturn, U32, I32, LENGTHS), st.builds(wire.UnlinkReturn, U32, I32)))
def test_answers_survive_the_wire(answer: wire.SubmitReturn | wire.UnlinkReturn) -> None:
    assert wire.decode_return(wire.encode_return(answer)) == answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ABC", "ABC"),
        (" ABC \0\0", "ABC"),
        ("ABC\t", "ABC"),
        ("ABC\0junk", "ABC"),
        ("\0ABC", None),
        ("A\x1b[31mC", None),
        ("A\nB", None),
        ("", None),
        ("\0", None),
        ("ÄÖ", "ÄÖ"),
    ],
)
def test_a_serial_number_is_printable_or_absent(text: str, expected: str | None) -> None:
    body = text.encode("utf-16-le")
    assert identify.parse_string(bytes([2 + len(body), 3]) + body) == expected
