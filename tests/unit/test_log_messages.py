"""The lines of the log are an interface: fixed words, and fields. docs/reference/logs.md has all of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import usbip_plugin

ROOT = Path(usbip_plugin.__file__).parent
DOC = ROOT.parent / "docs" / "reference" / "logs.md"
LEVELS = {"debug": "debug", "info": "info", "warning": "warn", "error": "error", "critical": "error"}
LOGGERS = {"log", "_log", "logger"}


class Line(NamedTuple):
    """One call of a logger. level: as the log shows it; where: file and line."""

    where: str
    level: str
    message: ast.expr | None
    arguments: int
    keywords: frozenset[str]


def lines() -> Iterator[Line]:
    """Every line that the plugin, without its stand-ins, can write."""
    for path in sorted(ROOT.rglob("*.py")):
        if "sim" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method), args=args) if name in LOGGERS:
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    assert method not in {"log", "exception", "warn", "fatal"}, f"{where}: a level by its name, please"
                    if method not in LEVELS:
                        continue
                    keywords = frozenset(str(keyword.arg) for keyword in node.keywords)
                    yield Line(where, LEVELS[method], args[0] if args else None, len(args), keywords)


def message(line: Line) -> str:
    return str(line.message.value) if isinstance(line.message, ast.Constant) else ""


def test_there_is_something_to_look_at() -> None:
    assert len(list(lines())) > 40


def test_messages_are_fixed_words_and_what_varies_is_in_fields() -> None:
    for line in lines():
        assert isinstance(line.message, ast.Constant), f"{line.where}: a message made up on the spot"
        assert line.arguments == 1, f"{line.where}: what varies belongs into extra"
        assert "%" not in message(line), line.where
        assert line.keywords <= {"extra", "exc_info"}, line.where


def test_no_field_hides_the_traceback() -> None:
    """An extra field named error would be shown as error_; why something failed is the field cause."""
    for path in ROOT.rglob("*.py"):
        for found in re.findall(r'extra=\{[^}]*"error":', path.read_text(encoding="utf-8")):
            raise AssertionError(f"{path}: {found}")


def test_the_document_has_every_line_with_its_level() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert sorted({(message(line), line.level) for line in lines()}) == sorted(rows)
