"""OpenTelemetry: a provider of one's own, trace context as text, and the last traces in memory."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, StatusCode, TraceFlags, Tracer

SERVICE_NAME = "usbip-plugin"
NODE_ATTRIBUTE = "k8s.node.name"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SAMPLER_VARIABLE = "OTEL_TRACES_SAMPLER"
SHUTDOWN_S = 0.8
"""What is not exported within this time at the end is lost."""
RECENT_TRACES = 64
MAX_SPANS_PER_TRACE = 128
MAX_TEXT_CHARACTERS = 256

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_MAX_TRACEPARENT_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A span that has ended. Times: nanoseconds since the epoch. error: the status description, "" if none was given,
    None if the span did not fail. links: trace ids of other traces.
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

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class RecentSpans(SpanProcessor):
    """Keeps the last traces, at most `traces` of them and MAX_SPANS_PER_TRACE spans of each. Thread-safe.

    One may be given to the providers of several nodes; a trace then holds the spans of all of them.
    """

    def __init__(self, traces: int = RECENT_TRACES) -> None:
        self._limit = traces
        self._traces: OrderedDict[str, list[SpanRecord]] = OrderedDict()
        self._lock = threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        record = _record(span)
        with self._lock:
            spans = self._traces.setdefault(record.trace_id, [])
            self._traces.move_to_end(record.trace_id)
            if len(spans) < MAX_SPANS_PER_TRACE:
                spans.append(record)
            if len(self._traces) > self._limit:
                self._traces.popitem(last=False)

    def shutdown(self) -> None:
        """Nothing is lost: what was kept can still be read."""

    def force_flush(self, timeout_millis: int = 0) -> bool:  # noqa: ARG002
        return True

    def traces(self) -> tuple[tuple[SpanRecord, ...], ...]:
        """The traces kept, the one that was added to last at the end; spans in the order they ended."""
        with self._lock:
            return tuple(tuple(spans) for spans in self._traces.values())

    def trace(self, trace_id: str) -> tuple[SpanRecord, ...]:
        """Spans of one trace (32 hexadecimal digits), none if it is not kept."""
        with self._lock:
            return tuple(self._traces.get(trace_id, ()))


class Tracing:
    """The tracer of one node. recent: shared with other nodes if given."""

    def __init__(
        self, node: str, *, version: str, environ: Mapping[str, str] | None = None, recent: RecentSpans | None = None
    ) -> None:
        environ = os.environ if environ is None else environ
        own = Resource({"service.name": SERVICE_NAME, "service.version": version, NODE_ATTRIBUTE: node})
        self.recent = RecentSpans() if recent is None else recent
        self._provider = TracerProvider(
            # the SDK reads the variable itself; left alone, every trace is kept, whatever a caller's flags say
            sampler=None if environ.get(SAMPLER_VARIABLE) else ALWAYS_ON,
            resource=own.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self.recent)
        self.exporting = any(environ.get(variable) for variable in ENDPOINT_VARIABLES)
        if self.exporting:
            # imported only here: the exporter costs memory
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

            self._exporter = OTLPSpanExporter()
            self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self.tracer: Tracer = self._provider.get_tracer(SERVICE_NAME, version)

    def shutdown(self) -> None:
        """Exports what is left, blocking for at most SHUTDOWN_S even if the endpoint is dead. Call it last."""
        if not self.exporting:
            self._provider.shutdown()
            return
        # a daemon thread: the SDK waits for up to 30 s, and nothing lets it be told otherwise
        worker = threading.Thread(target=self._provider.shutdown, name="tracing-shutdown", daemon=True)
        worker.start()
        worker.join(SHUTDOWN_S)
        if worker.is_alive():
            self._exporter.shutdown(timeout_millis=0)  # breaks off the export that runs


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


def span_context_from(traceparent: str | None) -> SpanContext | None:
    """The same as a SpanContext, for links."""
    if not isinstance(traceparent, str) or len(traceparent) > _MAX_TRACEPARENT_CHARACTERS:
        return None
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    context = SpanContext(
        int(match[2], 16), int(match[3], 16), is_remote=True, trace_flags=TraceFlags(int(match[4], 16))
    )
    return context if context.is_valid else None


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
        attributes={key: _short(value) for key, value in (span.attributes or {}).items()},
        error=error,
        links=tuple(_link_ids(span)),
    )


def _link_ids(span: ReadableSpan) -> Sequence[str]:
    return [f"{link.context.trace_id:032x}" for link in span.links]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"
