"""The rows of `usbip-plugin devices`, one for each device, and their output as a table, JSON or YAML."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.util import find_spec
from typing import Any, TextIO

from usbip_plugin.locks.record import (
    LOCK_LABELS,
    SESSION_LABELS,
    Lease,
    LeaseStore,
    is_lock_name,
    lock_of,
    session_name,
)
from usbip_plugin.model import Lock

COLUMNS = ("device", "state", "holder", "pod", "since", "epoch", "reason")
WIDE = (*COLUMNS, "id", "usb_id", "serial", "port")

Row = Mapping[str, str | int | None]
"""The output of `devices` for one device, by key. The keys are stable."""


@dataclass(frozen=True, slots=True)
class LockedDevice:
    """A device that has or had a lock, as its Leases were read.

    lease: the Lease of the lock.
    lock: the same Lease, parsed.
    session: the session Lease of the holder, None if there is none.
    """

    lease: Lease
    lock: Lock
    session: Lease | None

    @property
    def device(self) -> str | None:
        """Returns SERVER/BUSID, or None if the lock does not name them."""
        return f"{self.lock.server}/{self.lock.busid}" if self.lock.server and self.lock.busid else None


async def known_devices(store: LeaseStore) -> tuple[LockedDevice, ...]:
    """Returns every device that was ever locked, sorted by device. Raises KubeError if the Leases cannot be read.

    All text from the locks is printable and short, whoever wrote it, see locks/record.py. Leases whose name is not
    that of a lock are left out.
    """
    locks = await store.list(LOCK_LABELS)
    sessions = {lease.name: lease for lease in (await store.list(SESSION_LABELS)).items}
    found = [
        LockedDevice(lease, lock_of(lease), sessions.get(session_name(lease.holder)) if lease.holder else None)
        for lease in locks.items
        if is_lock_name(lease.name)
    ]
    return tuple(sorted(found, key=lambda known: (str(known.device), known.lock.device_id)))


def last_sign(known: LockedDevice) -> datetime | None:
    """Returns when the holder last wrote its session or the lock, by the holder's clock. None if neither has a time."""
    signs = [lease.renew_time for lease in (known.session, known.lease) if lease is not None and lease.renew_time]
    return max(signs, default=None)


def silent(known: LockedDevice, now: datetime) -> bool:
    """Returns whether the lock has a holder that has not written for longer than the lock lasts, or never.

    The lock lasts for the longer of the durations of its Lease and the holder's session. The result is for people
    only: it is right only as far as the clocks of holder and reader agree.
    """
    sign = last_sign(known)
    asked = [lease.duration_seconds or 0 for lease in (known.session, known.lease) if lease is not None]
    return bool(known.lock.holder) and (sign is None or now - sign > timedelta(seconds=max(0, *asked)))


def reason(known: LockedDevice, now: datetime) -> str:
    """Returns in words why the device is free or not, from its Leases alone."""
    lock = known.lock
    if not lock.holder:
        return "nobody holds it"
    if silent(known, now):
        sign = last_sign(known)
        return "holder silent" + (f" since {stamp(sign)}" if sign is not None else "") + "; may be taken over"
    if lock.port is None:
        return "being allocated or let go"
    return "in use"


def stamp(moment: datetime) -> str:
    """Returns a moment in UTC as the Kubernetes API writes it: 2026-05-04T03:02:01Z."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def row(known: LockedDevice, now: datetime) -> Row:
    lock = known.lock
    sign = last_sign(known) if lock.holder else None
    return {
        "device": known.device,
        "id": lock.device_id,
        "server": lock.server,
        "busid": lock.busid,
        "usb_id": str(lock.usb_id) if lock.usb_id is not None else None,
        "serial": lock.serial or None,
        "state": "free" if not lock.holder else "silent" if silent(known, now) else "held",
        "holder": lock.holder or None,
        "pod": str(lock.pod) if lock.holder and lock.pod is not None else None,
        "port": lock.port if lock.holder else None,
        "since": stamp(lock.acquired_at) if lock.holder and lock.acquired_at else None,
        "last_sign": stamp(sign) if sign is not None else None,
        "epoch": lock.epoch,
        "reason": reason(known, now),
        "in_place_of": lock.in_place_of if lock.holder else None,
    }


def rows(devices: Sequence[LockedDevice], now: datetime) -> list[Row]:
    return [row(known, now) for known in devices]


COLOURS = {"free": "32", "held": "33", "silent": "31", "yes": "32", "no": "31", "bold": "1", "dim": "2"}
"""The SGR parameter (ECMA-48) for each painted word or style."""
STYLES = {"free": "green", "held": "yellow", "silent": "red"}
"""The style of rich for each painted state."""


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

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=False)
    return text.rstrip("\n")


def table(rows: Sequence[Row], columns: Sequence[str] = COLUMNS, *, colour: bool = False) -> str:
    """Returns the table, with each column as wide as its widest cell, or a sentence if there are no rows."""
    if not rows:
        return "no device has been locked yet in this namespace"
    cells = [[_head(column) for column in columns]]
    cells += [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        painted = [paint(text, text.strip(), on=colour) if text.strip() in STYLES else text for text in padded]
        lines.append("  ".join(painted).rstrip())
    return "\n".join(lines)


def show_devices(rows: Sequence[Row], form: str, out: TextIO | None = None) -> None:
    """Writes the devices in one of parser.FORMATS."""
    out = out or sys.stdout
    columns = WIDE if form == "wide" else COLUMNS
    colour = wants_colour(out)
    if form in ("json", "yaml"):
        text = structured([dict(row) for row in rows], form)
    elif form == "name":
        text = "\n".join(str(row["id"]) for row in rows)
    elif rows and colour and find_spec("rich") is not None:
        _rich_table(rows, columns, out)
        return
    else:
        text = table(rows, columns, colour=colour)
    if text:
        print(text, file=out)


def _rich_table(rows: Sequence[Row], columns: Sequence[str], out: TextIO) -> None:
    """Writes the table to a terminal with rich, which the extra `cli` installs. Folds long cells to its width."""
    from rich.console import Console  # noqa: PLC0415 - an extra
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(_head(column), overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(row[column]), style=STYLES.get(_cell(row[column]), "")) for column in columns))
    Console(file=out, highlight=False).print(made)


def _head(column: str) -> str:
    return column.upper().replace("_", "-")


def _cell(value: str | int | None) -> str:
    return "-" if value is None else str(value)
