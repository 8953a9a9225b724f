"""What traces are made of: attribute names, and how a span begins, fails and ends.

Names are those of OpenTelemetry's semantic conventions where they have one, else usbip.*; docs/tracing.md lists them.
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
"""Of something tried again and again, so many tries are traced whole. A server may be away for days."""

_UNTRACED = otel_context.create_key("usbip-untraced")


def device_attributes(key: DeviceKey) -> dict[str, AttributeValue]:
    """What every span about one device says."""
    return {"usbip.device.id": key.id, "usbip.server": str(key.server), "usbip.busid": key.busid}


def pod_attributes(pod: PodRef | None) -> dict[str, AttributeValue]:
    """Nothing for None; no uid where it is not known."""
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
    """The current span for the length of the block; below the current one, or in context if that is given.

    What leaves the block as an exception is the span's failure, see failed(); a cancellation is one, too.
    """
    # start_as_current_span does the same through two context managers more
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
    """The error as an event with its causes, as the status, and its class as error.type."""
    of.record_exception(error)
    of.set_attribute("error.type", type(error).__name__)
    of.set_status(StatusCode.ERROR, str(error) or type(error).__name__)


def is_untraced(context: Context | None) -> bool:
    """For the sampler: whether a span that begins in context (None: the current one) is to be dropped."""
    return bool(otel_context.get_value(_UNTRACED, context))


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """What begins in the block and is no trace of its own already is not traced."""
    token = otel_context.attach(otel_context.set_value(_UNTRACED, True))
    try:
        yield
    finally:
        otel_context.detach(token)


class Tries:
    """A span under which something is tried until it succeeds.

    The first TRACED_TRIES are traced with all their steps, later ones only if they are promising. The number of tries
    is an attribute; the same failure several times in a row is one event.
    """

    def __init__(self, of: Span) -> None:
        self._span = of
        self._count = 0
        self._last: tuple[type[BaseException], str] | None = None

    @contextlib.contextmanager
    def one(self, *, promising: bool = False) -> Iterator[None]:
        """For the length of one try."""
        self._count += 1
        self._span.set_attribute("usbip.tries", self._count)
        with contextlib.nullcontext() if self._count <= TRACED_TRIES or promising else untraced():
            yield

    def failed(self, error: BaseException) -> bool:
        """This try failed and another may follow: the span itself has not failed. False if the last failed alike."""
        kind = (type(error), str(error))
        if kind == self._last:
            return False
        self._span.record_exception(error)
        self._last = kind
        return True
