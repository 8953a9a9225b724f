"""Log records as lines: levels named as by the Go program, extra fields, and the trace."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.model import PodRef
from usbip_plugin.observe.logs import LEVELS, PACKAGES, JsonFormatter, TextFormatter, set_up_logging
from usbip_plugin.observe.tracing import Tracing

LOG = logging.getLogger("usbip_plugin.test")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(), *map(logging.getLogger, PACKAGES)]
    handlers, levels = loggers[0].handlers[:], [logger.level for logger in loggers]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def written(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_json_line_with_its_extra_fields_and_trace() -> None:
    stream = io.StringIO()
    set_up_logging("info", stream)
    tracing = Tracing("n", version="1", environ={})
    with tracing.tracer.start_as_current_span("x"):
        LOG.info(
            "attached\n%s",
            "twice",
            extra={"device": "usbip-a", "pod": {"ref": PodRef("ns", "p")}, "port": 3, "level": "x", "nodes": ("a", 1)},
        )
    (line,) = written(stream)
    ((span,),) = tracing.recent.traces()
    assert line.pop("ts")
    assert line == {
        "level": "info",
        "logger": "usbip_plugin.test",
        "msg": "attached\ntwice",
        "device": "usbip-a",
        "pod.ref": "ns/p",
        "port": 3,
        "level_": "x",
        "nodes": ["a", "1"],
        "trace_id": span.trace_id,
        "span_id": span.span_id,
    }


def test_an_exception_is_a_field_of_its_line() -> None:
    stream = io.StringIO()
    set_up_logging("info", stream)
    try:
        Path("/nonexistent/file").read_bytes()
    except OSError:
        LOG.exception("failed")
    (line,) = written(stream)
    assert line["level"] == "error"
    assert "FileNotFoundError: " in str(line["error"])
    assert "trace_id" not in line


@pytest.mark.parametrize(
    ("level", "count"),
    [("all", 5), ("debug", 4), ("info", 3), ("warn", 2), ("error", 1), ("none", 0)],
)
def test_a_level_writes_its_records_and_those_above(level: str, count: int) -> None:
    stream = io.StringIO()
    set_up_logging(level, stream)
    for number in (5, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        LOG.log(number, "x")
    assert len(written(stream)) == count
    assert set(LEVELS) == {"all", "debug", "info", "warn", "error", "none"}


def test_other_packages_are_logged_from_level_warn() -> None:
    stream = io.StringIO()
    set_up_logging("info", stream)
    other = logging.getLogger("some.library")
    other.info("detail")
    other.warning("problem")
    assert [(line["level"], line["msg"]) for line in written(stream)] == [("warn", "problem")]


def test_setting_up_again_replaces_the_stream_and_an_unknown_level_is_refused() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up_logging("info", first)
    set_up_logging("info", second, json_lines=False)
    LOG.info("hello", extra={"device": "d"})
    assert first.getvalue() == ""
    assert second.getvalue().endswith(" info  hello device=d\n")
    with pytest.raises(ValueError, match="expected one of all, debug"):
        set_up_logging("warning", first)


@given(
    st.text(), st.text(min_size=1), st.text() | st.floats() | st.binary() | st.dictionaries(st.integers(), st.text())
)
def test_every_record_is_one_line_that_any_stream_accepts(message: str, key: str, value: object) -> None:
    record = logging.makeLogRecord({"msg": message, "levelno": 20, "levelname": "INFO", "name": "n", "created": 0.0})
    vars(record).setdefault(key, value)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["msg"] == message
    line.encode("ascii")
    text = TextFormatter().format(record)
    assert len(text.splitlines()) == 1
    text.encode()
