"""The lines of the log are an interface: fixed words, and fields. docs/reference/logs.md has all of them."""

from __future__ import annotations

import ast
import re

from log_calls import ROOT, LogCall, log_calls

DOC = ROOT.parent / "docs" / "reference" / "logs.md"


def lines() -> list[LogCall]:
    """Returns every call of a logger in the plugin."""
    return list(log_calls())


def test_messages_are_fixed_words_and_variable_parts_are_fields() -> None:
    assert len(lines()) > 40
    for line in lines():
        assert line.level, f"{line.where}: use the method of a level"
        assert isinstance(line.message, ast.Constant), f"{line.where}: the message must be a constant"
        assert line.arguments == 1, f"{line.where}: variable parts must be in extra"
        assert "%" not in line.text, line.where
        assert line.keywords <= {"extra", "exc_info"}, line.where
        assert bool(line.fields) == ("extra" in line.keywords), f"{line.where}: the fields must be constant"


def test_no_field_hides_the_traceback() -> None:
    """A field `error` would be shown as `error_`. The reason of a failure is the field `cause`."""
    for path in ROOT.rglob("*.py"):
        for found in re.findall(r'extra=\{[^}]*"error":', path.read_text(encoding="utf-8")):
            raise AssertionError(f"{path}: {found}")


def test_the_document_has_every_line_with_its_level() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert sorted({(line.text, line.level) for line in lines()}) == sorted(rows)
