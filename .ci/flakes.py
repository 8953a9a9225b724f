"""flakes.py LEDGER [--above PERCENT]: how often each test failed on a tree on which its section also passed.

The ledger is what sections.sh writes, one line for each section that was run: time, tree, section, verdict, wall
seconds, processor seconds, load average, calibration, failed tests, separated by tabs. A test above one percent is a
bug to be found, not a run to be repeated.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FIELDS = 9


@dataclass(frozen=True)
class SectionRun:
    """One line of the ledger."""

    tree: str
    section: str
    passed: bool
    failed_tests: tuple[str, ...]


@dataclass(frozen=True)
class Flake:
    """A test, or a section that names none, with its failures on trees on which the section also passed."""

    name: str
    failures: int
    runs: int

    @property
    def percent(self) -> float:
        return 100 * self.failures / self.runs


def parse(lines: Iterable[str]) -> list[SectionRun]:
    """Returns the runs that the lines of a ledger record; a line cut short by a crash is left out."""
    runs = []
    for line in lines:
        fields = line.rstrip("\n").split("\t")
        if len(fields) == FIELDS:
            _time, tree, section, verdict, *_, tests = fields
            runs.append(SectionRun(tree, section, verdict == "ok", tuple(filter(None, tests.split(",")))))
    return runs


def flakes(runs: Iterable[SectionRun]) -> list[Flake]:
    """Returns what failed on a tree on which it also passed, the most frequent first."""
    by_tree: dict[tuple[str, str], list[SectionRun]] = defaultdict(list)
    by_section: dict[str, int] = defaultdict(int)
    for run in runs:
        by_tree[run.section, run.tree].append(run)
        by_section[run.section] += 1
    failures: dict[tuple[str, str], int] = defaultdict(int)
    for (section, _tree), tries in by_tree.items():
        if any(run.passed for run in tries):
            for run in tries:
                if not run.passed:
                    for name in run.failed_tests or (section,):
                        failures[section, name] += 1
    found = [Flake(name, count, by_section[section]) for (section, name), count in failures.items()]
    return sorted(found, key=lambda one: (-one.percent, one.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--above", type=float, default=0.0, help="percent; default 0: all")
    arguments = parser.parse_args()
    lines = arguments.ledger.read_text(encoding="utf-8").splitlines() if arguments.ledger.exists() else []
    shown = [one for one in flakes(parse(lines)) if one.percent > arguments.above]
    print(f"{len(shown)} tests failed on a tree on which they also passed ({len(lines)} sections in the ledger)")
    for one in shown:
        print(f"{one.percent:5.1f} %  {one.failures} of {one.runs}  {one.name}")


if __name__ == "__main__":
    main()
