"""Draws the results of bench_scale.py and its model: docs/internals/performance/*.svg.

python -m bench.scale_plot bench-scale.json docs/internals/performance
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.svg_chart import Series, chart
from tests.rigs import scale_model as model
from usbip_plugin.usbip.poller import POLL_INTERVAL

NODES = (1, 2, 5, 10, 20, 50, 60, 100, 199, 200, 500, 1000, 2000, 4999, 5000)
STATUS = "patch nodes/status"

Point = dict[str, Any]


def _line(name: str, value: Callable[[int], float], nodes: Sequence[int] = NODES) -> Series:
    return Series(name, [(n, value(n)) for n in nodes], line=True)


def _dots(name: str, points: Sequence[Point], across: str, value: Callable[[Point], float]) -> Series:
    return Series(name, [(point[across], value(point)) for point in points])


def charts(points: Sequence[Point]) -> Iterator[tuple[str, str]]:
    """Yields file name and SVG of each chart."""
    most = max(point["devices"] for point in points if point["agents"] == max(p["agents"] for p in points))
    by_nodes = [point for point in points if point["devices"] == most]
    fewest = min(point["agents"] for point in points)
    by_devices = [point for point in points if point["agents"] == fewest]
    nodes, devices = "nodes", "devices (10 nodes)"

    yield (
        "writes.svg",
        chart(
            "API writes at rest",
            "nodes that hold something",
            "writes per second",
            [
                _dots("measured", by_nodes, "holders", lambda p: p["holding_writes"] / p["holding_seconds"]),
                _line("model", lambda n: model.rest_writes(model.Fleet(n, n, n))),
            ],
        ),
    )
    yield (
        "events.svg",
        chart(
            "Watch events for one device that changes hands",
            nodes,
            "events",
            [
                _dots("measured", by_nodes, "agents", lambda p: p["tenure_events"]),
                _line("model", lambda n: model.tenure_events(model.Fleet(n, 1, 1))),
            ],
        ),
    )
    yield (
        "status.svg",
        chart(
            "Node status written for one device that changes hands",
            nodes,
            "writes",
            [
                _dots("measured", by_nodes, "agents", lambda p: p["tenure_requests"].get(STATUS, 0)),
                _line("model", lambda n: model.tenure_patches(model.Fleet(n, 1, 1))),
            ],
        ),
    )
    yield (
        "polls.svg",
        chart(
            "DEVLIST requests to one server",
            nodes,
            "requests per second",
            [
                _dots("measured", by_nodes, "agents", lambda p: p["polls_s"]),
                _line("model", model.server_polls),
                _line(f"every node every {POLL_INTERVAL:g} s", lambda n: n / POLL_INTERVAL),
            ],
        ),
    )
    for name, across, which, key in (("nodes", nodes, by_nodes, "agents"), ("devices", devices, by_devices, "devices")):
        yield (
            f"cpu-{name}.svg",
            chart(
                f"Processor time of the API server at rest, by {name}",
                across,
                "ms per second",
                [
                    _dots("without us", which, key, lambda p: p["without_cpu"]),
                    _dots("nothing held", which, key, lambda p: p["idle_cpu"]),
                    _dots("half of the nodes hold a device", which, key, lambda p: p["holding_cpu"]),
                ],
                log=False,
            ),
        )
        yield (
            f"memory-{name}.svg",
            chart(
                f"Memory of the API server, by {name}",
                across,
                "MiB",
                [
                    _dots("without us", which, key, lambda p: p["without_memory"]),
                    _dots("with us", which, key, lambda p: p["holding_memory"]),
                ],
                log=False,
            ),
        )
    yield (
        "handover-cpu.svg",
        chart(
            "Processor time of the API server for one device that changes hands",
            nodes,
            "ms",
            [_dots("measured", by_nodes, "agents", lambda p: p["tenure_cpu_ms"])],
        ),
    )


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
