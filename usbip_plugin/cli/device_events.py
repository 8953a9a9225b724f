"""The Kubernetes Events about one device, from its pod, its nodes and its resources. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from usbip_plugin.cli.lookup import mapping
from usbip_plugin.cli.tables import Columns, Row, age, stamp
from usbip_plugin.model import PodRef

COLUMNS = Columns(
    table=("last", "type", "reason", "object", "note"),
    wide=("last", "type", "reason", "object", "count", "reporter", "note"),
    name="name",
)
MAX_TEXT = 1024
"""Characters of an Event's note."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What Events may be about.

    names: SERVER/BUSID, the device's ID and the full names of its resources, which notes contain.
    pod: the pod that holds the device.
    """

    names: frozenset[str]
    lease: str
    pod: PodRef | None


def event_rows(events: Iterable[Mapping[str, Any]], subject: Subject, now: datetime) -> list[Row]:
    """Returns a row for each Event of the core API that is about the subject, the latest last."""
    found: dict[str, tuple[datetime, Row]] = {}
    for event in events:
        if concerns(event, subject):
            when = last_time(event) or datetime.fromtimestamp(0, UTC)
            found[str(mapping(event.get("metadata")).get("uid") or len(found))] = when, _row(event, when, now)
    return [row for _when, row in sorted(found.values(), key=lambda pair: pair[0])]


def concerns(event: Mapping[str, Any], subject: Subject) -> bool:
    about, note = mapping(event.get("involvedObject")), str(event.get("message") or "")
    kind, name = about.get("kind"), about.get("name")
    if kind == "Lease" and name == subject.lease:
        return True
    pod = subject.pod
    if kind == "Pod" and pod is not None and (about.get("namespace"), name) == (pod.namespace, pod.name):
        return pod.uid is None or about.get("uid") in (None, pod.uid)
    return any(_names(note, one) for one in subject.names)


def _names(note: str, name: str) -> bool:
    """Returns whether the note has the name as a word of its own: lab:3240/1-1 is not in lab:3240/1-1.2."""
    start = note.find(name)
    while start >= 0:
        before, after = note[:start][-1:], note[start + len(name) :]
        inside = after[:1].isalnum() or after[:1] == "-" or (after[:1] == "." and after[1:2].isalnum())
        if not inside and not (before.isalnum() or before in ("-", ".")):
            return True
        start = note.find(name, start + 1)
    return False


def last_time(event: Mapping[str, Any]) -> datetime | None:
    """Returns when the Event was last observed."""
    series = mapping(event.get("series"))
    for text in (
        *(series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime")),
        mapping(event.get("metadata")).get("creationTimestamp"),
    ):
        if isinstance(text, str):
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                continue
            return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return None


def _row(event: Mapping[str, Any], when: datetime, now: datetime) -> Row:
    about, series = mapping(event.get("involvedObject")), mapping(event.get("series"))
    count = series.get("count") or event.get("count") or 1
    place = f"{about.get('namespace')}/" if about.get("kind") == "Pod" and about.get("namespace") else ""
    return {
        "name": str(mapping(event.get("metadata")).get("name") or "") or None,
        "last": age((now - when).total_seconds()),
        "time": stamp(when.astimezone(UTC)),
        "type": str(event.get("type") or ""),
        "reason": str(event.get("reason") or ""),
        "object": f"{str(about.get('kind') or '').lower()}/{place}{about.get('name') or ''}",
        "count": count if isinstance(count, int) else 1,
        "reporter": str(event.get("reportingComponent") or "") or None,
        "note": " ".join(str(event.get("message") or "")[:MAX_TEXT].split()),
    }
