"""The status page as HTML: the node and the cluster for an operator, and the last traces as bars.

Imported on the first visit only: jinja2 and the templates take 5 MiB.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import TypeVar

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from usbip_plugin.model import TRACE_ID, InterfaceClass, Reason, described
from usbip_plugin.observe.status import ClusterReport, DeviceRow, NodeReport, Report
from usbip_plugin.observe.traces import GAP_WIDTH, WIDTH, duration, lay_out, summary
from usbip_plugin.observe.tracing import SpanRecord
from usbip_plugin.sync import Steps

T = TypeVar("T")

PAGE, NODE, CLUSTER, PARTS, TRACE = "page.html", "node.html", "cluster.html", "parts.html", "trace.html"
"""The templates: the whole document with its style and script, the contents of <main>, and macros for them."""
MAX_BARS = 60
"""Bars of one trace on the page. /api/traces/ID has all spans."""
MAX_ROWS = 500
"""Rows of a table of devices. /api/devices and /api/cluster have all."""
BATCH = 16
"""Rows or bars that are rendered in one step: half a millisecond."""
MAX_GAPS = 6
"""Lengths of shortened pauses that the legend of a trace lists."""
MAX_LINES = 10
"""Pods without their device that the banner lists."""
MAX_TRACES = 20
"""Traces on the page, the newest ones."""
COLOURS = 6
"""Colours of the nodes in a waterfall. Further nodes use them again, in turn."""
ABOUT_THE_DEVICE = frozenset({"usbip.device.id", "usbip.device", "usbip.server", "usbip.busid"})
"""Attributes that are equal in all spans of a trace about one device. The trace's first line shows the device."""
SHOWN_ELSEWHERE = frozenset({Reason.HELD_ELSEWHERE.value, Reason.ATTACHED.value})
"""Reasons whose detail the other columns of the table show already."""


class Page:
    """Renderer of a node with its last traces, and of the cluster, as HTML.

    trace_link: URL of a trace in another program, with TRACE_ID for its ID; "" for none.
    policy: value of the Content-Security-Policy header. It allows only the style and the script in page.html, images
    in data: URLs, and requests to the same origin.
    Rendering takes some milliseconds, because a trace is drawn again only if it has a new span. One page is rendered at
    a time.
    """

    def __init__(self, trace_link: str = "") -> None:
        environment = Environment(
            loader=FunctionLoader(_source),
            autoescape=True,
            finalize=_printable,
            undefined=StrictUndefined,
            auto_reload=False,
        )
        environment.filters.update(
            age=age,
            duration=duration,
            identity=_identity,
            interface=_interface,
            attributes=_attributes,
            percent=_percent,
        )
        environment.globals.update(
            COLOURS=COLOURS,
            GAP_WIDTH=GAP_WIDTH,
            MAX_BARS=MAX_BARS,
            MAX_ROWS=MAX_ROWS,
            MAX_GAPS=MAX_GAPS,
            MAX_LINES=MAX_LINES,
            SHOWN_ELSEWHERE=SHOWN_ELSEWHERE,
            state_pill=_state_pill,
            trace_url=partial(trace_link.replace, TRACE_ID),
        )
        self._templates = {name: environment.get_template(name) for name in (PAGE, NODE, CLUSTER, PARTS, TRACE)}
        self._drawn: dict[tuple[str, int, str | None, bool], Markup] = {}
        self.policy = _policy(_source(PAGE))

    def node(self, status: NodeReport, traces: Sequence[Sequence[SpanRecord]], *, whole: bool) -> Steps[bytes]:
        """Returns the page of this node: the document, or the content of <main>, which the script fetches periodically.

        traces: the oldest first.
        """
        names = {row.id: row.device for row in status.devices}
        drawn = yield from self._draw([spans for spans in reversed(traces) if spans][:MAX_TRACES], names)
        devices = yield from _batches(status.devices[:MAX_ROWS], partial(self._macro("device_rows"), status.node))
        servers = yield from _batches(status.servers, self._macro("server_rows"))
        events = yield from _batches(status.events, self._macro("event_rows"))
        values = {
            "tiles": node_tiles(status),
            "without": tuple(without_device(status.devices).items()),
            "hint": hint(status),
            "traces": drawn,
            "device_rows": devices,
            "server_rows": servers,
            "event_rows": events,
        }
        yield
        return (yield from self._page(NODE, "api/page", status, values, whole=whole))

    def cluster(self, report: ClusterReport, *, whole: bool) -> Steps[bytes]:
        """Returns the page of the cluster, as node() does."""
        links = {row.node: row.url for row in report.nodes if row.url is not None}
        rows = yield from _batches(report.devices[:MAX_ROWS], partial(self._macro("lock_rows"), report.node, links))
        nodes = yield from _batches(report.nodes[:MAX_ROWS], partial(self._macro("node_rows"), report.node))
        values = {"tiles": cluster_tiles(report), "lock_rows": rows, "node_rows": nodes}
        yield
        return (yield from self._page(CLUSTER, "api/page/cluster", report, values, whole=whole))

    def _page(
        self, content: str, refresh: str, status: Report, values: Mapping[str, object], *, whole: bool
    ) -> Steps[bytes]:
        """refresh: the path of the content, relative to the page, so that it is right behind a proxy, too."""
        template = self._templates[PAGE if whole else content]
        pieces = []
        for piece in template.generate(values, content=content, refresh=refresh, status=status):
            pieces.append(piece.encode())
            yield
        return b"".join(pieces)

    def _macro(self, name: str) -> Callable[..., Markup]:
        modules = (vars(self._templates[template].module) for template in (PARTS, TRACE))
        macro: Callable[..., Markup] = next(module[name] for module in modules if name in module)
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
        shown = fall.bars[:MAX_BARS]
        bars = yield from _batches(shown, partial(self._macro("trace_bars"), fall))
        notes = yield from _batches(shown, partial(self._macro("trace_notes"), hidden))
        return self._macro("trace")(about, fall, bars, notes, device, opened)


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


def without_device(rows: Sequence[DeviceRow]) -> Mapping[str, DeviceRow]:
    """Returns the pods of this node that have lost a device, each with one such device. A pod may be unknown yet."""
    return {row.pod_here or f"pod of {row.device}": row for row in reversed(rows) if row.lost}


def node_tiles(status: NodeReport) -> Sequence[tuple[str, str, str]]:
    """Returns the name, the value and the colour of each tile. A device of several resources is counted once."""
    devices = {row.id: row for row in reversed(status.devices)}.values()
    here = sum(row.here and not row.lost for row in devices)
    elsewhere = sum(not row.here and row.holder not in (None, status.node) for row in devices)
    free = sum(row.healthy and not row.here for row in devices)
    without = len(without_device(status.devices))
    unavailable = max(0, len(devices) - free - here - elsewhere)
    up = sum(row.reachable for row in status.servers)
    return (
        ("pods without device" if without != 1 else "pod without device", str(without), "bad" if without else ""),
        ("available", str(free), "good" if free else ""),
        ("in use here", str(here), "accent" if here else ""),
        ("in use elsewhere", str(elsewhere), ""),
        ("unavailable", str(unavailable), "bad" if unavailable else ""),
        ("servers reachable", f"{up} of {len(status.servers)}", "bad" if up < len(status.servers) else ""),
    )


def cluster_tiles(report: ClusterReport) -> Sequence[tuple[str, str, str]]:
    held = sum(row.holder is not None for row in report.devices)
    nodes = sum(row.held > 0 for row in report.nodes)
    return (
        ("devices", str(len(report.devices)), ""),
        ("in use", str(held), "accent" if held else ""),
        ("not in use", str(len(report.devices) - held), ""),
        ("nodes with devices in use", f"{nodes} of {len(report.nodes)}", ""),
    )


def hint(status: NodeReport) -> str:
    """Returns what to do so that this node offers a device. "" if it offers one."""
    if status.devices:
        return ""
    if not status.config.resources:
        return f"Add a resource for this node to {status.config.path}, or to the ConfigMap that it comes from."
    if not any(row.reachable for row in status.servers):
        return "No server has answered. Start usbipd or usbip-plugin export there, and open its port in the firewall."
    listed = sum(row.devices - row.hubs for row in status.servers)
    if not listed:
        return "The servers export no device. Plug one in, and run on its server: usbip bind -b BUSID"
    return f"No selector matches the devices that the servers export ({listed}). Compare with: usbip list -r SERVER"


def _identity(row: DeviceRow) -> str:
    """Returns the USB ID and the selector of a device, without a selector of exactly this USB ID."""
    vendor, _, product = (row.usb_id or "").partition(":")
    implied = row.selector == f"vendor {vendor}, product {product}"
    return " · ".join(part for part in (row.usb_id, None if implied else row.selector) if part)


def _interface(code: str) -> str:
    """Returns an interface in words; a text that is not a code as it is."""
    try:
        return described(InterfaceClass.parse(code))
    except ValueError:
        return code


def _percent(units: float) -> str:
    return f"{units * 100 / WIDTH:.2f}%"


def _attributes(span: SpanRecord, hidden: Collection[str]) -> str:
    return " · ".join(f"{key}={value}" for key, value in sorted(span.attributes.items()) if key not in hidden)


def _state_pill(row: DeviceRow) -> tuple[str, str]:
    if row.here:
        return ("accent" if row.healthy else "bad"), row.state
    return ("good", "Available") if row.healthy else ("warn" if row.holder else "bad", "Unavailable")
