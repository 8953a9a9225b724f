"""figures.py NEW.json KEPT.json: compares the figures of a bench with those of the last one, then keeps the new ones.

Milliseconds of two machines say little. So each figure is divided by the kept one, and these ratios by their median,
which is how much slower or faster this machine is: what stands out changed more than the machine did.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

STANDS_OUT = 1.5


def figures(document: Mapping[str, object]) -> dict[str, float]:
    """Returns the value of each row of a bench's JSON by the row's name; zeros cannot be compared and are left out."""
    rows = document.get("rows")
    assert isinstance(rows, list)
    return {str(row["name"]): float(row["value"]) for row in rows if row["value"]}


def compared(new: Mapping[str, float], kept: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Returns the median ratio of all figures in both, and each figure's own ratio over that median."""
    ratios = {name: new[name] / kept[name] for name in new if name in kept}
    if not ratios:
        return 1.0, {}
    median = statistics.median(ratios.values())
    return median, {name: ratio / median for name, ratio in ratios.items()}


def main(new: Path, kept: Path) -> None:
    if kept.exists():
        documents = (json.loads(path.read_text(encoding="utf-8")) for path in (new, kept))
        median, ratios = compared(*map(figures, documents))
        print(f"{len(ratios)} figures compared with those kept; all of them together: x{median:.2f}")
        for name, ratio in sorted(ratios.items(), key=lambda one: -one[1]):
            if not 1 / STANDS_OUT < ratio < STANDS_OUT:
                print(f"x{ratio:5.2f}  {name}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(new, kept)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
