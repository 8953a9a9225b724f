"""Draws the results of bench_scale.py and its model: docs/internals/performance/*.svg.

python -m bench.scale_plot bench-scale.json docs/internals/performance
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tests.rigs import scale_model as model
from usbip_plugin.usbip.poller import POLL_INTERVAL

NODES = (1, 2, 5, 10, 20, 50, 60, 100, 199, 200, 500, 1000, 2000, 4999, 5000)
STATUS = "patch nodes/status"

Point = dict[str, Any]


def charts(points: Sequence[Point]) -> Iterator[tuple[str, str]]:
    """Yields file name and SVG of each chart."""
    most = max(point["devices"] for point in points if point["agents"] == max(p["agents"] for p in points))
    by_nodes = [point for point in points if point["devices"] == most]
    fewest = min(point["agents"] for point in points)
    by_devices = [point for point in points if point["agents"] == fewest]

    def model_of(value: Callable[[int], float], name: str = "model") -> Series:
        return Series(name, [(n, value(n)) for n in NODES], line=True)

    def measured(
        value: Callable[[Point], float],
        across: str = "agents",
        which: Sequence[Point] = by_nodes,
        name: str = "measured",
    ) -> Series:
        return Series(name, [(point[across], value(point)) for point in which])

    writes = [
        measured(lambda p: p["holding_writes"] / p["holding_seconds"], "holders"),
        model_of(lambda n: model.rest_writes(model.Fleet(n, n, n))),
    ]
    yield "writes.svg", chart("API writes at rest", "nodes that hold something", "writes per second", writes)
    for file, subject, unit, series in (
        (
            "events",
            "Watch events",
            "events",
            [measured(lambda p: p["tenure_events"]), model_of(lambda n: model.tenure_events(model.Fleet(n, 1, 1)))],
        ),
        (
            "status",
            "Node status written",
            "writes",
            [
                measured(lambda p: p["tenure_requests"].get(STATUS, 0)),
                model_of(lambda n: model.tenure_patches(model.Fleet(n, 1, 1))),
            ],
        ),
        ("handover-cpu", "Processor time of the API server", "ms", [measured(lambda p: p["tenure_cpu_ms"])]),
    ):
        yield f"{file}.svg", chart(f"{subject} for one device that changes hands", "nodes", unit, series)
    polls = [
        measured(lambda p: p["polls_s"]),
        model_of(model.server_polls),
        model_of(lambda n: n / POLL_INTERVAL, f"every node every {POLL_INTERVAL:g} s"),
    ]
    yield "polls.svg", chart("DEVLIST requests to one server", "nodes", "requests per second", polls)
    loads = {"without us": "without", "nothing held": "idle", "half of the nodes hold a device": "holding"}
    for name, across, which, key in (
        ("nodes", "nodes", by_nodes, "agents"),
        ("devices", "devices (10 nodes)", by_devices, "devices"),
    ):
        cpu = [measured(lambda p, load=load: p[f"{load}_cpu"], key, which, title) for title, load in loads.items()]  # type: ignore[misc]
        title = f"Processor time of the API server at rest, by {name}"
        yield f"cpu-{name}.svg", chart(title, across, "ms per second", cpu, log=False)
        memory = [
            measured(lambda p: p["without_memory"], key, which, "without us"),
            measured(lambda p: p["holding_memory"], key, which, "with us"),
        ]
        yield f"memory-{name}.svg", chart(f"Memory of the API server, by {name}", across, "MiB", memory, log=False)


WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 30, 34, 74
COLOURS = ("#1f6feb", "#c2410c", "#15803d", "#7c3aed")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:14px;font-weight:600}"
    ".grid{stroke:#d0d7de;stroke-width:1}"
)


@dataclass(frozen=True)
class Series:
    """A series of points (x, y) with x above 0, drawn as a line or as dots. y of 0 is at the lower edge."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = False


@dataclass(frozen=True)
class _Axis:
    """An axis from start to end, in pixels. The first and the last of its ticks are at its ends."""

    ticks: Sequence[float]
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            value, low, high = (math.log10(max(number, low)) for number in (value, low, high))
        part = (value - low) / (high - low)
        return self.start + min(1.0, max(0.0, part)) * (self.end - self.start)


def _decades(values: Iterable[float], start: float, end: float) -> _Axis:
    above = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
    return _Axis([10.0**n for n in range(low, max(high, low + 1) + 1)], start, end, log=True)


def _even(values: Iterable[float], start: float, end: float) -> _Axis:
    most = max(values, default=1.0) or 1.0
    step: float = 10.0 ** math.floor(math.log10(most))
    while most / step < 3:
        step /= 2
    return _Axis([n * step for n in range(math.ceil(most / step) + 1)], start, end, log=False)


def chart(title: str, across: str, up: str, series: Sequence[Series], *, log: bool = True) -> str:
    """Returns an SVG file. across, up: labels of the axes. log: the y axis is logarithmic."""
    points = [point for one in series for point in one.points]
    x = _decades((x for x, _ in points), LEFT, WIDTH - RIGHT)
    y = (_decades if log else _even)((y for _, y in points), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 20, title, "title"),
        *_grid(x, y),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 34, across, anchor="middle"),
        f'<g transform="rotate(-90 14 {(TOP + HEIGHT - BOTTOM) / 2:g})">',
        _text(14, (TOP + HEIGHT - BOTTOM) / 2, up, anchor="middle"),
        "</g>",
    ]
    legend = float(LEFT)
    for one, colour in zip(series, COLOURS, strict=False):
        parts += _marks(one, colour, x, y)
        parts += _sample(one, colour, legend)
        legend += 34 + 6.6 * len(one.name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(x: _Axis, y: _Axis) -> Iterable[str]:
    for tick in x.ticks:
        at = x.place(tick)
        yield f'<line class="grid" x1="{at:g}" x2="{at:g}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield _text(at, HEIGHT - BOTTOM + 16, f"{tick:,g}", anchor="middle")
    for tick in y.ticks:
        at = y.place(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:g}" y2="{at:g}"/>'
        yield _text(LEFT - 6, at + 4, f"{tick:,g}", anchor="end")


def _marks(one: Series, colour: str, x: _Axis, y: _Axis) -> Iterable[str]:
    places = [(x.place(a), y.place(b)) for a, b in one.points]
    if one.line:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        yield f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>'
        return
    for a, b in places:
        yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>'


def _sample(one: Series, colour: str, at: float) -> Iterable[str]:
    height = HEIGHT - 14
    if one.line:
        yield f'<line x1="{at:g}" x2="{at + 18:g}" y1="{height - 4}" y2="{height - 4}" stroke="{colour}"/>'
    else:
        yield f'<circle cx="{at + 9:g}" cy="{height - 4}" r="4" fill="{colour}"/>'
    yield _text(at + 24, height, one.name)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text{css} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    for name, text in charts(json.loads(options.json.read_text(encoding="utf-8"))["points"]):
        (options.directory / name).write_text(text, encoding="utf-8")
        print(options.directory / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
