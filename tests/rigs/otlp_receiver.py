"""A collector of spans by OTLP over gRPC, which refuses exports or leaves them unanswered if a test says so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Received:
    """A span with its resource."""

    resource: Mapping[str, object]
    span: Span
    attributes: Mapping[str, object] = field(default_factory=dict)

    @property
    def node(self) -> str:
        return str(self.resource.get("k8s.node.name", ""))

    @property
    def trace_id(self) -> str:
        return self.span.trace_id.hex()


class Receiver(TraceServiceServicer):
    """A collector of spans with the metadata of their exports.

    refusing: the status with which every export is refused.
    silent: whether exports stay unanswered until the receiver ends.
    """

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.metadata: list[Mapping[str, str | bytes]] = []
        self.asked = 0
        self.refusing: grpc.StatusCode | None = None
        self.silent = False
        self.endpoint = ""
        self._changed = threading.Condition()
        self._over = threading.Event()

    def Export(  # noqa: N802 - its name in the protocol
        self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        with self._changed:
            self.asked += 1
            self._changed.notify_all()
        if self.silent:
            self._over.wait()
        if self.refusing is not None:
            context.abort(self.refusing, "not today")
        with self._changed:
            self.metadata.append(dict(context.invocation_metadata()))
            for group in request.resource_spans:
                resource = plain(group.resource.attributes)
                self.spans += [
                    Received(resource, span, plain(span.attributes))
                    for scope in group.scope_spans
                    for span in scope.spans
                ]
            self._changed.notify_all()
        return ExportTraceServiceResponse()

    def until(self, condition: Callable[[], bool]) -> None:
        """Blocks until the condition holds, and checks it after each export. Raises TimeoutError after PATIENCE_S."""
        with self._changed:
            if not self._changed.wait_for(condition, PATIENCE_S):
                raise TimeoutError(f"the receiver has {[(s.node, s.span.name) for s in self.spans]}")

    def named(self, name: str) -> list[Received]:
        return [received for received in self.spans if received.span.name == name]

    def end(self) -> None:
        self._over.set()


@contextlib.contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    """Runs a receiver at this port of the machine, or at a free one."""
    receiver = Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    found = server.add_insecure_port(f"127.0.0.1:{port}")
    receiver.endpoint = f"http://127.0.0.1:{found}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.end()
        server.stop(None).wait()


def plain(attributes: object) -> dict[str, object]:
    return {pair.key: _value(pair.value) for pair in attributes if isinstance(pair, KeyValue)}  # type: ignore[attr-defined]


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
