"""How results are written: tables, JSON, YAML, names; colour only on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TextIO

from usbip_plugin.cli.listing import COLUMNS, WIDE, Row

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
