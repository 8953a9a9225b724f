"""Export to a real receiver over gRPC: what arrives, what the standard variables do, and what failures cost."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.trace import SpanKind

from tests.rigs.otlp_receiver import PATIENCE_S, Receiver, receiving
from usbip_plugin.errors import LockHeld
from usbip_plugin.observe.spans import span
from usbip_plugin.observe.tracing import Tracing, remote_parent, traceparent_of

UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
Start = Callable[..., Tracing]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Returns a function that starts tracing with these OpenTelemetry variables and no others."""
    started: list[Tracing] = []

    def begin(node: str = "node-a", **variables: str) -> Tracing:
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        started.append(Tracing(node, version="1.2.3"))
        return started[-1]

    yield begin
    for tracing in started:
        tracing.shutdown()
    for thread in threading.enumerate():
        if thread.name == "tracing-shutdown":
            thread.join(PATIENCE_S)  # unlike the plugin: the thread could write to the log of the next test


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def until(condition: Callable[[], bool]) -> None:
    """Polls until the condition holds: the exporter has no event for a failed export."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def log_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_spans_arrive_with_kind_parent_attributes_link_and_resource(receiver: Receiver, start: Start) -> None:
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_EXPORTER_OTLP_HEADERS="x-tenant=lab")
    with span(tracing.tracer, "Allocate", {"usbip.device.ids": ["d"]}, kind=SpanKind.SERVER) as root:
        root.set_attribute("rpc.response.status_code", "OK")
        with span(tracing.tracer, "lock"):
            pass
    receiver.until(lambda: len(receiver.spans) == 2)
    (allocate,), (lock,) = receiver.named("Allocate"), receiver.named("lock")
    assert allocate.span.kind == Span.SPAN_KIND_SERVER
    assert lock.span.parent_span_id == allocate.span.span_id
    assert allocate.attributes == {"usbip.device.ids": ["d"], "rpc.response.status_code": "OK"}
    assert allocate.resource.items() >= {
        ("service.name", "usbip-plugin"),
        ("service.version", "1.2.3"),
        ("service.instance.id", "node-a"),
        ("k8s.node.name", "node-a"),
        ("telemetry.sdk.language", "python"),
    }
    assert receiver.metadata[0]["x-tenant"] == "lab"
    assert (tracing.export_failures, tracing.spans_dropped) == (0, 0)


def test_a_failure_arrives_with_its_cause(receiver: Receiver, start: Start) -> None:
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
    error = LockHeld("h:1/1-1", "node-b")
    error.__cause__ = OSError("the first cause")
    with pytest.raises(LockHeld), span(tracing.tracer, "Allocate"):
        raise error
    receiver.until(lambda: bool(receiver.spans))
    (failed,) = receiver.spans
    assert failed.span.status.code == Status.STATUS_CODE_ERROR
    assert failed.span.status.message == "h:1/1-1 is held by node node-b"
    assert failed.attributes["error.type"] == "LockHeld"
    (event,) = failed.span.events
    words = {pair.key: pair.value.string_value for pair in event.attributes}
    assert event.name == "exception"
    assert words["exception.type"] == "usbip_plugin.errors.LockHeld"
    assert words["exception.message"] == "h:1/1-1 is held by node node-b"
    assert "the first cause" in words["exception.stacktrace"]


def test_the_standard_variables_set_resource_attributes_and_service_name(receiver: Receiver, start: Start) -> None:
    tracing = start(
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=receiver.endpoint,
        OTEL_SERVICE_NAME="usb",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=lab,service.version=mine",
    )
    tracing.tracer.start_span("x").end()
    receiver.until(lambda: bool(receiver.spans))
    resource = receiver.spans[0].resource
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("usb", "lab")
    assert resource["service.version"] == "mine"
    assert resource["k8s.node.name"] == "node-a"


@pytest.mark.parametrize(
    ("sampler", "argument", "exported"),
    [
        ("always_off", "", 0),
        ("traceidratio", "0.0", 0),
        ("traceidratio", "1.0", 1),
        ("parentbased_traceidratio", "0.0", 0),
        ("parentbased_always_on", "", 1),
    ],
)
def test_a_trace_that_is_not_sampled_is_not_exported_and_is_on_the_page(
    receiver: Receiver, start: Start, sampler: str, argument: str, exported: int
) -> None:
    tracing = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=argument
    )
    tracing.tracer.start_span("x").end()
    tracing.shutdown()  # exports the last spans
    assert len(receiver.spans) == exported
    assert [spans[0].name for spans in tracing.recent.traces()] == ["x"]


def test_the_node_of_the_allocate_decides_for_all_nodes(receiver: Receiver, start: Start) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
    dropping = start("node-a", **variables, OTEL_TRACES_SAMPLER_ARG="0.0")
    keeping = start("node-b", **variables, OTEL_TRACES_SAMPLER_ARG="1.0")
    with span(dropping.tracer, "Allocate") as root:
        traceparent = traceparent_of(root)
    assert traceparent is not None
    keeping.tracer.start_span("withdraw", context=remote_parent(traceparent)).end()
    keeping.tracer.start_span("Allocate of its own").end()
    keeping.shutdown()
    assert [received.span.name for received in receiver.spans] == ["Allocate of its own"]
    assert keeping.recent.trace(traceparent.split("-")[1])[0].name == "withdraw"


def test_without_a_sampler_every_trace_is_exported_whatever_the_parent_says(receiver: Receiver, start: Start) -> None:
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
    tracing.tracer.start_span("x", context=remote_parent(UNSAMPLED)).end()
    tracing.shutdown()
    assert len(receiver.spans) == 1


def test_a_disabled_sdk_makes_no_traces(receiver: Receiver, start: Start) -> None:
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_SDK_DISABLED="true")
    with span(tracing.tracer, "x") as made:
        assert traceparent_of(made) is None
    tracing.shutdown()
    assert not tracing._export
    assert (receiver.asked, tracing.recent.traces()) == (0, ())


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "the exporter must be otlp"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "the protocol must be grpc"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "a setting is not valid"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}, "a setting is not valid"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "a setting is not valid"),
    ],
    ids=str,
)
def test_an_invalid_setting_is_logged_and_costs_the_export_only(
    start: Start, caplog: pytest.LogCaptureFixture, variables: dict[str, str], error: str
) -> None:
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", **variables)
    tracing.tracer.start_span("x").end()
    assert not tracing._export
    assert len(tracing.recent.traces()) == 1
    assert [level for level, _text in log_lines(caplog)] == (["ERROR"] if error else [])
    assert error in "".join(text for _level, text in log_lines(caplog))


def test_a_limit_that_makes_no_sense_switches_tracing_off(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    tracing = start(OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="many")
    with span(tracing.tracer, "x"):
        pass
    assert "tracing is off" in log_lines(caplog)[0][1]
    assert "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT" in str(vars(caplog.records[0])["cause"])


def test_an_outage_is_counted_and_logged_once_at_its_beginning_and_once_at_its_end(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port = closed_port()
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}", OTEL_EXPORTER_OTLP_TIMEOUT="0.3")
    for number in range(1, 4):
        tracing.tracer.start_span("lost").end()
        until(lambda wanted=number: tracing.export_failures >= wanted)  # type: ignore[misc]
    assert tracing.spans_dropped == 3
    assert log_lines(caplog) == [("WARNING", "trace export failed, dropping spans")]
    assert str(port) in vars(caplog.records[0])["cause"]
    with receiving(port) as receiver:
        tracing.tracer.start_span("taken").end()
        until(lambda: any(received.span.name == "taken" for received in receiver.spans) or _retry(tracing))
        until(lambda: len(caplog.records) == 2)
    assert log_lines(caplog)[1] == ("INFO", "trace export works again")
    assert vars(caplog.records[1])["spans_dropped"] == tracing.spans_dropped


def _retry(tracing: Tracing) -> bool:
    """Starts one more span, as the last one was lost while the connection paused. Returns False."""
    tracing.tracer.start_span("taken").end()
    return False


@pytest.mark.parametrize("code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED], ids=str)
def test_a_receiver_that_refuses_is_an_outage_with_its_message(
    receiver: Receiver, start: Start, caplog: pytest.LogCaptureFixture, code: grpc.StatusCode
) -> None:
    receiver.refusing = code
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="0.3")
    tracing.tracer.start_span("lost").end()
    until(lambda: tracing.export_failures == 1)
    assert tracing.spans_dropped == 1
    until(lambda: bool(caplog.records))
    assert len(caplog.records) == 1
    assert "not today" in vars(caplog.records[0])["cause"]


def test_a_silent_receiver_delays_nothing_and_costs_only_the_oldest_spans(
    receiver: Receiver, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.silent = True
    tracing = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_BSP_MAX_QUEUE_SIZE="8", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="4"
    )
    tracing.tracer.start_span("first").end()
    receiver.until(lambda: receiver.asked == 1)
    for _ in range(8 + 5):
        tracing.tracer.start_span("waits").end()  # must not block
    assert tracing.spans_dropped == 5
    tracing.shutdown()
    assert receiver.spans == []
    assert not [text for _level, text in log_lines(caplog) if "Queue full" in text]


def test_a_header_that_cannot_be_read_is_left_out_and_not_logged(
    receiver: Receiver, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_EXPORTER_OTLP_HEADERS="a=b,hunter2")
    tracing.tracer.start_span("x").end()
    receiver.until(lambda: bool(receiver.spans))
    assert receiver.metadata[0]["a"] == "b"
    assert "hunter2" not in caplog.text
    assert "OTEL_EXPORTER_OTLP_HEADERS" in caplog.text
