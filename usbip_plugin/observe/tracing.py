"""OpenTelemetry: a provider of one's own, trace context as text, and the last traces in memory."""

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
"""What is not exported within this time at the end is lost."""
RECENT_TRACES = 64
MAX_SPANS_PER_TRACE = 128
RECENT_SPANS = 2048
"""Of all traces together: 2 MiB. An Allocate's has about 8."""
MAX_UNREAD_SPANS = 128
"""Kept as they are until somebody reads them: 3 KB each, twice as much as what is shown of them."""
MAX_EVENTS_PER_SPAN = 16
MAX_TEXT_CHARACTERS = 256

log = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_MAX_TRACEPARENT_CHARACTERS = 128
_STACK = "exception.stacktrace"


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened within a span, such as an exception. at_ns: nanoseconds since the epoch."""

    name: str
    at_ns: int
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A span that has ended. Times: nanoseconds since the epoch. error: the status description, "" if none was given,
    None if the span did not fail. links: trace ids of other traces. kind: internal, server, client, producer or
    consumer. events: the last MAX_EVENTS_PER_SPAN, without stack traces.
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
    """A span that has ended: itself until somebody reads it, then what is shown of it."""

    span: ReadableSpan | None
    record: SpanRecord | None = None

    def read(self) -> SpanRecord | None:
        """None if it was forgotten before."""
        if self.span is not None:
            self.record, self.span = _record(self.span), None
        return self.record

    def forget(self) -> None:
        """Nobody will read it."""
        self.span = None


class RecentSpans(SpanProcessor):
    """Keeps the last traces, at most `traces` of them and MAX_SPANS_PER_TRACE spans of each: its first and its last.
    There are fewer traces where they have many spans: all together have RECENT_SPANS at most.

    Thread-safe. One may be given to the providers of several nodes; a trace then holds the spans of all of them.
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
        # most spans are of devices of other nodes, and forgotten before anybody reads them
        kept = KeptSpan(None, _record(span)) if span.events else KeptSpan(span)  # an event may have a stack
        with self._lock:
            spans = self._traces.setdefault(trace_id, [])
            self._traces.move_to_end(trace_id)
            spans.append(kept)
            self._spans += 1
            if len(spans) > MAX_SPANS_PER_TRACE:
                # how it began and how it stands tell more than the middle
                self._forget([spans.pop(MAX_SPANS_PER_TRACE // 2)])
            while len(self._traces) > self._limit or self._spans > RECENT_SPANS:
                self._forget(self._traces.popitem(last=False)[1])
            self._unread.append(kept)
            if len(self._unread) > MAX_UNREAD_SPANS:
                self._unread.popleft().read()

    def _forget(self, spans: Sequence[KeptSpan]) -> None:
        self._spans -= len(spans)
        for kept in spans:
            kept.forget()

    def shutdown(self) -> None:
        """Nothing is lost: what was kept can still be read."""

    def force_flush(self, timeout_millis: int = 0) -> bool:  # noqa: ARG002
        return True

    def traces(self) -> tuple[tuple[SpanRecord, ...], ...]:
        """The traces kept, the one that was added to last at the end; spans in the order they ended."""
        with self._lock:
            return tuple(map(_read, self._traces.values()))

    def trace(self, trace_id: str) -> tuple[SpanRecord, ...]:
        """Spans of one trace (32 hexadecimal digits), none if it is not kept."""
        with self._lock:
            return _read(self._traces.get(trace_id, ()))


class _Recorded(Sampler):
    """What the given sampler drops is recorded all the same, for RecentSpans, and not exported."""

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
    """The tracer of one node. recent: shared with other nodes if given.

    Follows the OTEL_ variables of the OpenTelemetry specification. One that makes no sense is logged, and switches off
    what it is about; nothing here ever stops the plugin.
    """

    def __init__(
        self, node: str, *, version: str, environ: Mapping[str, str] | None = None, recent: RecentSpans | None = None
    ) -> None:
        """environ stands for os.environ in what is decided here; the SDK itself reads os.environ."""
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
            log.error("tracing is off: a setting cannot be used", extra={"cause": str(error)})  # noqa: TRY400 - its text says it
            return
        self._provider.add_span_processor(self.recent)
        if _wants_export(environ):
            self._export = _export(environ)
        if self._export is not None:
            self._provider.add_span_processor(self._export)
        self.tracer = self._provider.get_tracer(SERVICE_NAME, version)

    @property
    def exporting(self) -> bool:
        return self._export is not None

    @property
    def export_failures(self) -> int:
        """Batches of spans that no collector took."""
        return self._export.failures if self._export is not None else 0

    @property
    def spans_dropped(self) -> int:
        """Spans that were to be exported and are lost: with those batches, or because the queue was full."""
        return self._export.dropped if self._export is not None else 0

    def shutdown(self) -> None:
        """Exports what is left, blocking for at most SHUTDOWN_S even if the endpoint is dead. Call it last."""
        if self._provider is None:
            return
        if self._export is None:
            self._provider.shutdown()
            return
        # a daemon thread: the SDK waits for up to 30 s, and nothing lets it be told otherwise
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
        # the SDK reads the variable itself; left alone, every trace is kept, whatever a caller's flags say
        sampler=None if environ.get(SAMPLER_VARIABLE) else ALWAYS_ON,
        resource=own.merge(OTELResourceDetector().detect()),
        shutdown_on_exit=False,
    )
    provider.sampler = _Recorded(provider.sampler)
    return provider


def _wants_export(environ: Mapping[str, str]) -> bool:
    """Whether the variables ask for export by OTLP over gRPC; says so where they ask for what there is not."""
    if not any(environ.get(variable) for variable in ENDPOINT_VARIABLES):
        return False
    exporter = environ.get(EXPORTER_VARIABLE, "").strip().lower() or "otlp"
    protocol = next((text for name in PROTOCOL_VARIABLES if (text := environ.get(name, "").strip().lower())), "grpc")
    if exporter == "none":
        return False
    if exporter != "otlp":
        log.error("traces are not exported: the one exporter is otlp", extra={EXPORTER_VARIABLE: exporter})
    elif protocol != "grpc":
        log.error("traces are not exported: the one protocol is grpc", extra={"protocol": protocol})
    return exporter == "otlp" and protocol == "grpc"


def _export(environ: Mapping[str, str]) -> OtlpExport | None:
    # imported only here: the exporter costs memory
    from usbip_plugin.observe.otlp import OtlpExport  # noqa: PLC0415

    try:
        return OtlpExport(environ)
    except Exception as error:  # noqa: BLE001 - a library reads the user's variables; no mistake there may stop the plugin
        log.error("traces are not exported: a setting cannot be used", extra={"cause": str(error)})  # noqa: TRY400
        return None


def traceparent_of(span: Span) -> str | None:
    """The span's W3C traceparent, None for a span that does not record."""
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def context_from(traceparent: str | None) -> Context | None:
    """The context a traceparent names, to be the parent of a span or, via span_context_from, a link.

    None for everything that is no sound W3C traceparent: it comes from a Lease that others may have written.
    """
    context = span_context_from(traceparent)
    return None if context is None else trace.set_span_in_context(NonRecordingSpan(context), Context())


def remote_parent(traceparent: str | None) -> Context:
    """The same for a span that is to begin a trace of its own where there is no sound traceparent."""
    return context_from(traceparent) or Context()


def links_to(traceparent: str | None) -> list[Link]:
    """A link to the span a traceparent names, none if it is not sound."""
    context = span_context_from(traceparent)
    return [] if context is None else [Link(context)]


@contextlib.contextmanager
def within(traceparent: str | None) -> Iterator[None]:
    """What is logged in the block belongs to the trace that traceparent names, to none if it is not sound."""
    token = otel_context.attach(remote_parent(traceparent))
    try:
        yield
    finally:
        otel_context.detach(token)


def span_context_from(traceparent: str | None) -> SpanContext | None:
    """The same as a SpanContext, for links."""
    if not isinstance(traceparent, str) or len(traceparent) > _MAX_TRACEPARENT_CHARACTERS:
        return None
    return _parsed(traceparent)


# What changes about a device is a span and a line of the log in the same trace.
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
        links=tuple(_link_ids(span)),
        kind=span.kind.name.lower(),
        events=tuple(
            SpanEvent(_short(event.name), event.timestamp, _texts(event.attributes, without=_STACK))
            for event in span.events[-MAX_EVENTS_PER_SPAN:]
        ),
    )


def _texts(attributes: Attributes, without: str = "") -> dict[str, str]:
    return {key: _short(value) for key, value in (attributes or {}).items() if key != without}


def _link_ids(span: ReadableSpan) -> Sequence[str]:
    return [f"{link.context.trace_id:032x}" for link in span.links]


def _short(value: object) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = redacted(shown, MAX_TEXT_CHARACTERS)
    return text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"
