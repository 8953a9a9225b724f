"""Log records as lines: levels named as by the Go program, extra fields, and the trace."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.model import PodRef
from usbip_plugin.observe.logs import (
    HTTP,
    LEVELS,
    LINES,
    MAX_SUBJECTS,
    PACKAGES,
    JsonFormatter,
    LineLimit,
    TextFormatter,
    set_up_logging,
)
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


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time of the next records."""
    now = [1000.0]
    make = logging.getLogRecordFactory()

    def record(*args: Any, **keywords: Any) -> logging.LogRecord:
        made = make(*args, **keywords)
        made.created = now[0]
        return made

    monkeypatch.setattr(logging, "_logRecordFactory", record)
    return lambda time: now.__setitem__(0, time)


def test_a_server_that_changes_its_list_fills_no_disk_and_hides_no_other_server(at: Callable[[float], None]) -> None:
    stream = io.StringIO()
    set_up_logging("info", stream)
    for number in range(5000):
        at(1000 + number / 100)
        LOG.info("device healthy", extra={"device": f"[fd00::1]:3240/9-{number}"})
        LOG.info("devices shared", extra={"devices": [f"[fd00::1]:3240/9-{number}"], "count": 1})
        LOG.warning("server flaps", extra={"server": "[fd00::1]:3240"})
        logging.getLogger(HTTP).info("bad request", extra={"peer": f"192.0.2.{number}"})
    LOG.info("device healthy", extra={"device": "lab:3240/1-1"})
    LOG.info("other")
    LOG.error("lock lost", extra={"device": "[fd00::1]:3240/1-1"})
    logging.getLogger("usbip_plugin.attach.release").info("released", extra={"device": "[fd00::1]:3240/1-1"})
    lines = written(stream)
    about = Counter(
        str(line.get("server", line.get("device", line.get("devices", line.get("peer"))))) for line in lines
    )
    assert sum(count for subject, count in about.items() if "3240/9-" in subject or subject.endswith(":3240")) == LINES
    assert sum(count for subject, count in about.items() if "192.0.2." in subject) == LINES
    assert [line["msg"] for line in lines[-4:]] == ["device healthy", "other", "lock lost", "released"]
    assert [line["limit"] for line in lines if "limit" in line] == [
        "further lines of this minute about [fd00::1]:3240 are left out",
        "further lines of this minute about the HTTP port are left out",
    ]
    at(1060)
    for _ in range(2):
        LOG.info("device healthy", extra={"device": "[fd00::1]:3240/1-1"})
    assert [line.get("left_out") for line in written(stream)[-2:]] == [3 * 5000 - LINES, None]


def test_what_the_limit_counts_is_bounded_and_a_clock_set_back_ends_it(at: Callable[[float], None]) -> None:
    limit = LineLimit()

    def passes(server: str) -> bool:
        return limit.filter(LOG.makeRecord("x", logging.INFO, "", 0, "m", (), None, extra={"server": server}))

    for number in range(3 * MAX_SUBJECTS):
        at(1000 + number)
        assert passes(f"s{number}")
        assert len(limit._spans) <= MAX_SUBJECTS
    assert [passes("s") for _ in range(LINES + 1)].count(False) == 1
    at(0)
    assert passes("s")


def test_nothing_is_left_out_at_debug() -> None:
    stream = io.StringIO()
    set_up_logging("debug", stream)
    for _ in range(100):
        LOG.debug("device taken by another node", extra={"device": "lab:3240/1-1"})
    assert len(written(stream)) == 100


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
