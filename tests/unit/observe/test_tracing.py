"""Trace context as text, the last traces in memory, the tree of a trace, and a shutdown within its limit."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan

from usbip_plugin.observe.spans import span
from usbip_plugin.observe.traces import duration
from usbip_plugin.observe.tracing import (
    MAX_SPANS_PER_TRACE,
    MAX_UNREAD_SPANS,
    RECENT_SPANS,
    RECENT_TRACES,
    RecentSpans,
    SpanRecord,
    Tracing,
    remote_parent,
    span_context_from,
    traceparent_of,
)
from usbip_sim.trace_tree import tree

NODE_A, NODE_B = "node-a", "node-b"


def tracing(node: str = NODE_A, recent: RecentSpans | None = None) -> Tracing:
    return Tracing(node, version="1", environ={}, recent=recent)


def test_a_trace_continues_on_another_node_through_its_traceparent() -> None:
    recent = RecentSpans()
    a, b = tracing(NODE_A, recent), tracing(NODE_B, recent)
    with a.tracer.start_as_current_span("Allocate") as allocate:
        traceparent = traceparent_of(allocate)
        with a.tracer.start_as_current_span("lock"):
            pass
    assert traceparent is not None
    with b.tracer.start_as_current_span("withdraw", context=remote_parent(traceparent), attributes={"device": "x"}):
        pass
    (spans,) = recent.traces()
    assert {(span.name, span.node) for span in spans} == {("Allocate", NODE_A), ("lock", NODE_A), ("withdraw", NODE_B)}
    assert recent.trace(spans[0].trace_id) == spans
    first, *below = tree(spans).splitlines()
    assert first.startswith("Allocate ")
    assert first.endswith("[node-a]")
    assert [text[:3] for text in below] == ["├─ ", "└─ "]
    assert "lock" in below[0]
    assert below[1].endswith("[node-b] device=x")


def test_each_node_has_its_own_provider_and_none_is_global() -> None:
    before = trace.get_tracer_provider()
    a, b = tracing(NODE_A), tracing(NODE_B)
    a.tracer.start_span("x").end()
    assert trace.get_tracer_provider() is before
    assert len(a.recent.traces()) == 1
    assert b.recent.traces() == ()


def test_the_last_traces_are_kept_with_a_bounded_number_of_spans_each() -> None:
    recent = RecentSpans(traces=2)
    tracer = tracing(recent=recent).tracer
    for name in ("one", "two", "three"):
        tracer.start_span(name).end()
    assert [spans[0].name for spans in recent.traces()] == ["two", "three"]
    with tracer.start_as_current_span("root"):
        for _ in range(MAX_SPANS_PER_TRACE + 5):
            tracer.start_span("child").end()
    assert len(recent.traces()[-1]) == MAX_SPANS_PER_TRACE


def test_fewer_traces_are_kept_if_they_have_many_spans() -> None:
    recent = RecentSpans()
    tracer = tracing(recent=recent).tracer
    for number in range(RECENT_TRACES):
        with tracer.start_as_current_span(str(number)):
            for _ in range(MAX_SPANS_PER_TRACE + 5):
                tracer.start_span("child").end()
    kept = recent.traces()
    assert sum(map(len, kept)) == RECENT_SPANS
    assert [spans[-1].name for spans in kept] == [str(n) for n in range(RECENT_TRACES - len(kept), RECENT_TRACES)]
    for number in range(2 * RECENT_TRACES):
        tracer.start_span(str(number)).end()
    assert len(recent.traces()) == RECENT_TRACES


def test_spans_are_equal_and_in_order_whether_read_early_or_late() -> None:
    early, late = RecentSpans(), RecentSpans()
    tracer = tracing(recent=early).tracer
    tracer.span_processor.add_span_processor(late)  # type: ignore[attr-defined]
    for number in range(3):
        with tracer.start_as_current_span("root", attributes={"number": number}):
            for child in range(MAX_UNREAD_SPANS // 2):
                tracer.start_span("child", attributes={"child": child}).end()
                early.traces()
    assert late.traces() == early.traces() == late.traces()
    assert [span.attributes["child"] for span in late.traces()[0][:3]] == ["0", "1", "2"]


def test_a_bounded_number_of_spans_is_kept_unread() -> None:
    recent = RecentSpans()
    tracer = tracing(recent=recent).tracer
    for _ in range(4):
        with tracer.start_as_current_span("root"):
            for _ in range(MAX_SPANS_PER_TRACE // 2):
                tracer.start_span("child").end()
    kept = [span for spans in recent._traces.values() for span in spans]
    assert sum(isinstance(one.span, ReadableSpan) for one in kept) == MAX_UNREAD_SPANS
    assert len(kept) > 2 * MAX_UNREAD_SPANS
    with pytest.raises(ValueError, match="no"), span(tracer, "step"):
        raise ValueError("no")
    assert isinstance(list(recent._traces.values())[-1][0].record, SpanRecord), "a span with a stack is read at once"


def test_a_failed_span_shows_its_error() -> None:
    recent = RecentSpans()
    with pytest.raises(ValueError, match="no"), tracing(recent=recent).tracer.start_as_current_span("step"):
        raise ValueError("no\nport")
    (spans,) = recent.traces()
    assert tree(spans).endswith("ERROR: ValueError: no?port")


def test_a_link_to_another_trace_is_shown() -> None:
    recent = RecentSpans()
    tracer = tracing(recent=recent).tracer
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    linked = span_context_from(parent)
    assert linked is not None
    tracer.start_span("release", links=[trace.Link(linked)]).end()
    assert "link=0af76519" in tree(recent.traces()[0])


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
        "",
        "garbage",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-extra",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-" + "x" * 1000,
    ],
)
def test_an_invalid_traceparent_gives_no_context(traceparent: str | None) -> None:
    assert not remote_parent(traceparent)


@given(st.text(max_size=80))
def test_any_text_is_accepted_as_a_traceparent(text: str) -> None:
    remote_parent(text)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.sampled_from(["00", "01"]))
def test_a_valid_traceparent_is_read_back(trace_id: int, span_id: int, flags: str) -> None:
    text = f"00-{trace_id:032x}-{span_id:016x}-{flags}"
    context = remote_parent(text)
    assert context is not None
    assert traceparent_of(trace.get_current_span(context)) == text


def test_a_span_that_does_not_record_has_no_traceparent() -> None:
    assert traceparent_of(trace.INVALID_SPAN) is None


def test_an_unsampled_remote_parent_does_not_hide_the_trace() -> None:
    recent = RecentSpans()
    context = remote_parent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    tracing(recent=recent).tracer.start_span("x", context=context).end()
    assert len(recent.traces()) == 1


span_ids = st.sampled_from([f"{n:016x}" for n in range(1, 6)])


@given(
    st.lists(
        st.builds(
            SpanRecord,
            name=st.text(max_size=3),
            node=st.sampled_from(["", "n"]),
            trace_id=st.just("0" * 32),
            span_id=span_ids,
            parent_id=st.none() | span_ids,
            start_ns=st.integers(0, 10),
            end_ns=st.integers(0, 10),
        ),
        max_size=6,
    )
)
def test_the_tree_of_any_set_of_spans_has_at_most_one_line_for_each(spans: list[SpanRecord]) -> None:
    lines = tree(spans).splitlines()
    assert len(lines) <= len({span.span_id for span in spans})
    if any(span.parent_id is None for span in spans[-1:]):
        assert lines


def test_durations_have_a_unit_that_fits() -> None:
    texts = [duration(seconds) for seconds in (0.0001, 0.0123, 0.9994, 1.25)]
    assert texts == ["0.1 ms", "12.3 ms", "999.4 ms", "1.25 s"]


def test_without_an_endpoint_the_exporter_is_not_imported() -> None:
    code = (
        "import sys; from usbip_plugin.observe.tracing import Tracing; Tracing('n', version='1', environ={});"
        "sys.exit(any(name.startswith('opentelemetry.exporter') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_process_ends_with_a_silent_endpoint() -> None:
    """The SDK alone would wait for 10 s and more."""
    code = (
        "from usbip_plugin.observe.tracing import Tracing\n"
        "t = Tracing('n', version='1'); assert t._export; t.tracer.start_span('x').end()\n"
        "t.shutdown(); print('ended')"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "PATH": ""}
        ended = subprocess.run(
            [sys.executable, "-c", code], env=environ, check=False, timeout=8, capture_output=True, text=True
        )
    assert ended.stdout == "ended\n"
    assert ended.returncode == 0
