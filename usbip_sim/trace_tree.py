"""Text form of recorded traces."""

from __future__ import annotations

from collections.abc import Iterable

from usbip_plugin.cli import trace
from usbip_plugin.observe.traces import span_json
from usbip_plugin.observe.tracing import SpanRecord


def tree(spans: Iterable[SpanRecord]) -> str:
    """Returns the spans of one or several traces as `usbip-plugin trace` shows them; "" for no spans."""
    return trace.tree(trace.spans_of([{"spans": [span_json(span) for span in spans]}]), starts=False)
