"""Traces of devices: one for each allocation, over nodes and processes, as docs/reference/tracing.md documents."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.simulation.trace_stories import (
    STORIES,
    TAKER,
    Story,
    life,
    played,
    probed,
    raced,
    restarted,
    robbed,
    taken_over,
    unplugged,
)
from usbip_plugin.observe.spans import TRACED_TRIES
from usbip_plugin.observe.tracing import MAX_SPANS_PER_TRACE
from usbip_sim.trace_tree import tree

DOC = Path(__file__).parents[2] / "docs" / "reference" / "tracing.md"
ERROR_TYPE = "error.type"
LIFE = """\
Allocate [node-a]
├─ lock [node-a]
│  └─ lock.acquire [node-a]
│     └─ lock.write [node-a]
├─ withdraw [node-b]
│  └─ ListAndWatch [node-b]
├─ import [node-a]
├─ attach [node-a]
├─ device node [node-a]
├─ lock.write [node-a]
├─ lock.write [node-a]
├─ response [node-a]
├─ pod [node-a]
│  └─ lock.write [node-a]
├─ re-attach [node-a]
│  ├─ lock.write [node-a]
│  ├─ import [node-a]
│  ├─ attach [node-a]
│  ├─ device node [node-a]
│  └─ lock.write [node-a]
└─ release [node-a]
   ├─ detach [node-a]
   └─ lock.release [node-a]
      └─ lock.write [node-a]"""
"""The trace of one device with two nodes and one broken connection, without durations."""


def test_a_life_is_one_trace_from_allocate_to_release_over_both_nodes() -> None:
    story = played(life)
    assert len({span.trace_id for span in story.spans}) == 1
    paths = {(story.path(span), span.node) for span in story.spans}
    assert paths >= {
        ("Allocate", "node-a"),
        ("Allocate/lock/lock.acquire/lock.write", "node-a"),
        ("Allocate/import", "node-a"),
        ("Allocate/attach", "node-a"),
        ("Allocate/device node", "node-a"),
        ("Allocate/response", "node-a"),
        ("Allocate/withdraw", "node-b"),
        ("Allocate/withdraw/ListAndWatch", "node-b"),
        ("Allocate/pod", "node-a"),
        ("Allocate/re-attach/import", "node-a"),
        ("Allocate/release/detach", "node-a"),
        ("Allocate/release/lock.release/lock.write", "node-a"),
    }
    assert not [span for span in story.spans if span.error is not None]
    root = story.one("Allocate")
    assert (root.kind, root.attributes["rpc.response.status_code"]) == ("server", "OK")
    pod = {"k8s.namespace.name": "default", "k8s.pod.name": "p", "k8s.pod.uid": "uid-of-p"}
    for name in ("pod", "re-attach", "release"):
        assert pod.items() <= story.one(name).attributes.items(), name
    imports = story.named("import")
    assert {(i.kind, i.attributes["server.address"], i.attributes["server.port"]) for i in imports} == {
        ("client", "lab", "3240")
    }


def test_a_new_process_goes_on_with_the_trace_and_a_repeated_allocate_links_to_it() -> None:
    story = played(restarted)
    first, again = story.named("Allocate")
    assert again.links == (first.trace_id,)
    assert again.attributes["usbip.reused"] == "True"
    adopted, released = story.one("adopt"), story.one("release")
    assert {adopted.trace_id, released.trace_id} == {first.trace_id}
    assert adopted.attributes["usbip.adoption"] == "adopt"


def test_a_takeover_links_to_the_trace_of_the_former_holder() -> None:
    story = played(taken_over)
    former, taker = story.named("Allocate")
    assert taker.node == "node-b"
    assert taker.links == (former.trace_id,)
    assert taker.attributes["usbip.lock.former_holder"] == "node-a"
    withdrawn = {(span.node, span.trace_id) for span in story.named("withdraw")}
    assert ("node-c", taker.trace_id) in withdrawn


def test_a_release_after_a_lost_lock_has_that_attribute_and_links_to_the_new_holder() -> None:
    story = played(robbed)
    allocate = story.one("Allocate")
    release = story.one("release", "node-a")
    assert release.trace_id == allocate.trace_id
    assert release.attributes["usbip.lock.lost"] == "True"
    assert release.links == (TAKER.split("-")[1],)
    assert story.named("withdraw", "node-a")[0].trace_id == TAKER.split("-")[1]


def test_a_failure_is_recorded_with_its_class_its_message_and_the_exception() -> None:
    story = played(raced)
    (lost,) = [span for span in story.named("Allocate") if span.error is not None]
    assert lost.attributes[ERROR_TYPE] == "LockHeld"
    assert lost.attributes["rpc.response.status_code"] == "FAILED_PRECONDITION"
    assert "is held by node" in (lost.error or "")
    (event,) = lost.events
    assert event.name == "exception"
    assert event.attributes["exception.type"].endswith("LockHeld")
    assert event.attributes["exception.message"] == lost.error


def test_a_device_that_is_away_for_long_does_not_fill_its_trace() -> None:
    """Of a thousand attempts, the first ones and the last one have spans, and a repeated failure is one event."""
    story = played(unplugged)
    whole = story.one("re-attach")
    assert int(whole.attributes["usbip.tries"]) > 500
    below = [span for span in story.named("import") if story.path(span) == "Allocate/re-attach/import"]
    assert len([span for span in below if span.error is not None]) == TRACED_TRIES
    assert below[-1].error is None
    assert story.path(story.named("device node")[-1]) == "Allocate/re-attach/device node"
    assert [event.attributes["exception.type"].rpartition(".")[2] for event in whole.events] == ["DeviceUnknown"]
    assert len(story.spans) < MAX_SPANS_PER_TRACE
    assert whole.error is None


def test_reading_a_serial_number_is_a_separate_trace() -> None:
    story = played(probed)
    assert {story.path(span).split("/")[0] for span in story.spans} == {"probe"}


# the document


@pytest.fixture(scope="module")
def all_stories() -> list[Story]:
    return [played(play) for play in STORIES]


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Returns {span: (kind, attributes)} of docs/reference/tracing.md, with the attributes of its groups."""
    text = DOC.read_text(encoding="utf-8")
    groups = {
        match[1]: frozenset(re.findall(r"`([a-z0-9_.]+)`", match[2]))
        for match in re.finditer(r"^\| (of [a-z ]+) \| (.*?) \|", text, re.MULTILINE)
    }
    spans: dict[str, tuple[str, frozenset[str]]] = {}
    for line in re.findall(r"^\| `([^`]+)` \| ([a-z]+) \|(.*?)\| ", text, re.MULTILINE):
        name, kind, words = line
        own = frozenset(re.findall(r"`([a-z0-9_.]+)`", words))
        of = [group for title, group in groups.items() if title in words]
        spans[name] = (kind, own.union(*of))
    return spans


def test_the_document_names_every_span_with_its_kind_and_its_attributes(all_stories: list[Story]) -> None:
    seen: dict[str, tuple[str, set[str]]] = defaultdict(lambda: ("", set()))
    for story in all_stories:
        for span in story.spans:
            seen[span.name] = (span.kind, seen[span.name][1] | set(span.attributes))
    used = {name: (kind, frozenset(attributes - {ERROR_TYPE})) for name, (kind, attributes) in seen.items()}
    assert used == documented()


def test_the_document_names_every_attribute_of_our_own_and_explains_no_other(all_stories: list[Story]) -> None:
    text = DOC.read_text(encoding="utf-8")
    used = {name for story in all_stories for span in story.spans for name in span.attributes}
    ours = {name for name in used if name.startswith("usbip.")}
    assert ours <= set(re.findall(r"`(usbip\.[a-z_.]+)`", text))
    assert set(re.findall(r"`(usbip\.[a-z_.]+)`", text.partition("are ours, the others OpenTelemetry's:")[2])) <= ours


def test_the_spans_of_a_life_make_the_expected_tree() -> None:
    story = played(life)
    lines = [re.sub(r" [\d.]+ m?s \[([a-z-]+)\].*", r" [\1]", line) for line in tree(story.spans).splitlines()]
    assert lines == LIFE.splitlines()


def test_every_failed_span_and_no_other_has_an_error_type(all_stories: list[Story]) -> None:
    spans = [span for story in all_stories for span in story.spans]
    assert any(span.error is not None for span in spans)
    assert all((span.error is not None) == (ERROR_TYPE in span.attributes) for span in spans)
