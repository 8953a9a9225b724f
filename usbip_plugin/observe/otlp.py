"""Export of spans by OTLP over gRPC, counted. Imported only when it is asked for: the exporter costs memory.

A collector that is away, slow or refuses costs spans, and nothing else: export runs in a thread of its own, the queue
before it is bounded, and an outage is two lines of the log.
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
"""Spans; what the specification says where the variables do not."""

_EXPORT_LOGGERS = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")
_HEADER_LOGGER = "opentelemetry.util.re"

log = logging.getLogger(__name__)


class OtlpExport(BatchSpanProcessor):
    """A span processor that exports to where the OTEL_EXPORTER_OTLP_ variables say. Counters are read at any time.

    failures: batches that were not taken. dropped: spans lost with them, and spans that came while the queue was full.
    ValueError and others for variables that make no sense.
    """

    def __init__(self, environ: Mapping[str, str], exporter: SpanExporter | None = None) -> None:
        """exporter: another one than OTLP's."""
        self._size = _number(environ, QUEUE_VARIABLE, QUEUE_LENGTH)
        batch = min(self._size, _number(environ, BATCH_VARIABLE, BATCH_LENGTH))
        self._hearing = _Hearing()
        with contextlib.ExitStack() as undo:
            undo.callback(self._hearing.end)
            self._counting = _Counting(exporter or OTLPSpanExporter(), self._hearing)
            super().__init__(self._counting, max_queue_size=self._size, max_export_batch_size=batch)
            undo.pop_all()

    @property
    def failures(self) -> int:
        return self._counting.failures

    @property
    def dropped(self) -> int:
        return self._counting.lost

    def on_end(self, span: ReadableSpan) -> None:
        """Never blocks."""
        context = span.get_span_context()
        if context is not None and context.trace_flags.sampled:
            self._counting.queued(self._size)
        super().on_end(span)

    def break_off(self) -> None:
        """Ends the export that runs; what has not been exported is lost. The libraries stay silent about it."""
        self._counting.break_off()


class _Counting(SpanExporter):
    """Counts what becomes of spans, and logs an outage once."""

    def __init__(self, inner: SpanExporter, hearing: _Hearing) -> None:
        self._inner = inner
        self._hearing = hearing
        self._lock = threading.Lock()
        self._waiting = 0
        self._lost_in_outage: int | None = None
        self.failures = 0
        self.lost = 0

    def queued(self, limit: int) -> None:
        """One more span waits; with so many the queue is full, and takes it for the oldest."""
        with self._lock:
            if self._waiting >= limit:
                self.lost += 1
            else:
                self._waiting += 1

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._lock:
            self._waiting = max(0, self._waiting - len(spans))
        self._hearing.listen()
        try:
            result = self._inner.export(spans)
        except Exception as error:  # noqa: BLE001 - a library's; whatever it is, these spans are lost and no more
            result, self._hearing.last = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"
        if result is SpanExportResult.SUCCESS:
            self._succeeded()
        else:
            self._failed(len(spans))
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()
        self._hearing.end()

    def break_off(self) -> None:
        self._inner.shutdown()

    def _failed(self, spans: int) -> None:
        with self._lock:
            self.failures += 1
            self.lost += spans
            begins = self._lost_in_outage is None
            self._lost_in_outage = (self._lost_in_outage or 0) + spans
        if begins:
            log.warning("traces cannot be exported; spans are dropped meanwhile", extra={"cause": self._hearing.last})

    def _succeeded(self) -> None:
        with self._lock:
            lost, self._lost_in_outage = self._lost_in_outage, None
        if lost is not None:
            log.info("traces are exported again", extra={"spans_dropped": lost})


class _Hearing(logging.Handler):
    """Keeps the libraries' own lines about export out of the log: one for each batch and retry, some with headers.

    last: the newest of them, which says why an export failed.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        self._thread: int | None = None
        names = (*_EXPORT_LOGGERS, _HEADER_LOGGER)
        # the SDK's filters would keep the cause of a second outage within 20 s from this handler, too
        self._loggers = [(library, list(library.filters)) for library in map(logging.getLogger, names)]
        for library, filters in self._loggers:
            library.addHandler(self)
            library.propagate = False
            for filter_ in filters:
                library.removeFilter(filter_)

    def listen(self) -> None:
        """An export begins, in this thread."""
        self.last, self._thread = "", threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == _HEADER_LOGGER:
            log.warning("an entry of OTEL_EXPORTER_OTLP_HEADERS is not name=value, and is left out")
        elif record.thread == self._thread:
            self.last = record.getMessage()

    def end(self) -> None:
        for library, filters in self._loggers:
            library.removeHandler(self)
            library.propagate = not any(isinstance(other, _Hearing) for other in library.handlers)
            for filter_ in filters:
                library.addFilter(filter_)


def _number(environ: Mapping[str, str], variable: str, default: int) -> int:
    text = environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{variable}={text!r} must be a positive number")
    return int(text)
