"""Tables, JSON, YAML and names of rows; colours and ages."""

from __future__ import annotations

import io
import json
import re

import pytest
import yaml

from usbip_plugin.cli.tables import Columns, Row, age, show, table, wants_colour, widths

COLUMNS = Columns(("device", "resources", "state", "reason"), ("device", "state", "reason", "usb_id"), "id")


def row(device: str, state: str, reason: str, **more: str | list[str] | None) -> Row:
    return {"device": device, "id": f"id-of-{device}", "state": state, "reason": reason, "resources": [], **more}


LONG = "holder silent since 2026-05-04T04:01:20Z; can be taken over"
ROWS = [
    row("lab:3240/1-1", "held", "in use", resources=["a/x", "a/y"], usb_id="0951:1666"),
    row("attic:3240/1-2", "free", "available", usb_id=None),
    row("z:3240/2-1", "silent", LONG, usb_id=None),
]


def shown(form: str, rows: list[Row] = ROWS, *, head: bool = True) -> str:
    out = io.StringIO()
    show(rows, COLUMNS, form, head=head, out=out)
    return out.getvalue()


def test_the_table_is_aligned_and_a_missing_value_is_a_dash() -> None:
    head, held, free, _silent = shown("table").splitlines()
    assert head.split() == ["DEVICE", "RESOURCE", "STATE", "REASON"]
    assert held[head.index("RESOURCE") :].startswith("a/x,a/y ")
    assert free.split() == ["attic:3240/1-2", "-", "free", "available"]


def test_wide_has_its_own_columns() -> None:
    head, held, *_others = shown("wide").splitlines()
    assert head.split() == ["DEVICE", "STATE", "REASON", "USB-ID"]
    assert held.split()[-1] == "0951:1666"


def test_the_head_can_be_left_out() -> None:
    for form in ("table", "wide"):
        assert shown(form, head=False) == shown(form).partition("\n")[2]


def test_json_and_yaml_have_all_rows_and_name_has_the_ids() -> None:
    nameless = {**row("lab:3240/?", "unavailable", ""), "id": None}
    rows = [*ROWS, nameless]
    assert json.loads(shown("json", rows)) == yaml.safe_load(shown("yaml", rows)) == rows
    assert shown("name", rows).split() == [one["id"] for one in ROWS]


def test_without_rows_only_json_and_yaml_have_output() -> None:
    for form, text in (("json", "[]\n"), ("yaml", "[]\n"), ("name", ""), ("table", ""), ("wide", "")):
        assert shown(form, []) == text


def test_control_characters_do_not_reach_a_terminal() -> None:
    text = shown("table", [row("lab:3240/1-1", "free", "say \x1b[2J\u202e")])
    assert text.endswith("say ?[2J?\n")


def test_rows_that_follow_a_table_have_its_widths() -> None:
    sizes = widths(ROWS, COLUMNS.table)
    later = table([row("x", "free", "available")], COLUMNS.table, head=False, sizes=sizes)
    assert later.index("free") == table(ROWS, COLUMNS.table).splitlines()[2].index("free")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "wanted"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_used_only_on_a_capable_terminal_without_no_color(
    stream: io.StringIO, environ: dict[str, str], wanted: bool
) -> None:
    assert wants_colour(stream, environ) is wanted


def test_a_terminal_has_colour_and_no_line_is_wider_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for columns, whole in ((200, True), (70, False)):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = Terminal()
        show(ROWS, COLUMNS, "table", out=out)
        assert "\x1b[32m" in out.getvalue(), "free is green"
        text = re.sub(r"\x1b\[[0-9]*m", "", out.getvalue())
        assert all(str(one["device"]) in text for one in ROWS)
        assert max(map(len, text.splitlines())) <= columns
        assert ("can be taken over" in text) is whole
    assert text.endswith("...\n")


def test_a_narrow_terminal_keeps_the_beginning_of_the_last_column() -> None:
    _head, _held, _free, silent = table(ROWS, COLUMNS.table, width=20).splitlines()
    assert silent.endswith("  holder ...")
    assert silent.split()[:3] == ["z:3240/2-1", "-", "silent"]


def test_colour_does_not_shift_columns() -> None:
    plain, painted = table(ROWS, COLUMNS.table), table(ROWS, COLUMNS.table, colour=True)
    for code in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"):
        painted = painted.replace(code, "")
    assert painted == plain


def test_ages_are_rounded_down_to_one_unit() -> None:
    seconds = (-5, 0.9, 119, 120, 7199, 7200, 172_799, 172_800)
    assert [age(one) for one in seconds] == ["0s", "0s", "119s", "2m", "119m", "2h", "47h", "2d"]
