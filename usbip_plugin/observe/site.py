"""What is served under /, /api/status, /api/devices and /api/traces. The page itself is loaded when it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from usbip_plugin.observe.health import JSON, Answer
from usbip_plugin.observe.health import Page as Answering
from usbip_plugin.observe.status import Status
from usbip_plugin.observe.tracing import RecentSpans

if TYPE_CHECKING:
    from usbip_plugin.observe.page import Page

HTML = "text/html; charset=utf-8"
TRACES = "/api/traces"
_TRACE_ID = re.compile("[0-9a-f]{32}")


class Site:
    """status: the node as it is now. recent: the last traces, RECENT_TRACES at most, and so is what is answered."""

    def __init__(self, status: Callable[[], Status], recent: RecentSpans) -> None:
        self._status, self._recent = status, recent
        self._made: Page | None = None

    def pages(self) -> dict[str, Answering]:
        """By path."""
        return {
            "/": self._whole,
            "/api/page": self._main,
            "/api/status": lambda: _json(self._status().as_json()),
            "/api/devices": lambda: _json(self._status().as_json()["devices"]),
            TRACES: self._traces,
        }

    def below(self) -> Mapping[str, Callable[[str], Answer]]:
        """By the beginning of the path; called with the rest."""
        return {f"{TRACES}/": self._trace}

    @property
    def _page(self) -> Page:
        if self._made is None:
            # imported here: most nodes are never looked at
            from usbip_plugin.observe.page import Page  # noqa: PLC0415

            self._made = Page()
        return self._made

    def _whole(self) -> Answer:
        body = self._page.whole(self._status(), self._recent.traces())
        return Answer(body, HTML, headers={"Content-Security-Policy": self._page.policy})

    def _main(self) -> Answer:
        body = self._page.main(self._status(), self._recent.traces()).encode()
        # opened by itself it must not run what a device may have written into it
        return Answer(body, HTML, headers={"Content-Security-Policy": "default-src 'none'; sandbox"})

    def _traces(self) -> Answer:
        from usbip_plugin.observe.waterfall import summary  # noqa: PLC0415 - as the page

        return _json([summary(spans).as_json() for spans in reversed(self._recent.traces()) if spans])

    def _trace(self, trace_id: str) -> Answer:
        from usbip_plugin.observe.waterfall import span_json, summary  # noqa: PLC0415

        spans = self._recent.trace(trace_id) if _TRACE_ID.fullmatch(trace_id) else ()
        if not spans:
            return Answer(b"no such trace is kept; /api/traces lists those that are\n", status=404)
        return _json({**summary(spans).as_json(), "spans": [span_json(span) for span in spans]})


def _json(value: object) -> Answer:
    return Answer(json.dumps(value, indent=1).encode() + b"\n", JSON)
