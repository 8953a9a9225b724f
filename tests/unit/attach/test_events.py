"""What is said to whom, and that docs/reference/events.md explains each kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from usbip_plugin.attach.events import DeviceEvent, EventKind, Regarding, events_of, evicted, refused
from usbip_plugin.errors import ClaimBusy, LockHeld, ServerUnreachable
from usbip_plugin.kube.events import EventText
from usbip_plugin.model import DeviceKey, PodRef, ServerKey

KEY = DeviceKey(ServerKey("lab", 3240), "1-1")
POD = PodRef("ns", "p", "uid-1")
DOC = Path(__file__).parents[3] / "docs" / "reference" / "events.md"


def told(notice: DeviceEvent) -> dict[PodRef | None, str]:
    return {pod: text.note for text, pod in events_of(notice)}


@pytest.mark.parametrize("what", EventKind)
def test_each_kind_is_told_where_it_belongs(what: EventKind) -> None:
    about = what.value[3]
    known, unknown = told(DeviceEvent(what, KEY, "words", POD)), told(DeviceEvent(what, KEY, "words"))
    node, pod = (None, "lab:3240/1-1: words (pod ns/p)"), (POD, "lab:3240/1-1: words")
    assert list(known.items()) == {Regarding.POD: [pod], Regarding.NODE: [node], Regarding.BOTH: [pod, node]}[about]
    assert unknown == {None: "lab:3240/1-1: words"}, "nobody to tell but the node"


def test_a_refusal_says_what_the_pod_was_told_and_whether_somebody_has_the_device() -> None:
    held = LockHeld(str(KEY), "node-b", "ns/other", "2030-01-01T00:00:00+00:00")
    (denied, nobody), *_more = events_of(refused("usbip.dev/stick", held))
    assert nobody is None
    assert denied == EventText("Warning", "DeviceDenied", "Allocate", f"usbip.dev/stick: {held}")
    for error in (ServerUnreachable(KEY.server, "refused"), ClaimBusy("busy")):
        assert refused("r", error).what is EventKind.FAILED


def test_an_eviction_names_its_cause() -> None:
    assert told(evicted(POD, f"node node-b took {KEY}")) == {POD: "evicted because node node-b took lab:3240/1-1"}


def test_the_document_has_every_kind_with_its_type_and_object() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([a-z, ]+?) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    where = {Regarding.POD: "pod", Regarding.NODE: "node", Regarding.BOTH: "pod, node"}
    assert len(rows) == len(EventKind)
    assert set(rows) == {(reason, kind, where[about]) for kind, reason, _action, about in (w.value for w in EventKind)}


def test_each_kind_has_a_meaning_and_an_advice_of_one_sentence() -> None:
    for kind in EventKind:
        assert all(text.endswith(".") and text.count(". ") == 0 for text in (kind.meaning, kind.advice)), kind
