"""Logging to one stream. Each record is one line, with the ids of the trace that it belongs to."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TextIO

from opentelemetry import trace

from usbip_plugin.observe.redaction import redacted

PACKAGE = "usbip_plugin"
PACKAGES = (PACKAGE, "usbip_sim")
_OFF = logging.CRITICAL + 10
LEVELS: Mapping[str, int] = {
    "all": logging.NOTSET + 1,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "none": _OFF,
}
"""Levels by the names that the Go program's --log-level accepts."""
MAX_TEXT = 4096
"""Characters of a text in one field."""
MAX_TRACEBACK = 32 * 1024
"""Characters of the field "error", a traceback."""
MAX_ITEMS, MAX_ITEM = 256, 256
"""Items of a list in one field, and characters of each item."""
LINES, LINES_SPAN_S = 10, 60.0
"""Lines about one subject, see subject_of(), and the seconds in which so many are written."""
MAX_SUBJECTS = 1024
"""Subjects that LineLimit counts before it forgets those whose time is over."""
OWN_WORK = frozenset(f"{PACKAGE}.{module}" for module in ("kubelet.allocate", "attach.release", "attach.adopt"))
"""Loggers of what the node does for pods, at the rate of the pods."""
HTTP = f"{PACKAGE}.observe.http"
"""The logger of the HTTP server."""
_NAMES = {logging.WARNING: "warn", logging.CRITICAL: "error"}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_logging(level: str, stream: TextIO, *, json_lines: bool = True) -> logging.Handler:
    """Sends the project's records from `level` (a key of LEVELS) up, and other packages' from warn up, to stream.

    "all" and "none" apply to other packages, too. Replaces the handler of an earlier call. Returns the new handler.
    Raises ValueError if the level is unknown.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is not valid; expected one of {', '.join(LEVELS)}")
    number = LEVELS[level]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if json_lines else TextFormatter())
    handler.addFilter(LineLimit().filter)
    handler.set_name(PACKAGE)
    root = logging.getLogger()
    for old in [known for known in root.handlers if known.get_name() == PACKAGE]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number if level in {"all", "none"} else max(number, logging.WARNING))
    for package in PACKAGES:
        logging.getLogger(package).setLevel(number)
    return handler


def subject_of(record: logging.LogRecord) -> str | None:
    """Returns which peer may cause such a record as often as it likes, or None.

    This is a USB/IP server, named by the field `server` or by that of its devices, or whoever reaches the HTTP port.
    """
    fields = vars(record)
    if record.name in OWN_WORK or not logging.INFO <= record.levelno <= logging.WARNING:
        return None
    if "server" in fields:
        return str(fields["server"])
    if "device" in fields or fields.get("devices"):
        device = fields["device"] if "device" in fields else next(iter(fields["devices"]))
        return str(device).rpartition("/")[0] or str(device)
    return "the HTTP port" if record.name == HTTP else None


@dataclass(slots=True)
class _Span:
    began: float
    lines: int = 0


class LineLimit:
    """Lets pass LINES lines a minute, info and warn, about one USB/IP server or the HTTP port.

    A server chooses how often its list changes: without the limit, it could fill the disks of all nodes. The last line
    of a minute has the field `limit`, the first one after that has `left_out`, the number of lines in between.
    """

    def __init__(self) -> None:
        self._spans: dict[str, _Span] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether to write the record. May add a field to it."""
        subject = subject_of(record)
        if subject is None:
            return True
        span = self._spans.get(subject)
        if span is None or not 0 <= record.created - span.began < LINES_SPAN_S:
            if span is not None and span.lines > LINES:
                record.left_out = span.lines - LINES
            if len(self._spans) >= MAX_SUBJECTS:
                self._spans = {k: s for k, s in self._spans.items() if record.created - s.began < LINES_SPAN_S}
            span = self._spans[subject] = _Span(record.created)
        span.lines += 1
        if span.lines == LINES:
            record.limit = f"further lines of this minute about {subject} are left out"
        return span.lines <= LINES


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Returns ts, level, logger, msg, the record's extra fields, error, trace_id and span_id, in this order.

    Mappings are flattened: pod={"name": "a"} becomes pod.name=a. An extra field with the name of another field gets a
    trailing underscore. error: an exception's traceback. Long texts and lists are cut. Texts that look like
    credentials are removed.
    """
    fields: dict[str, object] = {
        "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": _NAMES.get(record.levelno, record.levelname.lower()),
        "logger": record.name,
        "msg": _cut(record.getMessage(), MAX_TEXT),
    }
    reserved = {*fields, "error", "trace_id", "span_id"}
    for key, value in vars(record).items():
        if key not in _STANDARD and not key.startswith("_"):
            _flatten(f"{key}_" if key in reserved else key, value, fields)
    if record.exc_info:
        fields["error"] = _cut(logging.Formatter().formatException(record.exc_info), MAX_TRACEBACK)
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        fields["trace_id"] = f"{context.trace_id:032x}"
        fields["span_id"] = f"{context.span_id:016x}"
    return fields


def _flatten(key: str, value: object, into: dict[str, object]) -> None:
    if isinstance(value, str):  # first, because most values are texts and isinstance(value, Mapping) is slow
        into[key] = _cut(value, MAX_TEXT)
    elif value is None or isinstance(value, int | float):
        into[key] = value
    elif isinstance(value, list | tuple | set | frozenset):
        into[key] = [_cut(str(item), MAX_ITEM) for item in islice(value, MAX_ITEMS)]
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            _flatten(f"{key}.{name}", inner, into)
    else:
        into[key] = _cut(str(value), MAX_TEXT)


def _cut(text: str, longest: int) -> str:
    text = redacted(text, longest)
    return text if len(text) <= longest else text[: longest - 1] + "…"


class JsonFormatter(logging.Formatter):
    """Formatter that makes one ASCII line of JSON of a record. Values without a form in JSON become their str()."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(fields_of(record))


class TextFormatter(logging.Formatter):
    """Formatter for people: `12:30:01.123 info  message key=value`. Escapes unprintable characters and line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        fields = fields_of(record)
        time, level, _, message = (str(fields.pop(key)) for key in ("ts", "level", "logger", "msg"))
        fields.pop("span_id", None)
        rest = "".join(f" {key}={value}" for key, value in fields.items())
        text = f"{time[11:23]} {level:<5} {message}{rest}"
        return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
