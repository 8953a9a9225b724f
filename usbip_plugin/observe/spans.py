"""Spans: the names of their attributes, and how a span begins, fails and ends.

Attributes have the names of OpenTelemetry's semantic conventions, or usbip.* if these have none.
docs/reference/tracing.md lists them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from usbip_plugin.model import DeviceKey, PodRef

TRACED_TRIES = 10
"""Tries of one retried operation that are traced with all steps. A server may be unreachable for days."""

_UNTRACED = otel_context.create_key("usbip-untraced")


def device_attributes(key: DeviceKey) -> dict[str, AttributeValue]:
    """Returns the attributes of every span about one device."""
    return {"usbip.device.id": key.id, "usbip.server": str(key.server), "usbip.busid": key.busid}


def pod_attributes(pod: PodRef | None) -> dict[str, AttributeValue]:
    """Returns the attributes of a span about a pod: none for None, and no uid if the uid is not known."""
    if pod is None:
        return {}
    attributes: dict[str, AttributeValue] = {"k8s.namespace.name": pod.namespace, "k8s.pod.name": pod.name}
    if pod.uid:
        attributes["k8s.pod.uid"] = pod.uid
    return attributes


@contextlib.contextmanager
def span(
    tracer: Tracer,
    name: str,
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    context: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    links: Sequence[Link] = (),
) -> Iterator[Span]:
    """Makes a new span the current one for the length of the block.

    The parent is the current span, or that of context if given. An exception that leaves the block fails the span as
    failed() does. A cancellation fails the span, too, without an exception event.
    """
    # not start_as_current_span, which needs two more context managers for the same
    made = tracer.start_span(
        name, context, kind, attributes, links, record_exception=False, set_status_on_exception=False
    )
    token = otel_context.attach(set_span_in_context(made))
    try:
        yield made
    except asyncio.CancelledError:
        made.set_attribute("error.type", "CancelledError")
        made.set_status(StatusCode.ERROR, "cancelled")
        raise
    except Exception as error:
        failed(made, error)
        raise
    finally:
        otel_context.detach(token)
        made.end()


def failed(of: Span, error: BaseException) -> None:
    """Records an error on a span: as an event with its causes, as the status, and its class as error.type."""
    of.record_exception(error)
    of.set_attribute("error.type", type(error).__name__)
    of.set_status(StatusCode.ERROR, str(error) or type(error).__name__)


def is_untraced(context: Context | None) -> bool:
    """Returns whether the sampler must drop a span that begins in context. None stands for the current context."""
    return bool(otel_context.get_value(_UNTRACED, context))


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Drops the spans that begin in the block, in the current context or one made from it.

    A span that begins in another context, such as that of another trace, is traced.
    """
    token = otel_context.attach(otel_context.set_value(_UNTRACED, True))
    try:
        yield
    finally:
        otel_context.detach(token)


class Tries:
    """The tries of an operation that is repeated until it succeeds, under one span.

    The first TRACED_TRIES tries are traced with all steps, later ones only if the caller marks them as likely to
    succeed. The number of tries is the attribute usbip.tries. Equal failures in a row make one event.
    """

    def __init__(self, of: Span) -> None:
        self._span = of
        self._count = 0
        self._last: tuple[type[BaseException], str] | None = None

    @contextlib.contextmanager
    def one(self, *, traced: bool = False) -> Iterator[None]:
        """Counts a try, which lasts as long as the block. traced: whether to trace it in any case."""
        self._count += 1
        self._span.set_attribute("usbip.tries", self._count)
        with contextlib.nullcontext() if self._count <= TRACED_TRIES or traced else untraced():
            yield

    def failed(self, error: BaseException) -> bool:
        """Records the failure of a try. Another try may follow, so the span itself does not fail.

        Returns False if the try before failed with the same class and text.
        """
        kind = (type(error), str(error))
        if kind == self._last:
            return False
        self._span.record_exception(error)
        self._last = kind
        return True
