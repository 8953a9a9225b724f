"""Port records in the format of the `usbip` tool."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.model import DeviceKey, Endpoint, Hold, ServerKey, Tenure, UsbId
from usbip_plugin.vhci.records import MAX_HOLDS, Record, Records, format_record, parse_record

KEY = DeviceKey(ServerKey("10.20.30.40", 3240), "1-1.4")

hosts = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1, max_size=200)
busids = st.from_regex(r"[0-9]{1,2}-[0-9](\.[0-9]){0,4}", fullmatch=True)


def test_a_record_has_the_format_of_the_tool() -> None:
    assert format_record(Record(KEY)) == "10.20.30.40 3240 1-1.4\n"
    assert parse_record("127.0.0.1 3240 1-1\n") == Record(DeviceKey(ServerKey("127.0.0.1"), "1-1"))


def test_the_occupant_is_on_a_line_that_the_tool_ignores() -> None:
    text = format_record(Record(KEY, (65538, 4711)))
    assert text.splitlines()[0] == "10.20.30.40 3240 1-1.4"
    assert parse_record(text) == Record(KEY, (65538, 4711))


@pytest.mark.parametrize("line", ["", "1", "1 2 3", "-1 2", "x y", "1 99999999999"])
def test_an_invalid_second_line_is_ignored(line: str) -> None:
    assert parse_record(f"10.20.30.40 3240 1-1.4\n{line}\n") == Record(KEY)


def test_a_record_fits_its_occupant() -> None:
    ours = Record(KEY, (65538, 4711))
    assert ours.fits((65538, 4711))
    assert not ours.fits((65538, 4712)), "another connection to a similar device"
    assert ours.fits(None), "not enumerated yet, so the occupant is unknown"
    assert Record(KEY).fits((1, 2)), "a record of the tool has no occupant"


occupants = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
sources = st.none() | st.builds(Endpoint, st.ip_addresses(v=4).map(str), st.integers(1, 65535))


usb_ids = st.none() | st.builds(UsbId, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
keys = st.builds(DeviceKey, st.builds(ServerKey, hosts, st.integers(1, 65535)), busids)
tenures = st.builds(Tenure, st.uuids().map(str), st.integers(0, 2**31 - 1))
holds = st.lists(st.builds(Hold, keys, tenures), max_size=MAX_HOLDS).map(tuple)


@given(keys, st.none() | st.tuples(occupants, sources, st.booleans(), usb_ids, holds))
def test_a_written_record_is_read_back(
    key: DeviceKey,
    ours: tuple[tuple[int, int], Endpoint | None, bool, UsbId | None, tuple[Hold, ...]] | None,
) -> None:
    record = Record(key, *(ours or ()))
    assert parse_record(format_record(record)) == record


@pytest.mark.parametrize(
    "key",
    [
        DeviceKey(ServerKey("two words"), "1-1"),
        DeviceKey(ServerKey(""), "1-1"),
        DeviceKey(ServerKey("host", 0), "1-1"),
        DeviceKey(ServerKey("host"), "1-1\nx"),
        DeviceKey(ServerKey("h" * 2000), "1-1"),
    ],
)
def test_a_record_that_could_not_be_read_back_is_refused(key: DeviceKey) -> None:
    with pytest.raises(ValueError, match="port record"):
        format_record(Record(key))


@pytest.mark.parametrize(
    "line",
    [
        "held u 1 host 3240",
        "held u -1 host 3240 1-1",
        "held u x host 3240 1-1",
        "held u/v 1 host 3240 1-1",
        "held u 1 host 0 1-1",
        "held u 1 host 3240 1/1",
        "kept u 1 host 3240 1-1",
    ],
)
def test_an_invalid_line_about_a_lock_is_ignored(line: str) -> None:
    text = format_record(Record(KEY, (65538, 4711)))
    assert parse_record(text + line + "\n") == Record(KEY, (65538, 4711))


@given(st.text(max_size=200))
def test_any_text_is_a_record_or_none(text: str) -> None:
    record = parse_record(text)
    assert record is None or 0 < record.key.server.port <= 65535


@pytest.mark.parametrize("text", ["", "host 3240\n", "host usbip 1-1\n", "host 3240 1/1\n", "host 99999 1-1\n"])
def test_an_invalid_text_is_not_a_record(text: str) -> None:
    assert parse_record(text) is None


class TestDirectory:
    def test_the_first_write_makes_the_directory(self, tmp_path: Path) -> None:
        records = Records(tmp_path / "vhci_hcd")
        assert records.writable()
        assert records.read(7) is None
        records.write(7, Record(KEY))
        assert (tmp_path / "vhci_hcd/port7").read_text() == "10.20.30.40 3240 1-1.4\n"
        assert records.read(7) == Record(KEY)

    def test_the_record_of_another_device_is_kept(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        other = DeviceKey(KEY.server, "1-2")
        records.write(7, Record(other))
        records.remove(7, only=KEY)
        assert records.read(7) == Record(other)
        records.remove(7, only=other)
        assert records.read(7) is None

    def test_a_missing_record_can_be_removed(self, tmp_path: Path) -> None:
        Records(tmp_path / "nowhere").remove(1)

    def test_a_file_of_garbage_is_not_a_record(self, tmp_path: Path) -> None:
        (tmp_path / "port1").write_bytes(b"\xff\xfe" * 5000)
        assert Records(tmp_path).read(1) is None
