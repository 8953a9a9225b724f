"""`usbip-plugin devices`: a row for each device, and the tables and documents that show rows."""

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
"""What `devices` shows of one device; the keys are stable."""


@dataclass(frozen=True, slots=True)
class LockedDevice:
    """A device by its lock, as read at one moment. session: of its holder, None if there is none."""

    lease: Lease
    lock: Lock
    session: Lease | None

    @property
    def device(self) -> str | None:
        """SERVER/BUSID, None for a lock that does not say."""
        return f"{self.lock.server}/{self.lock.busid}" if self.lock.server and self.lock.busid else None


async def known_devices(store: LeaseStore) -> tuple[LockedDevice, ...]:
    """Every device that was ever locked, sorted by device. Raises the KubeError family.

    What others wrote into a lock is printable and short, see locks/record.py; a Lease under another name is no lock.
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
    """When the holder wrote last, by its own clock: the session, or the lock itself."""
    signs = [lease.renew_time for lease in (known.session, known.lease) if lease is not None and lease.renew_time]
    return max(signs, default=None)


def silent(known: LockedDevice, now: datetime) -> bool:
    """Whether the holder's last sign is older than its lock lasts, as far as clocks agree. For people only."""
    sign = last_sign(known)
    asked = [lease.duration_seconds or 0 for lease in (known.session, known.lease) if lease is not None]
    return bool(known.lock.holder) and (sign is None or now - sign > timedelta(seconds=max(0, *asked)))


def reason(known: LockedDevice, now: datetime) -> str:
    """In words, from the Leases alone."""
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
    """As the API has it: 2026-05-04T03:02:01Z, in UTC."""
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
"""What is painted, and the number that a terminal wants (ECMA-48)."""
STYLES = {"free": "green", "held": "yellow", "silent": "red"}


def wants_colour(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """On a terminal that can, unless NO_COLOR is set to anything (no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"


def paint(text: str, colour: str, *, on: bool) -> str:
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if on and colour in COLOURS else text


def structured(value: Any, form: str) -> str:
    """JSON or YAML."""
    if form == "json":
        return json.dumps(value, indent=2)
    import yaml  # noqa: PLC0415 - only here

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=False)
    return text.rstrip("\n")


def table(rows: Sequence[Row], columns: Sequence[str] = COLUMNS, *, colour: bool = False) -> str:
    """Columns padded to their widest cell; a sentence where there is nothing to show."""
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
    """The same on a terminal, where the extra `cli` is installed: long cells are folded to its width."""
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
