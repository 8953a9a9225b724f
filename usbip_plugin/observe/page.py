"""The status page as HTML: the state of the node for an operator, and the last traces as bars."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib import resources

from usbip_plugin.model import Reason
from usbip_plugin.observe.html import NOTHING, Markup, age, facts, join, more, pill, section, table, tag
from usbip_plugin.observe.status import DeviceRow, RegistrationRow, ServerRow, Status
from usbip_plugin.observe.traces import GAP_WIDTH, WIDTH, Bar, Summary, Waterfall, duration, lay_out, summary
from usbip_plugin.observe.tracing import SpanRecord

MAX_BARS = 60
"""Bars of one trace on the page. /api/traces/ID has all spans."""
COLOURS = 6
"""Colours of the nodes in a waterfall. Further nodes use them again, in turn."""
BAR_HEIGHT = 14
"""In units of the drawing."""
ABOUT_THE_DEVICE = frozenset({"usbip.device.id", "usbip.device", "usbip.server", "usbip.busid"})
"""Attributes that are equal in all spans of a trace about one device. The trace's first line has the device instead."""


def draw_trace(spans: Sequence[SpanRecord], about: Summary, device: str | None, *, opened: bool) -> Markup:
    """Returns a trace as an element that can be opened and closed.

    device: its name, or None if it is not known. opened: whether the trace is open at first.
    """
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


TEMPLATE = "page.html"
MAIN, TITLE = "<!-- main -->", "<!-- title -->"
MAX_ROWS = 500
"""Rows of the table of devices. /api/devices has all."""
MAX_TRACES = 20
"""Traces on the page, the newest ones."""
SAID_ELSEWHERE = frozenset({Reason.HELD_ELSEWHERE.value, Reason.ATTACHED.value})
"""Reasons whose detail the other columns of the table show already."""


class Template:
    """The file page.html and its Content-Security-Policy.

    The policy allows only the style and the script in the file, images in data: URLs, and requests to the same origin.
    """

    def __init__(self, html: str) -> None:
        self._head, _, self._tail = html.partition(MAIN)
        hashes = {
            name: " ".join(
                f"'sha256-{_digest(part)}'" for part in re.findall(f"<{name}>(.*?)</{name}>", html, re.DOTALL)
            )
            for name in ("style", "script")
        }
        self.policy = (
            f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    @classmethod
    def load(cls) -> Template:
        return cls(
            resources.files(__package__ or "usbip_plugin.observe").joinpath(TEMPLATE).read_text(encoding="utf-8")
        )

    def fill(self, title: Markup, main: Markup) -> bytes:
        return (self._head.replace(TITLE, title) + main + self._tail).encode()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


class Page:
    """Renderer of a Status and the last traces as HTML.

    Rendering takes some milliseconds, because a trace that has no new span is not drawn anew.
    """

    def __init__(self) -> None:
        self._drawn: dict[tuple[str, int, str | None, bool], Markup] = {}

    @cached_property
    def _template(self) -> Template:
        return Template.load()

    @property
    def policy(self) -> str:
        """Value of the Content-Security-Policy header."""
        return self._template.policy

    def whole(self, status: Status, traces: Sequence[Sequence[SpanRecord]]) -> bytes:
        """Returns the whole HTML document. traces: the oldest first."""
        return self._template.fill(join(status.node, " · usbip-plugin"), self.main(status, traces))

    def main(self, status: Status, traces: Sequence[Sequence[SpanRecord]]) -> Markup:
        """Returns the content of <main>, which changes. The page's script fetches it periodically."""
        return join(
            _header(status),
            _banners(status),
            _tiles(status),
            section("devices", "Devices", _devices(status)),
            section("traces", "Last traces", self._traces(traces, {row.id: row.device for row in status.devices})),
            tag(
                "div",
                section("servers", "USB/IP servers", _servers(status.servers)),
                section("kubelet", "Kubelet", _registrations(status.registrations)),
                section("locks", "Locks", _locks(status)),
                section("config", "Configuration", _config(status)),
                _class="grid",
                id="parts",
            ),
        )

    def _traces(self, traces: Sequence[Sequence[SpanRecord]], names: Mapping[str, str]) -> Markup:
        shown = [spans for spans in reversed(traces) if spans][:MAX_TRACES]
        if not shown:
            none = "Nothing has happened yet. Each Allocate, with all that follows of it, is one trace."
            return tag("p", none, _class="muted empty")
        before, self._drawn = self._drawn, {}
        for index, spans in enumerate(shown):
            about = summary(spans)
            device = names.get(about.device, about.device) if about.device is not None else None
            key = (about.trace_id, len(spans), device, index == 0)
            self._drawn[key] = before.get(key) or draw_trace(spans, about, device, opened=index == 0)
        return tag("div", *self._drawn.values(), _class="traces")


def _header(status: Status) -> Markup:
    badges = (
        pill("good", "alive") if not status.not_alive else pill("bad", "stuck"),
        pill("good", "ready") if not status.not_ready else pill("warn", "not ready"),
    )
    return tag(
        "header",
        tag("div", tag("h1", status.node), tag("p", "usbip-plugin ", status.version, _class="muted"), _class="who"),
        tag("div", *badges, _class="badges"),
        tag(
            "p",
            "up ",
            age(status.uptime),
            " · as of ",
            tag("time", status.now[11:19], datetime=status.now),
            " UTC",
            _class="muted when",
        ),
        id="head",
    )


def _banners(status: Status) -> Markup:
    found = []
    if status.config.problems:
        when = f" since {status.config.failed[11:19]} UTC" if status.config.failed else ""
        title = (
            f"The configuration file cannot be used{when}; the one loaded at {status.config.loaded[11:19]} UTC stays"
        )
        found.append(_banner("bad", title, status.config.problems))
    if not status.locks.reachable and status.locks.read:
        title = f"The API server does not answer, for {age(status.locks.reachable_for)}; what is attached stays"
        found.append(_banner("bad", title, [status.locks.error or ""]))
    if status.not_alive:
        found.append(_banner("bad", "A loop of the plugin does not turn", status.not_alive))
    if status.not_ready:
        found.append(_banner("warn", "Not ready yet", status.not_ready))
    return tag("div", *found, id="banners", role="status") if found else tag("div", id="banners", role="status")


def _banner(kind: str, title: str, lines: Iterable[str]) -> Markup:
    items = [tag("li", line) for line in lines if line]
    return tag("div", tag("strong", title), tag("ul", *items) if items else None, _class=f"banner {kind}")


def _tiles(status: Status) -> Markup:
    devices = {row.id: row for row in reversed(status.devices)}.values()
    here = sum(row.here for row in devices)
    elsewhere = sum(not row.here and row.holder not in (None, status.node) for row in devices)
    free = sum(row.healthy and not row.here for row in devices)
    up = sum(row.reachable for row in status.servers)
    tiles = (
        ("free to use", str(free), "good" if free else ""),
        ("in use here", str(here), "accent" if here else ""),
        ("in use elsewhere", str(elsewhere), ""),
        ("not to be had", str(max(0, len(devices) - free - here - elsewhere)), ""),
        ("servers answer", f"{up} of {len(status.servers)}", "bad" if up < len(status.servers) else ""),
    )
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value, _class=kind or None)) for name, value, kind in tiles),
        _class="tiles",
        id="tiles",
    )


def _devices(status: Status) -> Markup:
    if not status.devices:
        return tag("p", "No device is known yet.", _class="muted empty")
    head = ("Device", "Resource", "State", "Why", "Held by", "Since (UTC)", "Epoch", "Port")
    rows = [_device(row, status) for row in status.devices[:MAX_ROWS]]
    return join(table("Devices this node offers", head, rows), more(len(status.devices) - MAX_ROWS, "/api/devices"))


def _device(row: DeviceRow, status: Status) -> tuple[str, Sequence[Markup]]:
    # a selector of exactly these ids adds nothing to usb_id
    vendor, _, product = (row.usb_id or "").partition(":")
    implied = row.selector == f"vendor {vendor}, product {product}"
    about = " · ".join(part for part in (row.usb_id, row.serial, None if implied else row.selector) if part)
    shown_elsewhere = row.reason in SAID_ELSEWHERE or not row.detail
    why = join(row.reason, None if shown_elsewhere else tag("small", row.detail))
    holder = tag("strong", row.holder) if row.holder == status.node else join(row.holder)
    domain, _, name = row.resource.rpartition("/")
    cells = (
        join(tag("span", row.device, _class="mono"), tag("small", about, title=f"selector: {row.selector}")),
        join(name, tag("small", domain) if domain else None),
        _state(row),
        why,
        join(holder, tag("small", f"pod {row.pod}") if row.pod else None),
        tag("time", row.since[11:19], tag("small", row.since[:10]), datetime=row.since) if row.since else NOTHING,
        join(row.epoch),
        join(row.port),
    )
    return f"{row.resource}-{row.id}", cells


def _state(row: DeviceRow) -> Markup:
    if row.here:
        return pill("accent" if row.healthy else "bad", row.state)
    return pill("good", "Available") if row.healthy else pill("warn" if row.holder else "bad", "Unavailable")


def _servers(servers: Sequence[ServerRow]) -> Markup:
    if not servers:
        return tag("p", "The configuration names no server.", _class="muted empty")
    rows = []
    for row in servers:
        kind = "good" if row.reachable else "warn" if row.error is None else "bad"
        why = tag("small", row.error, _class="bad") if row.error else None
        answered = f"{age(row.answered)} ago" if row.answered is not None else "never"
        cells = (
            join(tag("span", row.server, _class="mono"), why),
            pill(kind, row.state),
            join(row.devices),
            join(answered),
        )
        rows.append((row.server, cells))
    return table("USB/IP servers", ("Server", "State", "Lists", "Last answer"), rows)


def _registrations(registrations: Sequence[RegistrationRow]) -> Markup:
    if not registrations:
        return tag("p", "Nothing to register.", _class="muted empty")
    rows = []
    for row in registrations:
        state = pill("good", "registered") if row.registered else pill("warn", "not registered")
        why = tag("small", row.error, _class="bad") if row.error and not row.registered else None
        rows.append((row.resource, (join(row.resource, why), state, join(row.registrations))))
    return table("Registrations with the kubelet", ("Resource", "State", "Times"), rows)


def _locks(status: Status) -> Markup:
    locks = status.locks
    since = f" for {age(locks.reachable_for)}"
    answer = pill("good", f"answers{since}") if locks.reachable else pill("bad", f"no answer{since}")
    if locks.heartbeat is not None:
        session = f"written {age(locks.heartbeat)} ago"
    else:
        session = "none yet" if locks.held else "none needed: nothing is held here"
    return facts(
        ("API server", answer),
        ("Locks", join("read" if locks.read else "not read yet", f", {locks.known} known, {locks.held} held here")),
        ("Session", join(session)),
        ("A lock lasts", join(f"{locks.duration:g} s without a sign of life")),
        ("Error", tag("span", locks.error, _class="bad") if locks.error else None),
    )


def _config(status: Status) -> Markup:
    config = status.config
    warnings = tag("ul", *(tag("li", line) for line in config.warnings)) if config.warnings else None
    count = f"{config.resources} resource{'' if config.resources == 1 else 's'}"
    return facts(
        ("File", tag("span", config.path, _class="mono")),
        ("Loaded", join(count, " at ", tag("time", config.loaded[11:19], datetime=config.loaded), " UTC")),
        ("The file now", pill("bad", "not usable, see above") if config.problems else pill("good", "in use")),
        ("Warnings", warnings),
    )
