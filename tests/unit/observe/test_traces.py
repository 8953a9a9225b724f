"""Traces laid out on a time axis."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from usbip_plugin.observe.traces import (
    LAST_TICK,
    LEAST_WIDTH,
    MAX_DEPTH,
    MAX_PHASES,
    TICK_ROOM,
    WIDTH,
    lay_out,
    summary,
)
from usbip_plugin.observe.tracing import SpanRecord

MS = 1_000_000
S = 1000 * MS


def span(number: int, begin: int, end: int, parent: int | None = None, node: str = "a", **more: object) -> SpanRecord:
    above = None if parent is None else str(parent)
    return SpanRecord(f"s{number}", node, "t", str(number), above, begin, end, **more)  # type: ignore[arg-type]


def test_spans_are_below_their_parents_in_order_of_their_begin() -> None:
    fall = lay_out([span(3, 2, 3, 1), span(2, 1, 4, 1), span(4, 1, 2, 2), span(1, 0, 9), span(9, 3, 4, 77)])
    assert [(bar.span.name, bar.depth) for bar in fall.bars] == [("s1", 0), ("s2", 1), ("s4", 2), ("s3", 1), ("s9", 0)]


def test_the_axis_is_linear_within_activity() -> None:
    whole, first, last = lay_out([span(1, 0, 100 * MS), span(2, 0, 50 * MS, 1), span(3, 75 * MS, 100 * MS, 1)]).bars
    assert (whole.x, whole.width) == (0, WIDTH)
    assert (first.x, first.width) == (0, WIDTH / 2)
    assert (last.x, last.width) == (WIDTH * 0.75, WIDTH * 0.25)
    assert last.after == 0.075


def test_hours_without_activity_are_shortened_and_marked() -> None:
    """An Allocate and the end of its pod three hours later both stay legible."""
    fall = lay_out([span(1, 0, 10 * MS), span(2, 0, 5 * MS, 1), span(3, 10_800 * S, 10_800 * S + 30 * MS)])
    (gap,) = fall.gaps
    assert 10_799 < gap.seconds < 10_801
    allocate, lock, release = fall.bars
    assert allocate.width > WIDTH / 5
    assert lock.width == allocate.width / 2
    assert release.x > gap.x > allocate.x + allocate.width - 1


def test_waits_between_tries_are_shortened_inside_of_the_span_that_waits() -> None:
    """The tries of a re-attach that took an hour stay legible, as does the Allocate before it."""
    tries = [span(10 + n, n * 300 * S, n * 300 * S + 20 * MS, 2) for n in range(1, 5)]
    fall = lay_out([span(1, 0, 20 * MS), span(2, 300 * S, 1200 * S + 20 * MS, 1), *tries])
    widths = {bar.span.name: bar.width for bar in fall.bars}
    assert min(widths.values()) > WIDTH / 10
    assert [round(gap.seconds) for gap in fall.gaps] == [300] * 4
    assert widths["s2"] > WIDTH / 2


def test_a_short_pause_is_not_skipped() -> None:
    assert lay_out([span(1, 0, MS), span(2, 150 * MS, 151 * MS)]).gaps == ()


def test_of_many_phases_the_longest_gaps_are_shortened() -> None:
    begins = [n * n * S for n in range(2 * MAX_PHASES)]
    fall = lay_out([span(n, begin, begin + MS) for n, begin in enumerate(begins)])
    assert len(fall.gaps) == MAX_PHASES - 1
    assert min(gap.seconds for gap in fall.gaps) > 2 * MAX_PHASES - 1


def test_ticks_have_room_and_the_times_of_their_places() -> None:
    fall = lay_out([span(1, 0, 4 * S), span(2, 100 * S, 104 * S)])
    assert [(round(tick.x), tick.after) for tick in fall.ticks] == [(0, 0), (243, 2), (514, 100), (757, 102)]
    for one, other in itertools.pairwise(fall.ticks):
        assert other.x - one.x >= TICK_ROOM
    assert fall.ticks[-1].x <= LAST_TICK


def test_the_trace_of_a_hold_has_the_time_of_its_allocate() -> None:
    allocate = replace(span(1, 0, 17 * MS), name="Allocate")
    assert (summary([allocate]).allocate, summary([allocate]).ended) == (0.017, False)
    assert summary([allocate, replace(span(2, S, 2 * S, 1), name="release")]).ended
    assert summary([replace(allocate, error="no route")]).allocate is None
    assert summary([span(1, 0, S)]).allocate is None


def test_a_span_without_a_duration_is_visible_on_the_axis() -> None:
    fall = lay_out([span(1, 0, S), span(2, S, S, 1), span(3, 5, 5, 1)])
    assert all(bar.width >= LEAST_WIDTH and bar.x >= 0 and bar.x + bar.width <= WIDTH for bar in fall.bars)


@settings(deadline=None)  # machines may be busy
@given(st.lists(st.tuples(st.integers(0, 10**18), st.integers(-5, 10**15), st.integers(0, 9)), min_size=1, max_size=40))
def test_every_span_has_a_bar_on_the_axis_for_any_times(drawn: list[tuple[int, int, int]]) -> None:
    spans = [span(i, begin, begin + length, parent) for i, (begin, length, parent) in enumerate(drawn)]
    fall = lay_out(spans)
    assert sorted(bar.span.span_id for bar in fall.bars) == sorted(one.span_id for one in spans)
    for bar in fall.bars:
        assert -1e-6 <= bar.x <= bar.x + bar.width <= WIDTH + 1e-6
        assert 0 <= bar.depth <= MAX_DEPTH
    by_begin = sorted(fall.bars, key=lambda bar: bar.span.start_ns)
    for one, other in itertools.pairwise(by_begin):
        assert one.x <= other.x + LEAST_WIDTH, "time goes to the right"
    assert summary(spans).span_count == len(spans)


def test_the_summary_names_root_device_and_the_first_error() -> None:
    result = summary(
        [
            span(2, 2 * MS, 8 * MS, 1, node="b", error="late"),
            span(1, 0, 5 * MS, attributes={"usbip.device.id": "usbip-x"}),
            span(3, 1 * MS, 2 * MS, 1, error="", attributes={"usbip.device": "lab:3240/1-1"}),
        ]
    )
    assert (result.name, result.seconds, result.nodes) == ("s1", 0.008, ("a", "b"))
    assert result.device == "lab:3240/1-1", "the name is preferred to the ID"
    assert (result.error, result.failed) == ("s3 failed", False)
