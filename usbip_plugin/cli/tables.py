"""Rows of a command's output as a table, JSON, YAML or names, and times for people."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TextIO

Row = Mapping[str, str | int | list[str] | None]
"""One object in the output of a command, by key. The keys are stable."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one command's tables.

    name: the key that `-o name` prints; rows without it are left out.
    """

    table: tuple[str, ...]
    wide: tuple[str, ...]
    name: str


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


GREEN, YELLOW, RED = "32", "33", "31"
COLOURS = {
    "free": GREEN,
    "held": YELLOW,
    "silent": RED,
    "unavailable": RED,
    "ready": GREEN,
    "not ready": RED,
    "no plugin": RED,
    "loaded": GREEN,
    "missing": RED,
}
"""The SGR parameter (ECMA-48) for each cell that has a colour."""
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


def cell(value: str | int | list[str] | None) -> str:
    """Returns a value as the printable text of a cell: "-" for nothing, a list with commas."""
    text = ",".join(value) if isinstance(value, list) else "" if value is None else str(value)
    if not text.isprintable():
        text = "".join(character if character.isprintable() else "?" for character in text)
    return text or "-"


def widths(rows: Sequence[Row], columns: Sequence[str]) -> tuple[int, ...]:
    """Returns the characters of the widest cell of each column, heads included."""
    return tuple(max(len(head_of(column)), *(len(cell(row[column])) for row in rows), 0) for column in columns)


def head_of(column: str) -> str:
    return "RESOURCE" if column == "resources" else column.upper().replace("_", "-")


def table(
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    colour: bool = False,
    width: int | None = None,
    head: bool = True,
    sizes: Sequence[int] = (),
) -> str:
    """Returns the table, with each column as wide as its widest cell.

    width: characters of a line, which the last column is cut to fit; None for no limit.
    head: whether the names of the columns come first.
    sizes: least width of each column, as widths() returns it.
    """
    found = widths(rows, columns)
    sizes = [max(pair) for pair in zip(found, sizes or found, strict=True)]
    cells = [[head_of(column) for column in columns]] if head else []
    cells += [[cell(row[column]) for column in columns] for row in rows]
    room = max(MIN_REASON, width - sum(sizes[:-1]) - 2 * (len(sizes) - 1)) if width else sizes[-1]
    lines = []
    for *line, last in cells:
        padded = [text.ljust(size) for text, size in zip(line, sizes[:-1], strict=True)]
        painted = [paint(text, text.strip(), on=colour) for text in padded]
        lines.append("  ".join([*painted, last if len(last) <= room else f"{last[: room - 3]}..."]).rstrip())
    return "\n".join(lines)


def show(
    rows: Sequence[Row],
    columns: Columns,
    form: str,
    *,
    head: bool = True,
    sizes: Sequence[int] = (),
    out: TextIO | None = None,
) -> None:
    """Writes rows in one of parser.FORMATS. Cuts the table, but not the wide one, to the width of a terminal."""
    out = out or sys.stdout
    if form in ("json", "yaml"):
        text = structured([dict(row) for row in rows], form)
    elif form == "name":
        text = "\n".join(cell(row[columns.name]) for row in rows if row[columns.name] is not None)
    elif not rows:
        text = ""
    elif form == "wide":
        text = table(rows, columns.wide, colour=wants_colour(out), head=head)
    else:
        width = shutil.get_terminal_size().columns if out.isatty() else None
        text = table(rows, columns.table, colour=wants_colour(out), width=width, head=head, sizes=sizes)
    if text:
        print(text, file=out)
