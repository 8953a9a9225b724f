"""The Events of a device on its pod and on the node, and their rows in docs/reference/events.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.rigs.vocabulary import KEY, POD
from usbip_plugin.attach.events import DeviceEvent, EventKind, Regarding, events_of, evicted, refused
from usbip_plugin.errors import ClaimBusy, LockHeld, ServerUnreachable
from usbip_plugin.kube.events import EventText
from usbip_plugin.model import PodRef

DOC = Path(__file__).parents[3] / "docs" / "reference" / "events.md"


def notes(event: DeviceEvent) -> dict[PodRef | None, str]:
    return {pod: text.note for text, pod in events_of(event)}


@pytest.mark.parametrize("what", EventKind)
def test_each_kind_is_an_event_of_its_pod_or_of_the_node(what: EventKind) -> None:
    about = what.value[3]
    known, unknown = notes(DeviceEvent(what, KEY, "words", POD)), notes(DeviceEvent(what, KEY, "words"))
    node, pod = (None, "lab:3240/1-1: words (pod default/reader)"), (POD, "lab:3240/1-1: words")
    assert list(known.items()) == {Regarding.POD: [pod], Regarding.NODE: [node], Regarding.BOTH: [pod, node]}[about]
    assert unknown == {None: "lab:3240/1-1: words"}, "without a known pod only the node"


def test_the_event_of_a_refusal_quotes_its_error_and_its_kind_says_whether_the_device_is_held() -> None:
    held = LockHeld(str(KEY), "node-b", "ns/other", "2030-01-01T00:00:00+00:00")
    (denied, pod), *_more = events_of(refused("usbip.dev/stick", held))
    assert pod is None
    assert denied == EventText("Warning", "DeviceDenied", "Allocate", f"usbip.dev/stick: {held}")
    for error in (ServerUnreachable(KEY.server, "refused"), ClaimBusy("busy")):
        assert refused("r", error).what is EventKind.FAILED


def test_the_event_of_an_eviction_names_its_cause() -> None:
    assert notes(evicted(POD, f"node node-b took {KEY}")) == {POD: "evicted because node node-b took lab:3240/1-1"}


def test_the_document_has_every_kind_with_its_type_and_object() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([a-z, ]+?) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    where = {Regarding.POD: "pod", Regarding.NODE: "node", Regarding.BOTH: "pod, node"}
    assert len(rows) == len(EventKind)
    assert set(rows) == {(reason, kind, where[about]) for kind, reason, _action, about in (w.value for w in EventKind)}


def test_each_kind_has_a_meaning_and_an_advice_of_one_sentence() -> None:
    for kind in EventKind:
        assert all(text.endswith(".") and text.count(". ") == 0 for text in (kind.meaning, kind.advice)), kind
