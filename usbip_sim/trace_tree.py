"""Text form of traces. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from usbip_plugin.observe.traces import duration
from usbip_plugin.observe.tracing import SpanRecord


def tree(spans: Iterable[SpanRecord]) -> str:
    """Returns the spans of one or several traces as an indented tree; "" for no spans.

    One line a span, ordered by start, without the attributes of its parents. A span is at the top if its parent is not
    among the spans: the parent may not have ended, or may belong to another node.
    """
    ordered = sorted({span.span_id: span for span in spans}.values(), key=lambda span: (span.start_ns, span.span_id))
    known = {span.span_id for span in ordered}
    children: dict[str | None, list[SpanRecord]] = {}
    for span in ordered:
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else None
        children.setdefault(parent, []).append(span)
    lines: list[str] = []

    def add(span: SpanRecord, first: str, rest: str, above: Mapping[str, str]) -> None:
        lines.append(first + _line(span, above))
        below = children.get(span.span_id, [])
        for child in below:
            bend, bar = ("└─ ", "   ") if child is below[-1] else ("├─ ", "│  ")
            add(child, rest + bend, rest + bar, {**above, **span.attributes})

    for root in children.get(None, []):
        add(root, "", "", {})
    return "\n".join(lines)


def _line(span: SpanRecord, above: Mapping[str, str]) -> str:
    """Returns one span as text, such as `lock.acquire 3.1 ms [node-a] epoch=2`.

    Omits attributes with the same value in above. Unprintable characters become "?".
    """
    parts = [span.name, duration(span.seconds)]
    if span.node:
        parts.append(f"[{span.node}]")
    parts.extend(f"{key}={value}" for key, value in sorted(span.attributes.items()) if above.get(key) != value)
    parts.extend(f"link={trace_id[:8]}" for trace_id in span.links)
    if span.error is not None:
        parts.append(f"ERROR: {span.error}" if span.error else "ERROR")
    return "".join(character if character.isprintable() else "?" for character in " ".join(parts))
