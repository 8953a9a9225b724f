"""The pages of the HTTP server: liveness, readiness, metrics and status. The status page is loaded on first use.

Making a page takes at most a fifth of the event loop, however many peers ask: one page is made at a time, in slices,
and each at most once in MADE_EVERY_S, for all who wait for it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.observe.http import Answer, PageHandler
from usbip_plugin.observe.liveness import Verdict
from usbip_plugin.observe.status import SCHEMA, rows_as_json
from usbip_plugin.sync import Steps, in_slices

if TYPE_CHECKING:
    from usbip_plugin.observe.page import Page
    from usbip_plugin.observe.status import ClusterReport, NodeReport
    from usbip_plugin.observe.tracing import RecentSpans  # the SDK of OpenTelemetry, not for the exporter

T = TypeVar("T")

MADE_EVERY_S = 1.0
"""Least seconds between two makings of one page."""
JSON_PARTS = 200
"""Parts of a JSON text, such as one value, that are made in one step: a tenth of a millisecond."""
JSON = "application/json"
HTML = "text/html; charset=utf-8"
FRAGMENT_POLICY = "default-src 'none'; sandbox"
TRACES = "/api/traces"
_TRACE_ID = re.compile("[0-9a-f]{32}")


def verdict_page(verdict: Callable[[], Verdict]) -> PageHandler:
    """Returns a page that answers 200 "ok", or 503 with the reasons."""

    def page() -> Answer:
        result = verdict()
        if result.ok:
            return Answer(b"ok\n")
        return Answer(("\n".join(result.lines or ("not ok",)) + "\n").encode(), status=503)

    return page


def probe_pages(alive: Callable[[], Verdict], ready: Callable[[], Verdict]) -> dict[str, PageHandler]:
    """Returns the pages for probes by path. /health is the Go program's path for /healthz."""
    health = verdict_page(alive)
    return {"/healthz": health, "/health": health, "/readyz": verdict_page(ready)}


class Site:
    """The metrics, the status page and the JSON under /api.

    status, cluster: return this node, and the devices of the cluster, as they are now.
    metrics: Metrics.render.
    recent: the last traces, RECENT_TRACES at most. Only these are served.
    trace_link: as Page has it.
    """

    def __init__(
        self,
        status: Callable[[], Steps[NodeReport]],
        cluster: Callable[[], Steps[ClusterReport]],
        metrics: Callable[[], Steps[tuple[bytes, str]]],
        recent: RecentSpans,
        clock: Clock,
        *,
        trace_link: str = "",
    ) -> None:
        self._trace_link = trace_link
        self._status, self._cluster, self._metrics = status, cluster, metrics
        self._recent, self._clock = recent, clock
        self._page: Page | None = None
        self._making = asyncio.Lock()

    def pages(self) -> dict[str, PageHandler]:
        """Returns the pages by path."""
        pages: dict[str, PageHandler] = {
            "/": partial(self._html, self._node_html, whole=True),
            "/cluster": partial(self._html, self._cluster_html, whole=True),
            "/api/page": partial(self._html, self._node_html, whole=False),
            "/api/page/cluster": partial(self._html, self._cluster_html, whole=False),
            "/api/status": lambda: self._make(self._status_json()),
            "/api/devices": lambda: self._make(self._devices_json()),
            "/api/cluster": lambda: self._make(self._cluster_json()),
            TRACES: lambda: self._make(self._traces()),
            "/metrics": lambda: self._make(self._metrics_text()),
        }
        return {path: Paced(make, self._clock) for path, make in pages.items()}

    def below(self) -> Mapping[str, Callable[[str], Awaitable[Answer]]]:
        """Returns the pages below a path, as HttpServer takes them."""
        return {f"{TRACES}/": lambda trace_id: self._make(self._trace(trace_id))}

    async def _make(self, steps: Steps[T]) -> T:
        async with self._making:
            return await in_slices(steps, self._clock)

    async def _load(self) -> Page:
        """Returns the page. The first visit imports and compiles it, in a thread because this takes 120 ms."""

        def load() -> Page:
            from usbip_plugin.observe.page import Page  # noqa: PLC0415 - the page of most nodes is never opened

            return Page(self._trace_link)

        if self._page is None:
            self._page = await asyncio.to_thread(load)
        return self._page

    async def _html(self, render: Callable[[Page, bool], Steps[bytes]], *, whole: bool) -> Answer:
        page = await self._load()
        body = await self._make(render(page, whole))
        # a browser that opens a fragment must not run a script that a device may have put into it
        return Answer(body, HTML, headers={"Content-Security-Policy": page.policy if whole else FRAGMENT_POLICY})

    def _node_html(self, page: Page, whole: bool) -> Steps[bytes]:
        status = yield from self._status()
        traces = self._recent.traces()
        yield
        return (yield from page.node(status, traces, whole=whole))

    def _cluster_html(self, page: Page, whole: bool) -> Steps[bytes]:
        return (yield from page.cluster((yield from self._cluster()), whole=whole))

    def _status_json(self) -> Steps[Answer]:
        status = yield from self._status()
        return (yield from _json((yield from status.as_json())))

    def _devices_json(self) -> Steps[Answer]:
        status = yield from self._status()
        return (yield from _json(_versioned(devices=(yield from rows_as_json(status.devices)))))

    def _cluster_json(self) -> Steps[Answer]:
        report = yield from self._cluster()
        return (yield from _json((yield from report.as_json())))

    def _metrics_text(self) -> Steps[Answer]:
        return Answer(*(yield from self._metrics()))

    def _traces(self) -> Steps[Answer]:
        from usbip_plugin.observe.traces import summary  # noqa: PLC0415 - needed by few nodes

        found = []
        for spans in reversed(self._recent.traces()):
            yield
            found.append(summary(spans).as_json())
        return (yield from _json(_versioned(traces=found)))

    def _trace(self, trace_id: str) -> Steps[Answer]:
        from usbip_plugin.observe.traces import span_json, summary  # noqa: PLC0415

        spans = self._recent.trace(trace_id) if _TRACE_ID.fullmatch(trace_id) else ()
        if not spans:
            return Answer(b"trace not found; /api/traces lists the traces in memory\n", status=404)
        yield
        found = {**summary(spans).as_json(), "spans": [span_json(span) for span in spans]}
        return (yield from _json(_versioned(**found)))


def _versioned(**content: object) -> dict[str, object]:
    return {"schema": SCHEMA, **content}


def _json(value: object) -> Steps[Answer]:
    parts = []
    for part in json.JSONEncoder(indent=1).iterencode(value):
        parts.append(part)
        if len(parts) % JSON_PARTS == 0:
            yield
    return Answer("".join((*parts, "\n")).encode(), JSON)


class Paced:
    """A page that is made for all requests that wait for it, at most once in MADE_EVERY_S. It is never older than they.

    make: makes the page.
    """

    def __init__(self, make: PageHandler, clock: Clock) -> None:
        self._make, self._clock = make, clock
        self._lock = asyncio.Lock()
        self._began = -math.inf
        self._answer = Answer(b"")

    async def __call__(self) -> Answer:
        """Returns the page as it was at the call, or later. Cancel-safe."""
        asked = self._clock.monotonic()
        async with self._lock:
            if self._began < asked:
                left = self._began + MADE_EVERY_S - self._clock.monotonic()
                if left > 0:
                    await self._clock.sleep(left)
                began = self._clock.monotonic()
                answer = self._make()
                self._answer = answer if isinstance(answer, Answer) else await answer
                self._began = began
            return self._answer
