"""Measurements of the test run, printed at its end and written to a file."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Figures:
    """Series of numbers by name. The name has the unit: seconds, MiB, pods."""

    series: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.series.setdefault(name, []).append(value)

    def lines(self) -> list[str]:
        rows = [f"{'':44}{'n':>4}{'p50':>9}{'max':>9}"]
        for name, values in sorted(self.series.items()):
            rows.append(f"{name:44}{len(values):4d}{statistics.median(values):9.2f}{max(values):9.2f}")
        return rows

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.series, indent=1) + "\n", encoding="utf-8")
