"""The rows of `usbip-plugin devices`, one for each device, and their output as a table, JSON or YAML."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TextIO

from usbip_plugin.locks.locked_devices import LockedDevice, last_sign, silent
from usbip_plugin.model import Reason

COLUMNS = ("device", "state", "holder", "pod", "age", "reason")
WIDE = (*COLUMNS, "since", "epoch", "id", "usb_id", "serial", "port")

Row = Mapping[str, str | int | None]
"""The output of `devices` for one device, by key. The keys are stable."""


def reason(known: LockedDevice, now: datetime) -> tuple[Reason, str]:
    """Returns why the device is available or not, from its Leases alone: the holder's reason, and a sentence."""
    lock = known.lock
    if not lock.holder:
        return Reason.FREE, "no holder"
    if silent(known, now):
        sign = last_sign(known)
        since = f" since {stamp(sign)}" if sign is not None else ""
        return Reason.HOLDER_EXPIRED, f"holder silent{since}; can be taken over"
    if lock.port is None:
        return Reason.IN_PROGRESS, "being attached or detached"
    return Reason.ATTACHED, "in use"


def stamp(moment: datetime) -> str:
    """Returns a moment in UTC as the Kubernetes API writes it: 2026-05-04T03:02:01Z."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def ago(now: datetime, then: datetime) -> str:
    """Returns how long ago a moment was, such as "3m ago"; "just now" if it is in the future by this clock."""
    return f"{age((now - then).total_seconds())} ago" if now > then else "just now"


def age(seconds: float) -> str:
    """Returns a number of seconds in the largest unit that fits, rounded down: "42s", "3m", "5h", "2d"."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{int(max(0.0, seconds) // divisor)}{unit}"
    return f"{int(seconds // 86_400)}d"


def rows(devices: Sequence[LockedDevice], now: datetime) -> list[Row]:
    return [_row(known, now) for known in devices]


def _row(known: LockedDevice, now: datetime) -> Row:
    lock = known.lock
    sign = last_sign(known) if lock.holder else None
    code, sentence = reason(known, now)
    return {
        "device": known.device,
        "id": lock.device_id,
        "server": lock.server,
        "busid": lock.busid,
        "usb_id": str(lock.usb_id) if lock.usb_id is not None else None,
        "serial": lock.serial or None,
        "state": "free" if not lock.holder else "silent" if code is Reason.HOLDER_EXPIRED else "held",
        "holder": lock.holder or None,
        "pod": str(lock.pod) if lock.holder and lock.pod is not None else None,
        "port": lock.port if lock.holder else None,
        "since": stamp(lock.acquired_at) if lock.holder and lock.acquired_at else None,
        "age": age((now - lock.acquired_at).total_seconds()) if lock.holder and lock.acquired_at else None,
        "last_sign": stamp(sign) if sign is not None else None,
        "epoch": lock.epoch,
        "reason": sentence,
        "reason_code": code.code,
        "in_place_of": lock.in_place_of if lock.holder else None,
    }


COLOURS = {"free": "32", "held": "33", "silent": "31"}
"""The SGR parameter (ECMA-48) for each state."""
MIN_REASON = 10
"""Characters of the last column that a table keeps, however narrow the terminal is."""


def wants_colour(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the stream is a terminal with colours. NO_COLOR, set to anything, forbids them (no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"


def paint(text: str, colour: str, *, on: bool) -> str:
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if on and colour in COLOURS else text


def structured(value: Any, form: str) -> str:
    """Returns a value as JSON or YAML text. form: "json" or "yaml"."""
    if form == "json":
        return json.dumps(value, indent=2)
    import yaml  # noqa: PLC0415 - only here

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=False)).rstrip("\n")


def table(
    rows: Sequence[Row], columns: Sequence[str] = COLUMNS, *, colour: bool = False, width: int | None = None
) -> str:
    """Returns the table, with each column as wide as its widest cell, or a sentence if there are no rows.

    width: characters of a line, which the last column is cut to fit; None for no limit.
    """
    if not rows:
        return "No devices found. A device is listed after its first allocation."
    cells = [[column.upper().replace("_", "-") for column in columns]]
    cells += [["-" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    room = max(MIN_REASON, width - sum(widths[:-1]) - 2 * (len(widths) - 1)) if width else widths[-1]
    lines = []
    for *line, last in cells:
        padded = [text.ljust(size) for text, size in zip(line, widths[:-1], strict=True)]
        painted = [paint(text, text.strip(), on=colour) for text in padded]
        lines.append("  ".join([*painted, last if len(last) <= room else f"{last[: room - 3]}..."]).rstrip())
    return "\n".join(lines)


def show_devices(rows: Sequence[Row], form: str, out: TextIO | None = None) -> None:
    """Writes the devices in one of parser.FORMATS. Cuts the table, but not the wide one, to the width of a terminal."""
    out = out or sys.stdout
    if form in ("json", "yaml"):
        text = structured([dict(row) for row in rows], form)
    elif form == "name":
        text = "\n".join(str(row["id"]) for row in rows)
    elif form == "wide":
        text = table(rows, WIDE, colour=wants_colour(out))
    else:
        width = shutil.get_terminal_size().columns if out.isatty() else None
        text = table(rows, colour=wants_colour(out), width=width)
    if text:
        print(text, file=out)
