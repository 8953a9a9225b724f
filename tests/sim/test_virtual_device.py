"""Transfers of a virtual device: the requests of an enumeration, and an echo with unlinks."""

from __future__ import annotations

import pytest

from usbip_plugin.model import UsbId
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.wire import ProtocolViolation
from usbip_sim.server.usbdevice import STALL, Transfers, VirtualDevice

STICK = VirtualDevice("1-1", UsbId(0x1209, 0x0001), serial="S1")
ECHO = VirtualDevice("1-2", UsbId(0x1209, 0x0002), echo=True)


class Importer:
    """Sends commands to a device, and decodes its answers."""

    def __init__(self, device: VirtualDevice) -> None:
        self.configured: list[int] = []
        self._answers: list[bytes] = []
        self._steps = Transfers(device, device.usb_id, self._answers.append, self.configured.append).run()
        next(self._steps)
        self._seqnum = 0

    def command(self, command: wire.Submit | wire.Unlink, data: bytes = b"") -> None:
        self._steps.send(wire.encode_command(command))
        if data:
            self._steps.send(data)

    def submit(self, endpoint: int, *, length: int = 0, data: bytes = b"", setup: bytes = bytes(8)) -> int:
        self._seqnum += 1
        self.command(wire.Submit(self._seqnum, 0, not data, endpoint, length or len(data), setup), data)
        return self._seqnum

    def answers(self) -> list[tuple[wire.SubmitReturn | wire.UnlinkReturn, bytes]]:
        """Returns header and data of the answers since the last call."""
        answers, self._answers[:] = list(self._answers), []
        return [(wire.decode_return(raw[: wire.HEADER_BYTES]), raw[wire.HEADER_BYTES :]) for raw in answers]

    def control(self, setup: str, length: int) -> tuple[int, bytes]:
        """Returns status and data of one control transfer to the host."""
        self.submit(0, length=length, setup=bytes.fromhex(setup))
        ((answer, data),) = self.answers()
        assert isinstance(answer, wire.SubmitReturn)
        assert answer.actual_length == len(data)
        return answer.status, data


@pytest.mark.parametrize("length", [8, 18, 64])
def test_the_device_descriptor_is_cut_to_the_requested_length(length: int) -> None:
    status, data = Importer(STICK).control("80 06 00 01 00 00 40 00", length)
    assert status == 0
    assert data == bytes.fromhex("12 01 00 02 00 00 00 40 09 12 01 00 00 01 01 02 03 01")[:length]


@pytest.mark.parametrize(("device", "endpoints"), [(STICK, 0), (ECHO, 2)])
def test_the_configuration_counts_its_own_bytes_and_endpoints(device: VirtualDevice, endpoints: int) -> None:
    _, data = Importer(device).control("80 06 00 02 00 00 ff 00", 255)
    assert int.from_bytes(data[2:4], "little") == len(data) == 18 + 7 * endpoints
    assert data[13] == endpoints


@pytest.mark.parametrize(
    "setup",
    [
        "80 06 00 06 00 00 0a 00",  # device qualifier
        "80 06 00 0f 00 00 05 00",  # BOS
        "80 06 09 03 09 04 ff 00",  # a string it does not have
        "c0 01 00 00 00 00 04 00",  # a vendor request
        "80 63 00 00 00 00 04 00",  # no standard request
    ],
)
def test_an_unknown_request_is_stalled(setup: str) -> None:
    assert Importer(STICK).control(setup, 64) == (STALL, b"")


def test_a_configuration_can_be_set_and_read() -> None:
    importer = Importer(STICK)
    assert importer.control("80 08 00 00 00 00 01 00", 1) == (0, b"\0")
    assert importer.control("00 09 01 00 00 00 00 00", 0) == (0, b"")
    assert importer.control("80 08 00 00 00 00 01 00", 1) == (0, b"\1")
    assert importer.configured == [1]
    assert importer.control("00 09 02 00 00 00 00 00", 0) == (STALL, b"")


def test_an_echo_answers_readers_in_order_with_what_was_written() -> None:
    importer = Importer(ECHO)
    first, second = importer.submit(1, length=3), importer.submit(1, length=64)
    assert importer.answers() == []
    written = importer.submit(1, data=b"abcdef")
    assert importer.answers() == [
        (wire.SubmitReturn(written, 0, 6), b""),
        (wire.SubmitReturn(first, 0, 3), b"abc"),
        (wire.SubmitReturn(second, 0, 3), b"def"),
    ]


def test_an_unlinked_reader_gets_nothing_and_loses_nothing() -> None:
    importer = Importer(ECHO)
    gone, kept = importer.submit(1, length=64), importer.submit(1, length=64)
    importer.command(wire.Unlink(100, gone))
    assert importer.answers() == [(wire.UnlinkReturn(100, -wire.ECONNRESET), b"")]
    importer.command(wire.Unlink(101, gone))
    assert importer.answers() == [(wire.UnlinkReturn(101, 0), b"")]
    written = importer.submit(1, data=b"abc")
    assert importer.answers() == [(wire.SubmitReturn(written, 0, 3), b""), (wire.SubmitReturn(kept, 0, 3), b"abc")]


def test_a_stick_has_no_other_endpoint() -> None:
    importer = Importer(STICK)
    number = importer.submit(1, length=64)
    assert importer.answers() == [(wire.SubmitReturn(number, STALL, 0), b"")]


def test_an_importer_that_does_not_speak_usbip_is_dropped() -> None:
    importer = Importer(STICK)
    with pytest.raises(ProtocolViolation):
        importer.submit(1, length=wire.MAX_TRANSFER_BYTES + 1)


def test_a_device_is_not_configured_before_first_use_and_shows_no_interfaces() -> None:
    assert STICK.descriptor(configured=False).interfaces == ()
    assert STICK.descriptor(configured=True).interfaces == (STICK.interface,)
