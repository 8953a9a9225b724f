"""tested_with.py LEDGER: adds the versions of passed runs to docs/tested-with.json, which the README's table shows.

The ledger is what .ci/sections.sh writes: for each section without failures, one line for each version that its tests
named (tests/rigs/tested_with.py): time, tree, section, ROW=VALUE, separated by tabs. Nothing else adds to the file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

FILE = Path(__file__).parent / "tested-with.json"
ROWS = {
    "kubernetes": "Kubernetes",
    "kind": "kind",
    "runtime": "Container runtime",
    "kernel": "Kernel with its `vhci_hcd`",
    "server": "USB/IP server",
    "python": "Python",
    "architecture": "Architecture",
}
"""Rows of the table: the names in the ledger, and their headings."""
FIELDS = 4

Results = Mapping[str, Mapping[str, Mapping[str, str]]]
"""{row: {value: {"section": ..., "date": ..., "tree": ...}}}: the last run of each value."""


def parse(ledger: Iterable[str]) -> Results:
    """Returns the last run of each value.

    A line that a crash cut short is left out. Raises ValueError for an unknown row.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for number, line in enumerate(ledger, 1):
        fields = line.rstrip("\n").split("\t")
        if len(fields) != FIELDS:
            continue
        time, tree, section, result = fields
        row, _, value = result.partition("=")
        if row not in ROWS:
            raise ValueError(f"line {number}: {row!r} is not a row of the table, expected one of {', '.join(ROWS)}")
        found.setdefault(row, {})[value] = {"section": section, "date": time.partition("T")[0], "tree": tree}
    return found


def merged(kept: Results, found: Results) -> Results:
    """Returns both, with the runs of `found` in place of those of `kept` with the same value."""
    both = {row: {**kept.get(row, {}), **found.get(row, {})} for row in ROWS}
    return {
        row: {value: values[value] for value in sorted(values, key=_natural)} for row, values in both.items() if values
    }


def table_rows(results: Results) -> list[tuple[str, str]]:
    """Returns heading and values of each row that has any."""
    return [(heading, ", ".join(results[row])) for row, heading in ROWS.items() if row in results]


def _natural(value: str) -> list[tuple[int, str]]:
    """Returns a key that sorts 1.9 before 1.31."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", value)]


def read(file: Path = FILE) -> Results:
    found: Results = json.loads(file.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ledger", type=Path, help="tested-with.tsv in the cache's directory ci")
    with parser.parse_args().ledger.open(encoding="utf-8") as lines:
        results = merged(read(), parse(lines))
    FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
