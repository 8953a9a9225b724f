"""`usbip-plugin devices`: the rows made of the Leases, in each output form."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from usbip_plugin.cli.devices import COLUMNS, WIDE, age, rows, show_devices, table, wants_colour
from usbip_plugin.clock import SystemClock
from usbip_plugin.locks.locked_devices import known_devices
from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS, Lease
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_sim.leases import MemoryBackend, MemoryLeases

HELD, FREE, SILENT = (
    DeviceKey(ServerKey(host, 3240), busid) for host, busid in (("lab", "1-1"), ("attic", "1-2"), ("z", "2-1"))
)
TAKEN = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
NOW = TAKEN + timedelta(hours=1)
ELSEWHERE = DeviceKey(ServerKey("lab", 3240), "1-9")
POD = {"usbip.dev/pod": "default/reader/uid-1", "usbip.dev/vhci-port": "3", "usbip.dev/in-place-of": ELSEWHERE.id}


def notes(key: DeviceKey) -> dict[str, str]:
    return {"usbip.dev/server": str(key.server), "usbip.dev/busid": key.busid, "usbip.dev/usb-id": "0951:1666"}


def store() -> MemoryLeases:
    backend = MemoryBackend()
    for key, holder, epoch in ((HELD, "node-a", 7), (FREE, "", 2), (SILENT, "node-b", 1)):
        backend.create(Lease(key.id, holder, 40, TAKEN, TAKEN, epoch, annotations=notes(key) | POD, labels=LOCK_LABELS))
    for node, beat in (("node-a", NOW - timedelta(seconds=5)), ("node-b", NOW - timedelta(seconds=41))):
        backend.create(Lease(f"usbip-node-{node}", node, 40, TAKEN, beat, labels=SESSION_LABELS))
    return MemoryLeases(backend, SystemClock())


async def shown(form: str) -> str:
    out = io.StringIO()
    show_devices(rows(await known_devices(store()), NOW), form, out)
    return out.getvalue()


async def test_each_lock_has_a_row_and_sessions_have_none() -> None:
    free, held, silent = rows(await known_devices(store()), NOW)
    assert held == {
        "device": "lab:3240/1-1",
        "id": HELD.id,
        "server": "lab:3240",
        "busid": "1-1",
        "usb_id": "0951:1666",
        "serial": None,
        "state": "held",
        "holder": "node-a",
        "pod": "default/reader",
        "port": 3,
        "since": "2026-05-04T03:02:01Z",
        "age": "60m",
        "last_sign": "2026-05-04T04:01:56Z",
        "epoch": 7,
        "reason": "in use",
        "reason_code": "attached",
        "in_place_of": ELSEWHERE.id,
    }
    assert (free["device"], free["state"]) == ("attic:3240/1-2", "free")
    assert (free["reason"], free["reason_code"]) == ("no holder", "free")
    assert [free[key] for key in ("holder", "pod", "port", "since", "age", "last_sign", "in_place_of")] == [None] * 7
    assert silent["state"] == "silent"
    assert silent["reason"] == "holder silent since 2026-05-04T04:01:20Z; can be taken over"
    assert silent["reason_code"] == "holder_expired"
    assert free["epoch"] == 2


async def test_the_table_has_aligned_columns_for_holder_and_pod() -> None:
    head, free, held, _silent = (await shown("table")).splitlines()
    assert head.split() == ["DEVICE", "STATE", "HOLDER", "POD", "AGE", "REASON"]
    assert free.split()[:5] == ["attic:3240/1-2", "free", "-", "-", "-"]
    assert held[head.index("POD") :].startswith("default/reader")


async def test_wide_has_the_rows_of_the_table_and_more_columns() -> None:
    head, _free, held, _silent = (await shown("wide")).splitlines()
    assert head.split()[len(COLUMNS) :] == ["SINCE", "EPOCH", "ID", "USB-ID", "SERIAL", "PORT"]
    assert held.split()[-4:] == [HELD.id, "0951:1666", "-", "3"]


async def test_json_and_yaml_have_all_rows_and_name_has_the_ids() -> None:
    whole = rows(await known_devices(store()), NOW)
    assert json.loads(await shown("json")) == yaml.safe_load(await shown("yaml")) == whole
    assert (await shown("name")).split() == [row["id"] for row in whole]


def test_without_devices_the_table_is_a_sentence_and_the_other_forms_are_empty() -> None:
    assert "No devices found." in table([])
    for form, text in (("json", "[]\n"), ("yaml", "[]\n"), ("name", "")):
        out = io.StringIO()
        show_devices([], form, out)
        assert out.getvalue() == text


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


async def test_a_terminal_has_colour_and_no_line_is_wider_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    devices = rows(await known_devices(store()), NOW)
    for columns, whole in ((200, True), (80, False)):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = Terminal()
        show_devices(devices, "table", out)
        assert "\x1b[32m" in out.getvalue(), "free is green"
        text = re.sub(r"\x1b\[[0-9]*m", "", out.getvalue())
        assert all(str(row["device"]) in text for row in devices)
        assert max(map(len, text.splitlines())) <= columns
        assert ("can be taken over" in text) is whole
    assert text.endswith("  holder silent since 2026...\n")


async def test_a_narrow_terminal_keeps_the_beginning_of_the_reason() -> None:
    devices = rows(await known_devices(store()), NOW)
    _head, _free, _held, silent = table(devices, width=20).splitlines()
    assert silent.endswith("  holder ...")
    assert silent.split()[:4] == ["z:3240/2-1", "silent", "node-b", "default/reader"]


def test_colour_does_not_shift_columns() -> None:
    devices = [dict.fromkeys(WIDE, "x") | {"state": state} for state in ("free", "held", "other")]
    plain, painted = table(devices), table(devices, colour=True)
    for code in ("\x1b[32m", "\x1b[33m", "\x1b[0m"):
        painted = painted.replace(code, "")
    assert painted == plain


def test_ages_are_rounded_down_to_one_unit() -> None:
    seconds = (-5, 0.9, 119, 120, 7199, 7200, 172_799, 172_800)
    assert [age(one) for one in seconds] == ["0s", "0s", "119s", "2m", "119m", "2h", "47h", "2d"]
