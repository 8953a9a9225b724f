"""Exports spans by OTLP over gRPC and counts losses. Imported only if export is configured: the exporter costs memory.

A collector that is unreachable or slow, or that refuses, costs spans and nothing else. The export runs in its own
thread, the queue before it is bounded, and an outage causes two log lines: one when it starts and one when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

QUEUE_VARIABLE, BATCH_VARIABLE = "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"
QUEUE_LENGTH, BATCH_LENGTH = 2048, 512
"""Spans in the queue and in one batch: the defaults of the OpenTelemetry specification for the two variables."""

_EXPORT_LOGGERS = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")
_HEADER_LOGGER = "opentelemetry.util.re"

log = logging.getLogger(__name__)


class OtlpExport(BatchSpanProcessor):
    """Span processor that exports to the collector of the OTEL_EXPORTER_OTLP_ variables.

    The constructor raises ValueError and other errors if a variable is not valid.
    """

    def __init__(self, environ: Mapping[str, str], exporter: SpanExporter | None = None) -> None:
        """Starts the export. exporter: used instead of the OTLP exporter."""
        self._size = _number(environ, QUEUE_VARIABLE, QUEUE_LENGTH)
        batch = min(self._size, _number(environ, BATCH_VARIABLE, BATCH_LENGTH))
        self._library_log = _LibraryLog()
        with contextlib.ExitStack() as undo:
            undo.callback(self._library_log.end)
            self.exporter = CountingExporter(exporter or OTLPSpanExporter(), self._library_log)
            super().__init__(self.exporter, max_queue_size=self._size, max_export_batch_size=batch)
            undo.pop_all()

    def on_end(self, span: ReadableSpan) -> None:
        """Queues a sampled span. Never blocks."""
        context = span.get_span_context()
        if context is not None and context.trace_flags.sampled:
            self.exporter.queued(self._size)
        super().on_end(span)

    def break_off(self) -> None:
        """Ends the export that runs. Spans not exported yet are lost. The libraries' lines about it are not logged."""
        self.exporter.inner.shutdown()


class CountingExporter(SpanExporter):
    """Exporter that logs the start and the end of an outage. Its counts may be read at any time.

    failures: batches that the collector did not accept.
    lost: spans lost with these batches, and spans lost because the queue was full.
    """

    def __init__(self, inner: SpanExporter, library_log: _LibraryLog) -> None:
        self.inner = inner
        self._library_log = library_log
        self._lock = threading.Lock()
        self._waiting = 0
        self._lost_in_outage: int | None = None
        self.failures = 0
        self.lost = 0

    def queued(self, limit: int) -> None:
        """Counts a span that joins the queue. A queue of `limit` spans is full and drops its oldest span instead."""
        with self._lock:
            if self._waiting >= limit:
                self.lost += 1
            else:
                self._waiting += 1

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._lock:
            self._waiting = max(0, self._waiting - len(spans))
        self._library_log.start_export()
        try:
            result = self.inner.export(spans)
        except Exception as error:  # noqa: BLE001 - a library's; whatever it is, it only costs these spans
            result, self._library_log.last = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"
        if result is SpanExportResult.SUCCESS:
            self._succeeded()
        else:
            self._failed(len(spans))
        return result

    def shutdown(self) -> None:
        self.inner.shutdown()
        self._library_log.end()

    def _failed(self, spans: int) -> None:
        with self._lock:
            self.failures += 1
            self.lost += spans
            begins = self._lost_in_outage is None
            self._lost_in_outage = (self._lost_in_outage or 0) + spans
        if begins:
            log.warning("trace export failed, dropping spans", extra={"cause": self._library_log.last})

    def _succeeded(self) -> None:
        with self._lock:
            lost, self._lost_in_outage = self._lost_in_outage, None
        if lost is not None:
            log.info("trace export works again", extra={"spans_dropped": lost})


class _LibraryLog(logging.Handler):
    """Handler that keeps the libraries' own lines about the export out of the log.

    The libraries log each batch and each retry, some of them with headers.
    last: the newest of these lines, which gives the reason if an export failed.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        self._thread: int | None = None
        names = (*_EXPORT_LOGGERS, _HEADER_LOGGER)
        # the SDK's filters would also hide from this handler the cause of a second outage within 20 s
        self._loggers = [(library, list(library.filters)) for library in map(logging.getLogger, names)]
        for library, filters in self._loggers:
            library.addHandler(self)
            library.propagate = False
            for filter_ in filters:
                library.removeFilter(filter_)

    def start_export(self) -> None:
        self.last, self._thread = "", threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == _HEADER_LOGGER:
            log.warning("entry of OTEL_EXPORTER_OTLP_HEADERS ignored, expected name=value")
        elif record.thread == self._thread:
            self.last = record.getMessage()

    def end(self) -> None:
        """Lets the libraries' loggers work as before."""
        for library, filters in self._loggers:
            library.removeHandler(self)
            library.propagate = not any(isinstance(other, _LibraryLog) for other in library.handlers)
            for filter_ in filters:
                library.addFilter(filter_)


def _number(environ: Mapping[str, str], variable: str, default: int) -> int:
    text = environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{variable} must be a positive integer, got {text!r}")
    return int(text)
