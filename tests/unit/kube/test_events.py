"""Events: their content, their limits, and failures that never reach the caller."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.rigs.api_double import ApiDouble
from tests.rigs.clocks import SteppedClock
from tests.rigs.tasks import background
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeUnreachable
from usbip_plugin.kube.events import (
    BURST,
    FOR_WARNINGS,
    KEPT_EVENTS,
    MAX_INSTANCE,
    MAX_NOTE_BYTES,
    NORMAL,
    OBJECT_BURST,
    OBJECT_REFILL_S,
    REFILL_S,
    REPEAT_S,
    WARNING,
    EventRecorder,
    EventText,
    event_body,
    event_name,
    instance_of,
)
from usbip_plugin.model import NodeIdentity, PodRef

ME = NodeIdentity("node-a", "boot")
POD = PodRef("ns", "web-1", "uid-1")
PATIENCE_S = 10
"""Limits a wait in seconds. Only a hanging test reaches it."""


def attached(note: str = "attached usbip-a") -> EventText:
    return EventText(NORMAL, "DeviceAttached", "Allocate", note)


def lost(note: str = "lost usbip-a") -> EventText:
    return EventText(WARNING, "DeviceLost", "Reattach", note)


def pod(number: int) -> PodRef:
    return PodRef("ns", f"web-{number}", f"uid-{number}")


class HandClock(SteppedClock):
    """A clock that a test moves. Sleeps take no time, and timeouts are long."""

    def now(self) -> datetime:
        return datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)

    async def sleep(self, seconds: float) -> None:
        self.time += seconds

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(PATIENCE_S)


async def written(api: ApiDouble) -> Any:
    """Waits for the next Event that the API server accepts, and returns it."""
    async with asyncio.timeout(PATIENCE_S):
        return (await api.answered.get()).body


@contextlib.asynccontextmanager
async def recording(api: ApiDouble, clock: HandClock) -> AsyncIterator[EventRecorder]:
    recorder = EventRecorder(api, ME, clock, random.Random(1))
    async with background(recorder.run()):
        yield recorder


async def test_an_event_regards_its_pod_or_the_node() -> None:
    api = ApiDouble()
    async with recording(api, HandClock()) as recorder:
        recorder.record(attached(), POD)
        body = await written(api)
        assert (api.calls[0].verb, api.calls[0].path) == ("create", "/apis/events.k8s.io/v1/namespaces/ns/events")
        regarding = {"kind": "Pod", "apiVersion": "v1", "name": "web-1", "namespace": "ns", "uid": "uid-1"}
        assert body["regarding"] == regarding
        assert body["metadata"]["name"].startswith("web-1.")
        assert body["eventTime"] == "2026-01-02T03:04:05.000006Z"
        recorder.record(EventText(WARNING, "DeviceLost", "Watch", "lost"))
        body = await written(api)
        assert api.calls[1].path == "/apis/events.k8s.io/v1/namespaces/default/events"
        assert body["regarding"] == {"kind": "Node", "apiVersion": "v1", "name": "node-a", "uid": "node-a"}
        fields = [body[name] for name in ("type", "reason", "action", "note")]
        assert fields == ["Warning", "DeviceLost", "Watch", "lost"]
        assert body["reportingInstance"] == "node-a"


async def test_an_event_is_repeated_only_after_an_interval() -> None:
    api, clock = ApiDouble(), HandClock()
    async with recording(api, clock) as recorder:
        recorder.record(attached("a"))
        recorder.record(attached("a"))
        recorder.record(attached("a"), POD)
        clock.time += REPEAT_S
        recorder.record(attached("a"))
        recorder.record(attached("end"))
        about = [(await written(api)) for _ in range(4)]
        assert [(body["note"], body["regarding"]["kind"]) for body in about] == [
            ("a", "Node"),
            ("a", "Pod"),
            ("a", "Node"),
            ("end", "Node"),
        ]
        assert recorder.dropped == 0


async def test_a_flood_is_cut_and_recovers() -> None:
    api, clock = ApiDouble(), HandClock()
    async with recording(api, clock) as recorder:
        for number in range(BURST + 7):
            recorder.record(lost(), pod(number))
        assert recorder.dropped == 7
        clock.time += REFILL_S
        recorder.record(lost("later"), POD)
        recorder.record(lost("too many again"), POD)
        assert recorder.dropped == 8
        notes = [(await written(api))["note"] for _ in range(BURST + 1)]
        assert notes[-1] == "later"


async def test_the_last_events_that_were_recorded_are_kept() -> None:
    clock = HandClock()
    recorder = EventRecorder(ApiDouble(), ME, clock, random.Random(0))
    for number in range(KEPT_EVENTS + 5):
        recorder.record(lost(), pod(number))
        recorder.record(lost(), pod(number))
    assert [one.pod for one in recorder.recent] == [pod(5 + number) for number in range(KEPT_EVENTS)]
    assert (recorder.recent[0].at, recorder.recent[0].text) == (clock.now(), lost())


async def test_events_of_one_object_leave_room_for_others() -> None:
    api, clock = ApiDouble(), HandClock()
    async with recording(api, clock) as recorder:
        for number in range(OBJECT_BURST + 7):
            recorder.record(lost(str(number)), POD)
        assert recorder.dropped == 7
        recorder.record(lost("another pod"), pod(2))
        recorder.record(lost("the node"))
        clock.time += OBJECT_REFILL_S
        recorder.record(lost("later"), POD)
        recorder.record(lost("too many again"), POD)
        assert recorder.dropped == 8
        notes = [(await written(api))["note"] for _ in range(OBJECT_BURST + 3)]
        assert notes[-3:] == ["another pod", "the node", "later"]


async def test_normal_events_leave_room_for_warnings() -> None:
    api = ApiDouble()
    async with recording(api, HandClock()) as recorder:
        for number in range(BURST):
            recorder.record(attached(), pod(number))
        assert recorder.dropped == FOR_WARNINGS
        for number in range(FOR_WARNINGS):
            recorder.record(lost(), pod(number))
        assert recorder.dropped == FOR_WARNINGS
        types = [(await written(api))["type"] for _ in range(BURST)]
        assert types == [NORMAL] * (BURST - FOR_WARNINGS) + [WARNING] * FOR_WARNINGS


async def test_an_api_server_that_refuses_is_logged_and_the_next_event_goes_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = ApiDouble()
    api.errors = [KubeForbidden("create", "events.events.k8s.io", "no")]
    async with recording(api, HandClock()) as recorder:
        recorder.record(attached("refused"))
        recorder.record(attached("taken"))
        assert (await written(api))["note"] == "taken"
        assert recorder.dropped == 1
    assert "create events.events.k8s.io" in vars(caplog.records[0])["cause"]


async def test_a_retry_that_conflicts_with_its_own_event_counts_as_recorded(caplog: pytest.LogCaptureFixture) -> None:
    api = ApiDouble()
    api.errors = [KubeUnreachable("create", "events", "reset"), KubeConflict("create", "events", "exists")]
    async with recording(api, HandClock()) as recorder:
        recorder.record(attached("once"))
        recorder.record(attached("next"))
        assert (await written(api))["note"] == "next"
        assert recorder.dropped == 0
    assert not caplog.records


@pytest.mark.parametrize("note", ["x" * 5000, "ü" * 3000, "€" * 2000, "\ud800"])
def test_a_note_is_cut_to_the_limit_of_the_api(note: str) -> None:
    body = event_body(ME, attached(note), None, "n", "t")
    assert len(body["note"].encode("utf-8", "replace")) <= MAX_NOTE_BYTES + 3


LONG = "node-1." + "rack." * 23 + "example.org"
"""A node's name of 133 characters."""


def test_the_reporting_instance_is_the_name_of_the_node_within_the_limit_of_the_api() -> None:
    assert instance_of("node-a") == "node-a"
    assert instance_of("n" * MAX_INSTANCE) == "n" * MAX_INSTANCE
    for length in (MAX_INSTANCE + 1, len(LONG), 253):
        assert len(instance_of("n" * length)) == MAX_INSTANCE


def test_a_long_name_of_a_node_is_shortened_to_its_ends_and_a_digest() -> None:
    head, tail, digest = instance_of(LONG).split("~")
    assert LONG.startswith(head)
    assert LONG.endswith(tail)
    assert len(head) == len(tail) == 55
    alike = LONG[:60] + "x" + LONG[61:]
    assert instance_of(alike).split("~")[:2] == [head, tail]
    assert instance_of(alike).split("~")[2] != digest


def test_each_event_has_the_whole_name_of_the_node() -> None:
    me = NodeIdentity(LONG, "boot")
    about_node = event_body(me, attached("lost"), None, "n", "t")
    assert (about_node["regarding"]["name"], about_node["note"]) == (LONG, "lost")
    about_pod = event_body(me, attached("lost"), POD, "n", "t")
    assert about_pod["note"] == f"lost (node {LONG})"
    assert event_body(ME, attached("lost"), POD, "n", "t")["note"] == "lost", "reportingInstance has it"


@pytest.mark.parametrize("note", ["x" * 5000, "€" * 2000])
def test_a_long_note_leaves_room_for_the_name_of_the_node(note: str) -> None:
    text = event_body(NodeIdentity(LONG, "boot"), attached(note), POD, "n", "t")["note"]
    assert text.endswith(f"... (node {LONG})")
    assert len(text.encode()) <= MAX_NOTE_BYTES + 3


@pytest.mark.parametrize("about", ["web-1", "a" * 199 + ".b", "a" * 198 + "-.b", "a" * 253])
def test_the_name_of_an_event_is_valid_for_any_object(about: str) -> None:
    name = event_name(about, 5)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", name)
    assert len(name) <= 253
    assert name.endswith(".0000000000000005")
