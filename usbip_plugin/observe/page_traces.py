"""A trace as a waterfall in HTML. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from usbip_plugin.observe.markup import Markup, tag
from usbip_plugin.observe.page_parts import more, pill
from usbip_plugin.observe.trace_tree import duration
from usbip_plugin.observe.tracing import SpanRecord
from usbip_plugin.observe.waterfall import GAP_WIDTH, WIDTH, Bar, Summary, Waterfall, lay_out

MAX_BARS = 60
"""Of one trace; /api/traces/ID has all."""
COLOURS = 6
"""Of nodes in a waterfall, in turn."""
BAR_HEIGHT = 14
ABOUT_THE_DEVICE = frozenset({"usbip.device.id", "usbip.device", "usbip.server", "usbip.busid"})
"""Attributes that say the same in every span of a trace that is about one device; its first line has it."""


def draw_trace(spans: Sequence[SpanRecord], about: Summary, device: str | None, *, opened: bool) -> Markup:
    """A trace that can be opened. device: by its name, if it is known."""
    fall = lay_out(spans)
    devices = {span.attributes["usbip.device.id"] for span in spans if "usbip.device.id" in span.attributes}
    hidden = ABOUT_THE_DEVICE if device and len(devices) <= 1 else frozenset()
    line = (
        pill("good" if about.error is None else "bad" if about.failed else "warn", about.name),
        tag("span", device, _class="mono what") if device else None,
        tag("span", ", ".join(node for node in about.nodes if node), _class="muted"),
        tag("span", duration(about.seconds), _class="num"),
        tag("time", f"{about.start:%H:%M:%S}", datetime=about.start.isoformat(), _class="muted num"),
    )
    legend = [
        tag("li", tag("span", _class=f"key n{index % COLOURS}"), node)
        for index, node in enumerate(fall.nodes)
        if node and len(fall.nodes) > 1
    ]
    rest = more(len(fall.bars) - MAX_BARS, f"/api/traces/{about.trace_id}")
    return tag(
        "details",
        tag("summary", *line),
        tag("p", about.error, _class="bad why") if about.error else None,
        tag("ul", *legend, _class="legend") if legend else None,
        tag("ol", *(_bar(bar, fall, hidden) for bar in fall.bars[:MAX_BARS]), _class="fall"),
        rest,
        id=f"t{about.trace_id}",
        open=opened,
    )


def _bar(bar: Bar, fall: Waterfall, hidden: frozenset[str]) -> Markup:
    span = bar.span
    failed = span.error is not None
    notes = [f"{key}={value}" for key, value in sorted(span.attributes.items()) if key not in hidden]
    label = f"begins after {duration(bar.after)}, takes {duration(span.seconds)}"
    drawing = tag(
        "svg",
        *(tag("rect", x=f"{gap.x:.0f}", width=GAP_WIDTH, y=0, height=BAR_HEIGHT, _class="gap") for gap in fall.gaps),
        tag(
            "rect",
            x=f"{bar.x:.1f}",
            width=f"{bar.width:.1f}",
            y=1,
            height=BAR_HEIGHT - 2,
            rx=2,
            _class="failed" if failed else f"n{bar.node % COLOURS}",
        ),
        viewBox=f"0 0 {WIDTH} {BAR_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    return tag(
        "li",
        tag("span", span.name, _class=f"name d{bar.depth}", title=f"{span.name} on {span.node}" if span.node else None),
        drawing,
        tag("span", duration(span.seconds), _class="num"),
        tag("small", " · ".join(notes), _class="notes") if notes else None,
        tag("small", span.error or "failed", _class="bad notes") if failed else None,
    )
