"""Rows of a bench run with their targets, and the machine on which they were measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_KEYS = ("model name", "Hardware", "cpu model")


@dataclass(frozen=True, slots=True)
class Row:
    """A measured value. It meets its target if it is not above it. target: None for no target."""

    name: str
    value: float
    unit: str
    target: float | None = None
    samples: int = 1

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Skipped:
    """A measurement that is not possible here, with the reason."""

    name: str
    reason: str


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest value that is not below so many percent of all. Raises ValueError without values."""
    if not values:
        raise ValueError("nothing was measured")
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def p50_p99(name: str, milliseconds: Sequence[float], target_p99: float | None = None) -> list[Row]:
    """Returns a row of the median and a row of the 99th percentile."""
    count = len(milliseconds)
    return [
        Row(f"{name}, p50", percentile(milliseconds, 50), "ms", None, count),
        Row(f"{name}, p99", percentile(milliseconds, 99), "ms", target_p99, count),
    ]


def machine() -> dict[str, object]:
    """Returns the properties of this machine that influence the figures."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith(_KEYS)), platform.machine())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def document(rows: Sequence[Row], skipped: Sequence[Skipped]) -> dict[str, object]:
    """Returns the JSON document of a run."""
    return {
        "machine": machine(),
        "rows": [{**asdict(row), "met": row.met} for row in rows],
        "skipped": [asdict(one) for one in skipped],
    }


def line(row: Row) -> str:
    target = "" if row.target is None else f"<= {row.target:g}"
    verdict = {None: "", True: "yes", False: "NO"}[row.met]
    return f"{row.name:<90} {row.value:>9.1f} {row.unit:<5} {target:>9} {verdict:<4} n={row.samples}"
