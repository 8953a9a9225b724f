"""The text form of a trace that the plugins' status pages serve as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from usbip_plugin.cli.lookup import items, mapping

MAX_SPANS = 2048
"""Spans of one trace that are shown."""
MAX_TEXT = 512
"""Characters of a name, attribute or error."""
MAX_DEPTH = 32
"""Levels of the tree. Spans of other nodes could be nested without end."""


@dataclass(frozen=True, slots=True)
class Span:
    """A span of a trace, as /api/traces/ID has it.

    start: in UTC, which sorts as text.
    seconds: its duration.
    links: IDs of other traces.
    """

    span_id: str
    parent_id: str | None
    name: str
    node: str
    start: str
    seconds: float
    attributes: Mapping[str, str]
    error: str | None
    links: tuple[str, ...]


def spans_of(pages: Iterable[Any]) -> tuple[Span, ...]:
    """Returns the spans of one trace from the pages of several nodes, each span once, by start."""
    found: dict[str, Span] = {}
    for page in pages:
        for one in items(mapping(page).get("spans")):
            if len(found) < MAX_SPANS and (span := _span(mapping(one))) is not None:
                found.setdefault(span.span_id, span)
    return tuple(sorted(found.values(), key=lambda span: (span.start, span.span_id)))


def _span(value: Mapping[str, Any]) -> Span | None:
    seconds, error, parent = value.get("seconds"), value.get("error"), value.get("parent_id")
    if not isinstance(value.get("span_id"), str) or not isinstance(seconds, int | float):
        return None
    return Span(
        _text(value["span_id"]),
        _text(parent) if isinstance(parent, str) else None,
        _text(value.get("name")),
        _text(value.get("node")),
        _text(value.get("start")),
        float(seconds),
        {_text(key): _text(text) for key, text in mapping(value.get("attributes")).items()},
        _text(error) if isinstance(error, str) else None,
        tuple(map(_text, items(value.get("links")))),
    )


def _text(value: Any) -> str:
    return str("" if value is None else value)[:MAX_TEXT]


def tree(spans: Sequence[Span], *, starts: bool = True) -> str:
    """Returns the spans as an indented tree, one line each, without the attributes of its parents.

    A span is at the top if its parent is not among the spans: it may not have ended, or its node may not answer.
    starts: whether spans at the top show when they start.
    """
    known = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = {}
    for span in spans:
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else None
        children.setdefault(parent, []).append(span)
    lines: list[str] = []

    def add(span: Span, first: str, rest: str, above: Mapping[str, str], depth: int) -> None:
        lines.append(first + _line(span, above))
        below = children.get(span.span_id, []) if depth < MAX_DEPTH else []
        for child in below:
            bend, bar = ("└─ ", "   ") if child is below[-1] else ("├─ ", "│  ")
            add(child, rest + bend, rest + bar, {**above, **span.attributes}, depth + 1)

    for root in children.get(None, []):
        add(root, f"{root.start}  " if starts else "", "", {}, 0)
    return "\n".join(lines)


def _line(span: Span, above: Mapping[str, str]) -> str:
    parts = [span.name, f"{span.seconds * 1000:.1f} ms" if span.seconds < 1 else f"{span.seconds:.2f} s"]
    if span.node:
        parts.append(f"[{span.node}]")
    parts += [f"{key}={text}" for key, text in sorted(span.attributes.items()) if above.get(key) != text]
    parts += [f"link={trace_id[:8]}" for trace_id in span.links]
    if span.error is not None:
        parts.append(f"ERROR: {span.error}" if span.error else "ERROR")
    return "".join(character if character.isprintable() else "?" for character in " ".join(parts))


def latest(page: Any, names: Sequence[str]) -> str | None:
    """Returns the ID of the newest trace about a device in an answer of /api/traces, None if there is none.

    names: SERVER/BUSID and the ID of the device.
    """
    for one in items(mapping(page).get("traces") if isinstance(page, dict) else page):
        summary = mapping(one)
        if summary.get("device") in names and isinstance(summary.get("trace_id"), str):
            return str(summary["trace_id"])
    return None
