"""The Events about a device, and its trace as text."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from usbip_plugin.cli.device_events import Subject, event_rows, last_time
from usbip_plugin.cli.trace import MAX_DEPTH, latest, spans_of, tree
from usbip_plugin.model import PodRef

NOW = datetime(2026, 5, 4, 4, 0, 0, tzinfo=UTC)
SUBJECT = Subject(
    frozenset({"lab:3240/1-1", "usbip-abc", "usbip.dev/stick"}), "usbip-abc", PodRef("default", "reader", "uid-1")
)


def event(note: str = "", *, kind: str = "Node", name: str = "node-a", **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": f"{name}.1", "uid": f"{kind}-{name}-{note}"},
        "type": "Warning",
        "reason": "DeviceLost",
        "message": note,
        "involvedObject": {"kind": kind, "name": name} | more.pop("involved", {}),
        "eventTime": "2026-05-04T03:00:00.000000Z",
    } | more


@pytest.mark.parametrize(
    ("found", "about"),
    [
        (event("lab:3240/1-1: connection lost"), True),
        (event("lost lab:3240/1-1."), True),
        (event("lab:3240/1-1.2: connection lost"), False),
        (event("lab:3240/1-12 lost"), False),
        (event("mylab:3240/1-1 lost"), False),
        (event("0/3 nodes are available: 3 Insufficient usbip.dev/stick."), True),
        (event("3 Insufficient usbip.dev/stick-2."), False),
        (event(kind="Lease", name="usbip-abc"), True),
        (event(kind="Lease", name="usbip-xyz"), False),
        (event(kind="Pod", name="reader", involved={"namespace": "default", "uid": "uid-1"}), True),
        (event(kind="Pod", name="reader", involved={"namespace": "default", "uid": "uid-2"}), False),
        (event(kind="Pod", name="reader", involved={"namespace": "other"}), False),
        ({}, False),
    ],
)
def test_an_event_is_about_the_device_its_pod_its_lease_or_its_resource(found: dict[str, Any], about: bool) -> None:
    assert bool(event_rows([found], SUBJECT, NOW)) is about


def test_events_are_sorted_by_their_last_time_and_shown_once() -> None:
    late = event("lab:3240/1-1 a", series={"count": 7, "lastObservedTime": "2026-05-04T03:59:00.000000Z"})
    early = event("lab:3240/1-1 b\nagain", eventTime=None, lastTimestamp="2026-05-04T02:00:00Z")
    rows = event_rows([late, early, late], SUBJECT, NOW)
    assert [(row["last"], row["count"], row["note"]) for row in rows] == [
        ("2h", 1, "lab:3240/1-1 b again"),
        ("60s", 7, "lab:3240/1-1 a"),
    ]
    assert rows[0]["object"] == "node/node-a"


@pytest.mark.parametrize("text", ["yesterday", 5, None])
def test_a_time_that_is_not_valid_is_left_out(text: object) -> None:
    assert last_time({"eventTime": text}) is None


def span(span_id: str, parent: str | None, start: int, node: str = "node-a", **more: Any) -> dict[str, Any]:
    return {
        "span_id": span_id,
        "parent_id": parent,
        "name": f"step {span_id}",
        "node": node,
        "start": f"2026-05-04T03:00:0{start}.000000+00:00",
        "seconds": 0.0123,
        "attributes": {"usbip.busid": "1-1"},
        "error": None,
    } | more


def test_the_spans_of_several_nodes_are_one_tree() -> None:
    here = {"spans": [span("a", None, 0), span("b", "a", 1, seconds=2.5), span("c", "gone", 3)]}
    there = {"spans": [span("d", "a", 2, "node-b", error="lost"), span("a", None, 0)]}
    lines = tree(spans_of([here, there])).splitlines()
    assert lines == [
        "2026-05-04T03:00:00.000000+00:00  step a 12.3 ms [node-a] usbip.busid=1-1",
        "├─ step b 2.50 s [node-a]",
        "└─ step d 12.3 ms [node-b] ERROR: lost",
        "2026-05-04T03:00:03.000000+00:00  step c 12.3 ms [node-a] usbip.busid=1-1",
    ]


def test_the_tree_of_any_answer_is_printable_and_ends() -> None:
    deep = [span(str(number), str(number - 1), 0) for number in range(1000)]
    loop = [span("x", "y", 0), span("y", "x", 0), span("z", "z", 1, name="\x1b[2J")]
    text = tree(
        spans_of([{"spans": [*deep, *loop, 5, {}, {"span_id": 1}, {"span_id": "q", "seconds": "1"}]}, [], None])
    )
    assert len(text.splitlines()) <= MAX_DEPTH + 2
    assert text.replace("\n", "").isprintable()


def test_the_newest_trace_of_a_device_is_found_in_a_list_or_an_object() -> None:
    traces = [
        {"trace_id": "1" * 32, "device": "lab:3240/1-2"},
        {"trace_id": "2" * 32, "device": "lab:3240/1-1"},
        {"trace_id": "3" * 32, "device": "lab:3240/1-1"},
    ]
    for page in (traces, {"schema": 1, "traces": traces}):
        assert latest(page, ["lab:3240/1-1", "usbip-abc"]) == "2" * 32
    assert latest(traces, ["lab:3240/1-9"]) is None
    assert latest("nonsense", ["lab:3240/1-1"]) is None
