"""The status page as HTML: the state of the node for an operator, and the last traces as bars.

Imported on the first visit only: jinja2 and the templates take 5 MiB.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import TypeVar

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from usbip_plugin.model import Reason
from usbip_plugin.observe.status import DeviceRow, NodeReport
from usbip_plugin.observe.traces import GAP_WIDTH, WIDTH, duration, lay_out, summary
from usbip_plugin.observe.tracing import SpanRecord
from usbip_plugin.sync import Steps

T = TypeVar("T")

PAGE, MAIN, PARTS = "page.html", "main.html", "parts.html"
"""The templates: the whole document with its style and script, the content of <main>, and macros for the content."""
MAX_BARS = 60
"""Bars of one trace on the page. /api/traces/ID has all spans."""
MAX_ROWS = 500
"""Rows of the table of devices. /api/devices has all."""
BATCH = 16
"""Rows or bars that are rendered in one step: half a millisecond."""
MAX_TRACES = 20
"""Traces on the page, the newest ones."""
COLOURS = 6
"""Colours of the nodes in a waterfall. Further nodes use them again, in turn."""
ABOUT_THE_DEVICE = frozenset({"usbip.device.id", "usbip.device", "usbip.server", "usbip.busid"})
"""Attributes that are equal in all spans of a trace about one device. The trace's first line shows the device."""
SHOWN_ELSEWHERE = frozenset({Reason.HELD_ELSEWHERE.value, Reason.ATTACHED.value})
"""Reasons whose detail the other columns of the table show already."""


class Page:
    """Renderer of a NodeReport and the last traces as HTML.

    policy: value of the Content-Security-Policy header. It allows only the style and the script in page.html, images
    in data: URLs, and requests to the same origin.
    Rendering takes some milliseconds, because a trace is drawn again only if it has a new span. One page is rendered at
    a time.
    """

    def __init__(self) -> None:
        environment = Environment(
            loader=FunctionLoader(_source),
            autoescape=True,
            finalize=_printable,
            undefined=StrictUndefined,
            auto_reload=False,
        )
        environment.filters.update(age=age, duration=duration, identity=_identity)
        environment.globals.update(
            COLOURS=COLOURS,
            GAP_WIDTH=GAP_WIDTH,
            MAX_BARS=MAX_BARS,
            MAX_ROWS=MAX_ROWS,
            SHOWN_ELSEWHERE=SHOWN_ELSEWHERE,
            WIDTH=WIDTH,
            state_pill=_state_pill,
        )
        self._templates = {name: environment.get_template(name) for name in (PAGE, MAIN, PARTS)}
        self._drawn: dict[tuple[str, int, str | None, bool], Markup] = {}
        self.policy = _policy(_source(PAGE))

    def whole(self, status: NodeReport, traces: Sequence[Sequence[SpanRecord]]) -> Steps[bytes]:
        """Returns the whole HTML document. traces: the oldest first."""
        return self._render(PAGE, status, traces)

    def main(self, status: NodeReport, traces: Sequence[Sequence[SpanRecord]]) -> Steps[bytes]:
        """Returns the content of <main>, which changes. The page's script fetches it periodically."""
        return self._render(MAIN, status, traces)

    def _render(self, template: str, status: NodeReport, traces: Sequence[Sequence[SpanRecord]]) -> Steps[bytes]:
        names = {row.id: row.device for row in status.devices}
        drawn = yield from self._draw([spans for spans in reversed(traces) if spans][:MAX_TRACES], names)
        devices = yield from _batches(
            status.devices[:MAX_ROWS], lambda rows: self._macro("device_rows")(rows, status.node)
        )
        servers = yield from _batches(status.servers, self._macro("server_rows"))
        tiles = _tiles(status)
        yield
        page = self._templates[template].render(
            status=status, tiles=tiles, traces=drawn, device_rows=devices, server_rows=servers
        )
        yield
        return page.encode()

    def _macro(self, name: str) -> Callable[..., Markup]:
        macro: Callable[..., Markup] = vars(self._templates[PARTS].module)[name]
        return macro

    def _draw(self, traces: Sequence[Sequence[SpanRecord]], names: Mapping[str, str]) -> Steps[Sequence[Markup]]:
        drawn: dict[tuple[str, int, str | None, bool], Markup] = {}
        for index, spans in enumerate(traces):
            about = summary(spans)
            yield
            device = names.get(about.device, about.device) if about.device is not None else None
            key = (about.trace_id, len(spans), device, index == 0)
            drawn[key] = self._drawn.get(key) or (yield from self._trace(spans, device, opened=index == 0))
        self._drawn = drawn
        return list(drawn.values())

    def _trace(self, spans: Sequence[SpanRecord], device: str | None, *, opened: bool) -> Steps[Markup]:
        devices = {span.attributes["usbip.device.id"] for span in spans if "usbip.device.id" in span.attributes}
        hidden = ABOUT_THE_DEVICE if device and len(devices) <= 1 else frozenset()
        about, fall = summary(spans), lay_out(spans)
        yield
        bars = yield from _batches(fall.bars[:MAX_BARS], lambda some: self._macro("trace_bars")(some, fall, hidden))
        return self._macro("trace")(about, fall, bars, device, opened)


def _batches(rows: Sequence[T], render: Callable[[Sequence[T]], Markup]) -> Steps[Sequence[Markup]]:
    parts = []
    for start in range(0, len(rows), BATCH):
        parts.append(render(rows[start : start + BATCH]))
        yield
    return parts


def _source(name: str) -> str:
    """Returns the text of a template. In the content of <main>, line breaks between elements are removed."""
    text = resources.files(__package__ or "usbip_plugin.observe").joinpath(name).read_text(encoding="utf-8")
    return text if name == PAGE else re.sub(r"(?<=[>}])\n\s*|\n\s*(?=[<{])", "", text)


def _policy(html: str) -> str:
    def digests(element: str) -> str:
        parts = re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode("ascii") for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    return (
        f"default-src 'none'; style-src {digests('style')}; script-src {digests('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _printable(value: object) -> object:
    """Returns what the page shows for a value: nothing for None, and "?" for each character that cannot be printed.

    Such characters may change the writing direction. Called by jinja2 before it escapes the value.
    """
    if value is None:
        return ""
    if isinstance(value, Markup):
        return value
    text = str(value)
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def age(seconds: float) -> str:
    """Returns a duration (seconds) in the largest unit that fits, rounded down: "42 s", "3 min", "5 h", "2 d"."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{int(max(0.0, seconds) // divisor)} {unit}"
    return f"{int(seconds // 86_400)} d"


def _tiles(status: NodeReport) -> Sequence[tuple[str, str, str]]:
    """Returns the name, the value and the colour of each tile. A device of several resources is counted once."""
    devices = {row.id: row for row in reversed(status.devices)}.values()
    here = sum(row.here for row in devices)
    elsewhere = sum(not row.here and row.holder not in (None, status.node) for row in devices)
    free = sum(row.healthy and not row.here for row in devices)
    up = sum(row.reachable for row in status.servers)
    return (
        ("available", str(free), "good" if free else ""),
        ("in use here", str(here), "accent" if here else ""),
        ("in use elsewhere", str(elsewhere), ""),
        ("unavailable", str(max(0, len(devices) - free - here - elsewhere)), ""),
        ("servers reachable", f"{up} of {len(status.servers)}", "bad" if up < len(status.servers) else ""),
    )


def _identity(row: DeviceRow) -> str:
    """Returns the USB ID, the serial number and the selector of a device, without a selector of exactly this USB ID."""
    vendor, _, product = (row.usb_id or "").partition(":")
    implied = row.selector == f"vendor {vendor}, product {product}"
    return " · ".join(part for part in (row.usb_id, row.serial, None if implied else row.selector) if part)


def _state_pill(row: DeviceRow) -> tuple[str, str]:
    if row.here:
        return ("accent" if row.healthy else "bad"), row.state
    return ("good", "Available") if row.healthy else ("warn" if row.holder else "bad", "Unavailable")
