"""Tracing with OpenTelemetry: a tracer provider for each node, trace context as text, the last traces in memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, Sampler, SamplingResult
from opentelemetry.sdk.version import __version__ as sdk_version
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracer,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
)
from opentelemetry.util.types import Attributes

from usbip_plugin.observe.redaction import redacted
from usbip_plugin.observe.spans import is_untraced

if TYPE_CHECKING:
    from usbip_plugin.observe.otlp import OtlpExport

SERVICE_NAME = "usbip-plugin"
NODE_ATTRIBUTE = "k8s.node.name"
DISABLED_VARIABLE = "OTEL_SDK_DISABLED"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
SAMPLER_VARIABLE = "OTEL_TRACES_SAMPLER"
SHUTDOWN_S = 0.8
"""Seconds for the last export at the end. Spans not exported by then are lost."""
RECENT_TRACES = 64
"""Traces that are kept in memory."""
MAX_SPANS_PER_TRACE = 128
"""Spans that are kept of one trace."""
RECENT_SPANS = 2048
"""Spans that are kept of all traces together: 2 MiB. The trace of an Allocate has about 8 spans."""
MAX_UNREAD_SPANS = 128
"""Spans that are kept as SDK objects until somebody reads them. Each has 3 KB, twice as much as its SpanRecord."""
MAX_EVENTS_PER_SPAN = 16
"""Events that are kept of one span, the last ones."""
MAX_TEXT_CHARACTERS = 256
"""Characters that are kept of a name, an attribute or an error."""

log = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_MAX_TRACEPARENT_CHARACTERS = 128
_STACK = "exception.stacktrace"


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """An event within a span, such as an exception. at_ns: nanoseconds since the epoch."""

    name: str
    at_ns: int
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A span that has ended.

    node: the node whose provider made the span.
    trace_id, span_id, parent_id: hexadecimal digits, 32 for the trace and 16 for a span.
    start_ns, end_ns: nanoseconds since the epoch.
    error: the status description, which may be ""; None if the span did not fail.
    links: the IDs of other traces.
    kind: internal, server, client, producer or consumer.
    events: the last MAX_EVENTS_PER_SPAN, without stack traces.
    """

    name: str
    node: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    links: tuple[str, ...] = ()
    kind: str = "internal"
    events: tuple[SpanEvent, ...] = ()

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(slots=True)
class KeptSpan:
    """A span that has ended: the SDK's object until it is first read, then a SpanRecord."""

    span: ReadableSpan | None
    record: SpanRecord | None = None

    def read(self) -> SpanRecord | None:
        """Returns the record of the span, or None if the span was forgotten unread."""
        if self.span is not None:
            self.record, self.span = _record(self.span), None
        return self.record


class RecentSpans(SpanProcessor):
    """Span processor that keeps the last traces in memory.

    Keeps at most `traces` traces, MAX_SPANS_PER_TRACE spans of each (the first and the last) and RECENT_SPANS in all.
    If traces have many spans, fewer traces are kept. They can be read after shutdown(), too.
    Thread-safe. The providers of several nodes may share one; a trace then has the spans of all these nodes.
    """

    def __init__(self, traces: int = RECENT_TRACES) -> None:
        self._limit = traces
        self._traces: OrderedDict[str, list[KeptSpan]] = OrderedDict()
        self._spans = 0
        self._unread: deque[KeptSpan] = deque()
        self._lock = threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        trace_id = f"{context.trace_id if context else 0:032x}"
        # most spans are about devices of other nodes and are forgotten unread: they are not converted now
        kept = KeptSpan(None, _record(span)) if span.events else KeptSpan(span)  # an event may have a long stack trace
        with self._lock:
            spans = self._traces.setdefault(trace_id, [])
            self._traces.move_to_end(trace_id)
            spans.append(kept)
            self._spans += 1
            if len(spans) > MAX_SPANS_PER_TRACE:
                # the first and the last spans of a trace are more useful than those in the middle
                self._forget([spans.pop(MAX_SPANS_PER_TRACE // 2)])
            while len(self._traces) > self._limit or self._spans > RECENT_SPANS:
                self._forget(self._traces.popitem(last=False)[1])
            self._unread.append(kept)
            if len(self._unread) > MAX_UNREAD_SPANS:
                self._unread.popleft().read()

    def _forget(self, spans: Sequence[KeptSpan]) -> None:
        self._spans -= len(spans)
        for kept in spans:
            kept.span = None

    def traces(self) -> tuple[tuple[SpanRecord, ...], ...]:
        """Returns the traces kept: the one with the newest span is the last. Spans are in the order they ended."""
        with self._lock:
            return tuple(map(_read, self._traces.values()))

    def trace(self, trace_id: str) -> tuple[SpanRecord, ...]:
        """Returns the spans of the trace with this ID (32 hexadecimal digits), or none if it is not kept."""
        with self._lock:
            return _read(self._traces.get(trace_id, ()))


class _Recorded(Sampler):
    """Sampler that records what `inner` drops for RecentSpans only, and drops what begins in an untraced() block."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if is_untraced(parent_context):
            return SamplingResult(Decision.DROP)
        result = self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        if result.decision is Decision.DROP:
            return SamplingResult(Decision.RECORD_ONLY, result.attributes, result.trace_state)
        return result

    def get_description(self) -> str:
        return f"Recorded{{{self._inner.get_description()}}}"


class Tracing:
    """The tracer of one node, configured by the OTEL_ variables of the OpenTelemetry specification.

    recent: the traces kept in memory; shared with other nodes if given.
    A variable that is not valid is logged and switches off the feature that it configures. No mistake in a
    variable stops the plugin.
    """

    def __init__(
        self, node: str, *, version: str, environ: Mapping[str, str] | None = None, recent: RecentSpans | None = None
    ) -> None:
        """Sets up the tracer. environ: replaces os.environ here, but not in the SDK."""
        environ = os.environ if environ is None else environ
        self.recent = RecentSpans() if recent is None else recent
        self._export: OtlpExport | None = None
        self._provider: TracerProvider | None = None
        self.tracer: Tracer = NoOpTracer()
        if environ.get(DISABLED_VARIABLE, "").strip().lower() == "true":
            return
        try:
            self._provider = _provider(node, version, environ)
        except ValueError as error:
            log.error("tracing is off: a setting is not valid", extra={"cause": str(error)})  # noqa: TRY400 - no traceback
            return
        self._provider.add_span_processor(self.recent)
        if _wants_export(environ):
            self._export = _export(environ)
        if self._export is not None:
            self._provider.add_span_processor(self._export)
        self.tracer = self._provider.get_tracer(SERVICE_NAME, version)

    @property
    def export_failures(self) -> int:
        """Number of batches of spans that no collector accepted."""
        return self._export.exporter.failures if self._export is not None else 0

    @property
    def spans_dropped(self) -> int:
        """Number of spans lost before their export: with failed batches, or because the queue was full."""
        return self._export.exporter.lost if self._export is not None else 0

    def shutdown(self) -> None:
        """Exports the spans that are left. Must be called last. Blocks for at most SHUTDOWN_S."""
        if self._provider is None:
            return
        if self._export is None:
            self._provider.shutdown()
            return
        # a daemon thread, because the SDK waits for up to 30 s and has no setting for that
        worker = threading.Thread(target=self._provider.shutdown, name="tracing-shutdown", daemon=True)
        worker.start()
        worker.join(SHUTDOWN_S)
        if worker.is_alive():
            self._export.break_off()


def _provider(node: str, version: str, environ: Mapping[str, str]) -> TracerProvider:
    own = Resource(
        {
            "service.name": SERVICE_NAME,
            "service.version": version,
            "service.instance.id": node,
            NODE_ATTRIBUTE: node,
            "telemetry.sdk.name": "opentelemetry",
            "telemetry.sdk.language": "python",
            "telemetry.sdk.version": sdk_version,
        }
    )
    provider = TracerProvider(
        # the SDK itself reads the variable; without it every trace is exported, whatever the flags of its parent are
        sampler=None if environ.get(SAMPLER_VARIABLE) else ALWAYS_ON,
        resource=own.merge(OTELResourceDetector().detect()),
        shutdown_on_exit=False,
    )
    provider.sampler = _Recorded(provider.sampler)
    return provider


def _wants_export(environ: Mapping[str, str]) -> bool:
    """Returns whether the variables ask for export by OTLP over gRPC. Logs an error if they ask for another export."""
    if not any(environ.get(variable) for variable in ENDPOINT_VARIABLES):
        return False
    exporter = environ.get(EXPORTER_VARIABLE, "").strip().lower() or "otlp"
    protocol = next((text for name in PROTOCOL_VARIABLES if (text := environ.get(name, "").strip().lower())), "grpc")
    if exporter == "none":
        return False
    if exporter != "otlp":
        log.error("traces are not exported: the exporter must be otlp", extra={EXPORTER_VARIABLE: exporter})
    elif protocol != "grpc":
        log.error("traces are not exported: the protocol must be grpc", extra={"protocol": protocol})
    return exporter == "otlp" and protocol == "grpc"


def _export(environ: Mapping[str, str]) -> OtlpExport | None:
    # imported only here: the exporter costs memory
    from usbip_plugin.observe.otlp import OtlpExport  # noqa: PLC0415

    try:
        return OtlpExport(environ)
    except Exception as error:  # noqa: BLE001 - a library reads the user's variables; no mistake there may stop the plugin
        log.error("traces are not exported: a setting is not valid", extra={"cause": str(error)})  # noqa: TRY400
        return None


def traceparent_of(span: Span) -> str | None:
    """Returns the span's W3C traceparent, or None if the span has no valid context, as with tracing off."""
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def remote_parent(traceparent: str | None) -> Context:
    """Returns a context with the span of a traceparent as the parent of new spans.

    Without a valid traceparent it is an empty context, in which a new span begins a trace of its own.
    """
    context = span_context_from(traceparent)
    return Context() if context is None else trace.set_span_in_context(NonRecordingSpan(context), Context())


def links_to(traceparent: str | None) -> list[Link]:
    """Returns a link to the span of a traceparent, or no link if the traceparent is not valid."""
    context = span_context_from(traceparent)
    return [] if context is None else [Link(context)]


@contextlib.contextmanager
def within(traceparent: str | None) -> Iterator[None]:
    """Makes the span of a traceparent current within the block, so that log lines have its trace ID.

    Without a valid traceparent the block belongs to no trace.
    """
    token = otel_context.attach(remote_parent(traceparent))
    try:
        yield
    finally:
        otel_context.detach(token)


def span_context_from(traceparent: str | None) -> SpanContext | None:
    """Returns the SpanContext of a W3C traceparent, or None if it is not valid: anybody may have written the Lease."""
    if not isinstance(traceparent, str) or len(traceparent) > _MAX_TRACEPARENT_CHARACTERS:
        return None
    return _parsed(traceparent)


# Cached, because a change of a device parses one traceparent twice: for a span and for a log line.
@functools.lru_cache(maxsize=64)
def _parsed(traceparent: str) -> SpanContext | None:
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    context = SpanContext(
        int(match[2], 16), int(match[3], 16), is_remote=True, trace_flags=TraceFlags(int(match[4], 16))
    )
    return context if context.is_valid else None


def _read(spans: Iterable[KeptSpan]) -> tuple[SpanRecord, ...]:
    return tuple(record for kept in spans if (record := kept.read()) is not None)


def _record(span: ReadableSpan) -> SpanRecord:
    context = span.get_span_context()
    trace_id, span_id = (context.trace_id, context.span_id) if context else (0, 0)
    error = None
    if span.status.status_code is StatusCode.ERROR:
        error = _short(span.status.description or "")
    return SpanRecord(
        name=_short(span.name),
        node=str(span.resource.attributes.get(NODE_ATTRIBUTE, "")),
        trace_id=f"{trace_id:032x}",
        span_id=f"{span_id:016x}",
        parent_id=f"{span.parent.span_id:016x}" if span.parent else None,
        start_ns=span.start_time or 0,
        end_ns=span.end_time or span.start_time or 0,
        attributes=_texts(span.attributes),
        error=error,
        links=tuple(f"{link.context.trace_id:032x}" for link in span.links),
        kind=span.kind.name.lower(),
        events=tuple(
            SpanEvent(_short(event.name), event.timestamp, _texts(event.attributes, without=_STACK))
            for event in span.events[-MAX_EVENTS_PER_SPAN:]
        ),
    )


def _texts(attributes: Attributes, without: str = "") -> dict[str, str]:
    return {key: _short(value) for key, value in (attributes or {}).items() if key != without}


def _short(value: object) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = redacted(shown, MAX_TEXT_CHARACTERS)
    return text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"
