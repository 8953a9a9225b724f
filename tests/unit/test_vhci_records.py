"""Port records in the `usbip` tool's words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.model import DeviceKey, ServerKey
from usbip_plugin.vhci.records import Records, format_record, parse_record

KEY = DeviceKey(ServerKey("10.20.30.40", 3240), "1-1.4")

hosts = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1, max_size=200)
busids = st.from_regex(r"[0-9]{1,2}-[0-9](\.[0-9]){0,4}", fullmatch=True)


def test_the_text_is_the_tools() -> None:
    assert format_record(KEY) == "10.20.30.40 3240 1-1.4\n"
    assert parse_record("127.0.0.1 3240 1-1\n") == DeviceKey(ServerKey("127.0.0.1"), "1-1")


@given(hosts, st.integers(1, 65535), busids)
def test_what_is_written_is_read_back(host: str, port: int, busid: str) -> None:
    key = DeviceKey(ServerKey(host, port), busid)
    assert parse_record(format_record(key)) == key


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
def test_what_could_not_be_read_back_is_not_written(key: DeviceKey) -> None:
    with pytest.raises(ValueError, match="port record"):
        format_record(key)


@given(st.text(max_size=200))
def test_any_text_is_a_record_or_none(text: str) -> None:
    key = parse_record(text)
    assert key is None or 0 < key.server.port <= 65535


@pytest.mark.parametrize("text", ["", "host 3240\n", "host usbip 1-1\n", "host 3240 1/1\n", "host 99999 1-1\n"])
def test_nonsense_is_none(text: str) -> None:
    assert parse_record(text) is None


class TestDirectory:
    def test_it_is_made_when_first_written(self, tmp_path: Path) -> None:
        records = Records(tmp_path / "vhci_hcd")
        assert records.writable()
        assert records.read(7) is None
        records.write(7, KEY)
        assert (tmp_path / "vhci_hcd/port7").read_text() == "10.20.30.40 3240 1-1.4\n"
        assert records.read(7) == KEY

    def test_a_record_that_is_not_ours_any_more_is_kept(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        other = DeviceKey(KEY.server, "1-2")
        records.write(7, other)
        records.remove(7, only=KEY)
        assert records.read(7) == other
        records.remove(7, only=other)
        assert records.read(7) is None

    def test_removing_what_is_not_there(self, tmp_path: Path) -> None:
        Records(tmp_path / "nowhere").remove(1)

    def test_garbage_is_no_record(self, tmp_path: Path) -> None:
        (tmp_path / "port1").write_bytes(b"\xff\xfe" * 5000)
        assert Records(tmp_path).read(1) is None
