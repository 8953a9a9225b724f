"""The file that names the clients: written whole, read with care, by older and newer versions."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.exporter.state import FILE, MAX_BYTES, VERSION, Export, StateFile, format_state, parse_state
from usbip_plugin.model import Endpoint

SINCE = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
EXPORTS = {
    "1-1": Export("1-1", Endpoint("10.0.0.5", 40112), SINCE),
    "1-2.3": Export("1-2.3", Endpoint("fd00::5", 40113), SINCE),
    "2-1": Export("2-1", None, SINCE),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "usbip-plugin")
    assert dict(state.read()) == {}
    state.write(EXPORTS.values())
    assert dict(state.read()) == EXPORTS
    state.write([])
    assert dict(state.read()) == {}
    assert [path.name for path in (tmp_path / "usbip-plugin").iterdir()] == [FILE]


def test_the_format_is_stable() -> None:
    assert json.loads(format_state(EXPORTS.values())) == {
        "version": 1,
        "exports": {
            "1-1": {"peer": "10.0.0.5:40112", "since": "2026-05-04T03:02:01Z"},
            "1-2.3": {"peer": "[fd00::5]:40113", "since": "2026-05-04T03:02:01Z"},
            "2-1": {"peer": None, "since": "2026-05-04T03:02:01Z"},
        },
    }


def test_a_newer_file_is_read_without_what_is_new() -> None:
    newer = json.loads(format_state(EXPORTS.values()))
    newer["version"] = VERSION + 1
    newer["more"] = {"exports": 1}
    newer["exports"]["1-1"]["holder"] = "node-a"
    assert dict(parse_state(json.dumps(newer))) == EXPORTS


@pytest.mark.parametrize(
    "row",
    ["1", "null", "{}", '{"peer": "x"}', '{"since": 3, "peer": null}', '{"since": "yesterday", "peer": null}'],
)
def test_a_row_that_is_not_valid_is_left_out(row: str) -> None:
    good = '"1-1": {"peer": "10.0.0.5:40112", "since": "2026-05-04T03:02:01Z"}'
    assert list(parse_state(f'{{"exports": {{"1-2": {row}, {good}}}}}')) == ["1-1"]


def test_a_peer_that_is_not_valid_is_unknown() -> None:
    text = '{"exports": {"1-1": {"peer": "somewhere", "since": "2026-05-04T03:02:01Z"}}}'
    assert parse_state(text)["1-1"].peer is None


@given(st.one_of(st.text(), st.recursive(st.none() | st.text(), st.lists).map(json.dumps)))
def test_any_text_is_read(text: str) -> None:
    parse_state(text)


def test_a_file_that_is_no_file_or_too_deep_or_too_large_is_read_as_none(tmp_path: Path) -> None:
    assert dict(parse_state("[" * MAX_BYTES)) == {}
    (tmp_path / FILE).mkdir()
    assert dict(StateFile(tmp_path).read()) == {}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFile(tmp_path)
    state.write(EXPORTS.values())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        state.write([])
    assert dict(state.read()) == EXPORTS
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
