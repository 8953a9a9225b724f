"""Converts traces to JSON and to the rows of a waterfall diagram. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from usbip_plugin.observe.tracing import SpanRecord

WIDTH = 1000
"""Width of the time axis, in units of the drawing."""
GAP_WIDTH = 28
"""Units of the drawing for a gap, in which nothing happened: there may be hours between Allocate and release."""
GAP_SHARE = 0.5
"""A pause is a gap if it is longer than this share of all the time in which something happened."""
LEAST_SHARE = 0.25
"""A phase is drawn at least as wide as this share of the longest phase, so that a quick Allocate stays readable."""
LEAST_WIDTH = 4
"""Least width of a bar, in units of the drawing."""
MAX_DEPTH = 8
"""Deepest level that is drawn. Spans below it are drawn at this level."""


@dataclass(frozen=True, slots=True)
class Bar:
    """The bar of one span in a waterfall.

    depth: how many of its ancestors are in the trace, at most MAX_DEPTH.
    x, width: within 0..WIDTH.
    after: seconds from the start of the trace to the start of the span.
    node: index into Waterfall.nodes.
    """

    span: SpanRecord
    depth: int
    x: float
    width: float
    after: float
    node: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A pause that a waterfall draws shortened, at x within 0..WIDTH. seconds: how long it was."""

    x: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The layout of a trace.

    bars: a span is below its parent; spans with one parent are in the order in which they start.
    gaps: the pauses that are drawn shortened.
    nodes: in the order of their first span.
    """

    bars: tuple[Bar, ...]
    gaps: tuple[Gap, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A trace in one line.

    name: of the root span.
    start: when the first span starts.
    seconds: from the first start to the last end.
    nodes: in the order of their first span.
    device: SERVER/BUSID, else the name or the ID of the device; None if no span is about a device.
    error: the first error; None if no span failed.
    failed: whether the root span itself failed.
    """

    trace_id: str
    name: str
    start: datetime
    seconds: float
    span_count: int
    nodes: tuple[str, ...]
    device: str | None
    error: str | None
    failed: bool

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "start": self.start.isoformat(timespec="milliseconds")}


def summary(spans: Sequence[SpanRecord]) -> Summary:
    """Returns the summary of one trace, which must have at least one span."""
    ordered = _ordered(spans)
    first = ordered[0]
    known = {span.span_id for span in ordered}
    root = next((span for span in ordered if span.parent_id not in known), first)
    begin, end = first.start_ns, max(span.end_ns for span in ordered)
    errors = [span.error or span.name + " failed" for span in ordered if span.error is not None]
    return Summary(
        trace_id=first.trace_id,
        name=root.name,
        start=datetime.fromtimestamp(begin / 1e9, UTC),
        seconds=max(0, end - begin) / 1e9,
        span_count=len(ordered),
        nodes=_nodes(ordered),
        device=next(_devices(ordered), None),
        error=errors[0] if errors else None,
        failed=root.error is not None,
    )


def _devices(spans: Sequence[SpanRecord]) -> Iterator[str]:
    """Yields the names of the device that the spans are about, the best first: SERVER/BUSID, then name, then ID."""
    for span in spans:
        if {"usbip.server", "usbip.busid"} <= span.attributes.keys():
            yield f"{span.attributes['usbip.server']}/{span.attributes['usbip.busid']}"
    for name in ("usbip.device", "usbip.device.id"):
        yield from (span.attributes[name] for span in spans if name in span.attributes)


def span_json(span: SpanRecord) -> dict[str, Any]:
    return {
        "name": span.name,
        "node": span.node,
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "start": datetime.fromtimestamp(span.start_ns / 1e9, UTC).isoformat(timespec="microseconds"),
        "seconds": span.seconds,
        "attributes": dict(span.attributes),
        "error": span.error,
        "links": list(span.links),
    }


def lay_out(spans: Sequence[SpanRecord]) -> Waterfall:
    """Lays out every span of one trace as a bar. A span whose parent is not in the trace has depth 0."""
    ordered = _ordered(spans)
    nodes = _nodes(ordered)
    scale = Scale.over((span.start_ns, span.end_ns) for span in ordered)
    bars = []
    for span, depth in _by_tree(ordered):
        x, end = scale.x(span.start_ns), scale.x(max(span.start_ns, span.end_ns))
        width = max(LEAST_WIDTH, end - x)
        after = (span.start_ns - ordered[0].start_ns) / 1e9
        bars.append(Bar(span, min(depth, MAX_DEPTH), min(x, WIDTH - width), width, after, nodes.index(span.node)))
    return Waterfall(tuple(bars), scale.gaps, nodes)


@dataclass(frozen=True, slots=True)
class Scale:
    """Scale from times to places on the axis. Linear within each phase; the gaps between phases are shortened."""

    phases: tuple[tuple[int, int, float, float], ...]
    """For each phase: its start and end in nanoseconds, then in units of the drawing."""
    gaps: tuple[Gap, ...]

    @classmethod
    def over(cls, intervals: Iterable[tuple[int, int]]) -> Scale:
        """Returns the scale that fits all intervals (nanoseconds), of which there must be at least one."""
        busy = _merged(intervals, 0)
        total = sum(end - begin for begin, end in busy)
        merged = _merged(busy, int(total * GAP_SHARE))
        longest = max(*(end - begin for begin, end in merged), 1)
        weights = [max(end - begin, longest * LEAST_SHARE) for begin, end in merged]
        room = WIDTH - GAP_WIDTH * (len(merged) - 1)
        if room < WIDTH / 2:  # too many phases: gaps would take more than half of the axis
            whole = (merged[0][0], merged[-1][1])
            return cls(((*whole, 0.0, float(WIDTH)),), ())
        phases, gaps, x = [], [], 0.0
        for index, ((begin, end), weight) in enumerate(zip(merged, weights, strict=True)):
            if index:
                gaps.append(Gap(x, (begin - merged[index - 1][1]) / 1e9))
                x += GAP_WIDTH
            width = room * weight / sum(weights)
            phases.append((begin, end, x, x + width))
            x += width
        return cls(tuple(phases), tuple(gaps))

    def x(self, at: int) -> float:
        """Returns the place of a time (nanoseconds), within 0..WIDTH."""
        for begin, end, left, right in self.phases:
            if at <= end:
                return left + (right - left) * max(0, at - begin) / max(end - begin, 1)
        return float(WIDTH)


def _merged(intervals: Iterable[tuple[int, int]], pause: int) -> list[tuple[int, int]]:
    """Returns the intervals in order. Joins those that overlap or are at most `pause` nanoseconds apart."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((begin, max(begin, end)) for begin, end in intervals):
        if merged and begin - merged[-1][1] <= pause:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _ordered(spans: Sequence[SpanRecord]) -> list[SpanRecord]:
    return sorted({span.span_id: span for span in spans}.values(), key=lambda span: (span.start_ns, span.span_id))


def _nodes(spans: Iterable[SpanRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(span.node for span in spans))


def _by_tree(ordered: Sequence[SpanRecord]) -> list[tuple[SpanRecord, int]]:
    known = {span.span_id for span in ordered}
    children: dict[str | None, list[SpanRecord]] = {}
    for span in ordered:
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else None
        children.setdefault(parent, []).append(span)
    found: list[tuple[SpanRecord, int]] = []
    stack = [(span, 0) for span in reversed(children.get(None, []))]
    while stack:
        span, depth = stack.pop()
        found.append((span, depth))
        stack.extend((child, depth + 1) for child in reversed(children.pop(span.span_id, [])))
    reached = {span.span_id for span, _depth in found}
    # spans that are each other's ancestors: only a damaged trace has them, and none of them may be lost
    return found + [(span, 0) for span in ordered if span.span_id not in reached]


def duration(seconds: float) -> str:
    """Returns a duration in milliseconds below one second, else in seconds: "12.3 ms", "1.25 s"."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
