"""Converts traces to JSON and to the rows of a waterfall diagram. Pure."""

from __future__ import annotations

import itertools
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
LEAST_GAP_NS = 200_000_000
"""Nanoseconds of the shortest gap. A shorter pause may be work of a span that has no span of its own."""
LEAST_SHARE = 0.25
"""A phase is drawn at least as wide as this share of the longest phase, so that a quick Allocate stays readable."""
MAX_PHASES = 12
"""Phases that are drawn. If there are more, the shortest gaps are drawn at full length."""
LEAST_WIDTH = 4
"""Least width of a bar, in units of the drawing."""
TICK_ROOM, LAST_TICK = 160, 850
"""Least distance of two ticks, and the last place of one, in units of the drawing: a label of ten characters fits."""
HOLD, RELEASE = "Allocate", "release"
"""Names of the spans that begin and end the hold of a device."""
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
class Tick:
    """A labelled place on the time axis. after: seconds since the start of the trace."""

    x: float
    after: float


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The layout of a trace.

    bars: a span is below its parent; spans with one parent are in the order in which they start.
    gaps: the pauses that are drawn shortened.
    nodes: in the order of their first span.
    ticks: from left to right.
    """

    bars: tuple[Bar, ...]
    gaps: tuple[Gap, ...]
    nodes: tuple[str, ...]
    ticks: tuple[Tick, ...]


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
    allocate: seconds that the Allocate took if this is the trace of a hold; None if it is another trace.
    ended: whether this node has released the device of the hold.
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
    allocate: float | None = None
    ended: bool = False

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
        allocate=root.seconds if root.name == HOLD and root.error is None else None,
        ended=any(span.name == RELEASE for span in ordered),
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
    scale = Scale.over(_activity(ordered))
    bars = []
    for span, depth in _by_tree(ordered):
        x, end = scale.x(span.start_ns), scale.x(max(span.start_ns, span.end_ns))
        width = max(LEAST_WIDTH, end - x)
        after = (span.start_ns - ordered[0].start_ns) / 1e9
        bars.append(Bar(span, min(depth, MAX_DEPTH), min(x, WIDTH - width), width, after, nodes.index(span.node)))
    return Waterfall(tuple(bars), scale.gaps, nodes, scale.ticks())


def _activity(spans: Sequence[SpanRecord]) -> Iterator[tuple[int, int]]:
    """Yields the intervals in which something happened: spans without children, and both ends of the other spans.

    A span with children may be one of waits between tries.
    """
    parents = {span.parent_id for span in spans}
    for span in spans:
        if span.span_id in parents:
            yield span.start_ns, span.start_ns
            yield span.end_ns, span.end_ns
        else:
            yield span.start_ns, span.end_ns


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
        pauses = sorted((later[0] - before[1] for before, later in itertools.pairwise(busy)), reverse=True)
        longest_kept = pauses[MAX_PHASES - 1] if len(pauses) >= MAX_PHASES else 0
        merged = _merged(busy, max(int(total * GAP_SHARE), longest_kept, LEAST_GAP_NS))
        longest = max(*(end - begin for begin, end in merged), 1)
        weights = [max(end - begin, longest * LEAST_SHARE) for begin, end in merged]
        room = WIDTH - GAP_WIDTH * (len(merged) - 1)
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
        before, edge = self.phases[0][0], 0.0
        for begin, end, left, right in self.phases:
            if at < begin:  # in a gap
                return edge + (left - edge) * max(0, at - before) / max(begin - before, 1)
            if at <= end:
                return left + (right - left) * (at - begin) / max(end - begin, 1)
            before, edge = end, right
        return float(WIDTH)

    def ticks(self) -> tuple[Tick, ...]:
        """Returns the ticks that have room: first the beginnings of the phases, then places between them."""
        start = self.phases[0][0]
        ticks: list[Tick] = []
        for share in (0.0, 0.5, 0.25, 0.75):
            for begin, end, left, right in self.phases:
                x = left + (right - left) * share
                if x <= LAST_TICK and all(abs(x - tick.x) >= TICK_ROOM for tick in ticks):
                    ticks.append(Tick(x, (begin - start + (end - begin) * share) / 1e9))
        return tuple(sorted(ticks, key=lambda tick: tick.x))


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
    """Returns a duration: "12.3 ms", "1.25 s", from two minutes on "3 min 20 s", from two hours on "5 h 10 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
