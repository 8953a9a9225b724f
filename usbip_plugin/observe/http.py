"""The HTTP server and its pages: liveness, readiness, metrics and status. The status page is loaded on first use."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response
from aiohttp.web_server import Server

from usbip_plugin.clock import Clock

if TYPE_CHECKING:
    from usbip_plugin.observe.page import Page
    from usbip_plugin.observe.status import NodeReport
    from usbip_plugin.observe.tracing import RecentSpans  # the SDK of OpenTelemetry, which the exporter does not load

SHUTDOWN_S = 0.5
"""Seconds that requests under way have to finish when the server stops."""
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
METHODS = ("GET", "HEAD")
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a page. content_type may include a charset."""

    body: bytes
    content_type: str = TEXT
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check. lines: why it is not ok, one reason a line."""

    ok: bool
    lines: tuple[str, ...] = ()


PageHandler = Callable[[], Answer | Awaitable[Answer]]
"""Called in the event loop for every request. Must not block and must not raise."""


class Heartbeat:
    """Liveness of the event loop: it is stuck if beat() has not been called for more than `within` seconds."""

    def __init__(self, clock: Clock, within: float) -> None:
        self._clock = clock
        self._within = within
        self._last: float | None = None

    def beat(self) -> None:
        """Records that the loop runs. Before the first beat nothing is expected."""
        self._last = self._clock.monotonic()

    def verdict(self) -> Verdict:
        silent = self._clock.monotonic() - self._last if self._last is not None else 0.0
        if silent <= self._within:
            return Verdict(ok=True)
        line = f"event loop: no heartbeat for {silent:.1f} s, expected one every {self._within:g} s"
        return Verdict(ok=False, lines=(line,))


def verdict_page(verdict: Callable[[], Verdict]) -> PageHandler:
    """Returns a page that answers 200 "ok", or 503 with the reasons."""

    def page() -> Answer:
        result = verdict()
        if result.ok:
            return Answer(b"ok\n")
        return Answer(("\n".join(result.lines or ("not ok",)) + "\n").encode(), status=503)

    return page


def standard_pages(
    *,
    alive: Callable[[], Verdict],
    ready: Callable[[], Verdict],
    metrics: Callable[[], tuple[bytes, str]],
) -> dict[str, PageHandler]:
    """Returns the pages by path. /health is the Go program's path for /healthz. metrics: Metrics.render."""
    health = verdict_page(alive)
    return {
        "/healthz": health,
        "/health": health,
        "/readyz": verdict_page(ready),
        "/metrics": lambda: Answer(*metrics()),
    }


def split_listen(listen: str) -> tuple[str | None, int]:
    """Returns the host (None: every address) and the port of ":8080", "127.0.0.1:8080" or "[::1]:8080".

    Raises ValueError for any other form.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{listen!r} is not a valid listen address; use :8080 or 127.0.0.1:8080")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{listen!r} is not a valid listen address; an IPv6 address must be in brackets: [::1]:8080")
    return host or None, int(port)


class HttpServer:
    """HTTP server of the pages. Works only while run() runs.

    listen: as split_listen() accepts it. Port 0 picks a free port.
    pages: by path.
    below: pages by the beginning of their path, which ends in "/"; called with the rest of the path.
    started: set while the server serves.
    port: the port that is bound, known once `started` is set.
    """

    def __init__(
        self, listen: str, pages: Mapping[str, PageHandler], below: Mapping[str, Callable[[str], Answer]] | None = None
    ) -> None:
        self._host, self._port = split_listen(listen)
        self._pages = dict(pages)
        self._below = dict(below or {})
        self.started = asyncio.Event()
        self.port = 0

    async def run(self) -> None:
        """Serves until cancelled, then stops within about SHUTDOWN_S. Raises OSError if the address cannot be bound."""
        loop = asyncio.get_running_loop()
        server = Server(self._answer, access_log=None)
        listener = await loop.create_server(server, self._host, self._port, reuse_address=True)
        try:
            self.port = int(listener.sockets[0].getsockname()[1])
            self.started.set()
            await loop.create_future()
        finally:
            self.started.clear()
            listener.close()
            server.pre_shutdown()
            await server.shutdown(SHUTDOWN_S)

    async def _answer(self, request: BaseRequest) -> Response:
        page = self._find(request.path)
        if page is None:
            return Response(text="page not found\n", status=404)
        if request.method not in METHODS:
            return Response(status=405, headers={"Allow": ", ".join(METHODS)})
        answer = page()
        if not isinstance(answer, Answer):
            answer = await answer
        return Response(
            body=answer.body,
            status=answer.status,
            headers={"Content-Type": answer.content_type, **HEADERS, **answer.headers},
        )

    def _find(self, path: str) -> PageHandler | None:
        if (page := self._pages.get(path)) is not None:
            return page
        for beginning, below in self._below.items():
            if path.startswith(beginning):
                return lambda: below(path.removeprefix(beginning))
        return None


HTML = "text/html; charset=utf-8"
TRACES = "/api/traces"
_TRACE_ID = re.compile("[0-9a-f]{32}")


class Site:
    """The status page and the JSON under /api.

    status: returns the node as it is now.
    recent: the last traces, RECENT_TRACES at most. Only these are served.
    """

    def __init__(self, status: Callable[[], NodeReport], recent: RecentSpans) -> None:
        self._status, self._recent = status, recent
        self._page: Page | None = None

    def pages(self) -> dict[str, PageHandler]:
        """Returns the pages by path."""
        return {
            "/": self._whole,
            "/api/page": self._main,
            "/api/status": lambda: _json(self._status().as_json()),
            "/api/devices": lambda: _json(self._status().as_json()["devices"]),
            TRACES: self._traces,
        }

    def below(self) -> Mapping[str, Callable[[str], Answer]]:
        """Returns the pages below a path, as HttpServer takes them."""
        return {f"{TRACES}/": self._trace}

    async def _load(self) -> Page:
        """Returns the page. The first visit imports and compiles it, in a thread because this takes 120 ms."""

        def load() -> Page:
            from usbip_plugin.observe.page import Page  # noqa: PLC0415 - the page of most nodes is never opened

            return Page()

        if self._page is None:
            self._page = await asyncio.to_thread(load)
        return self._page

    async def _whole(self) -> Answer:
        page = await self._load()
        body = page.whole(self._status(), self._recent.traces())
        return Answer(body, HTML, headers={"Content-Security-Policy": page.policy})

    async def _main(self) -> Answer:
        body = (await self._load()).main(self._status(), self._recent.traces())
        # a browser that opens it directly must not run a script that a device may have put into it
        return Answer(body, HTML, headers={"Content-Security-Policy": "default-src 'none'; sandbox"})

    def _traces(self) -> Answer:
        from usbip_plugin.observe.traces import summary  # noqa: PLC0415 - needed by few nodes

        return _json([summary(spans).as_json() for spans in reversed(self._recent.traces()) if spans])

    def _trace(self, trace_id: str) -> Answer:
        from usbip_plugin.observe.traces import span_json, summary  # noqa: PLC0415

        spans = self._recent.trace(trace_id) if _TRACE_ID.fullmatch(trace_id) else ()
        if not spans:
            return Answer(b"trace not found; /api/traces lists the traces in memory\n", status=404)
        return _json({**summary(spans).as_json(), "spans": [span_json(span) for span in spans]})


def _json(value: object) -> Answer:
    return Answer(json.dumps(value, indent=1).encode() + b"\n", JSON)
