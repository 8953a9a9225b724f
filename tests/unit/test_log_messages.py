"""The lines of the log are an interface: fixed words, and fields. docs/reference/logs.md has all of them."""

from __future__ import annotations

import ast
import re

from log_calls import ROOT, LogCall, log_calls

DOC = ROOT.parent / "docs" / "reference" / "logs.md"


def lines() -> list[LogCall]:
    """Every line that the plugin can write."""
    return list(log_calls())


def test_there_is_something_to_look_at() -> None:
    assert len(lines()) > 40


def test_messages_are_fixed_words_and_what_varies_is_in_fields() -> None:
    for line in lines():
        assert line.level, f"{line.where}: a level by its name, please"
        assert isinstance(line.message, ast.Constant), f"{line.where}: a message made up on the spot"
        assert line.arguments == 1, f"{line.where}: what varies belongs into extra"
        assert "%" not in line.text, line.where
        assert line.keywords <= {"extra", "exc_info"}, line.where
        assert bool(line.fields) == ("extra" in line.keywords), f"{line.where}: fields that nobody can read off"


def test_no_field_hides_the_traceback() -> None:
    """An extra field named error would be shown as error_; why something failed is the field cause."""
    for path in ROOT.rglob("*.py"):
        for found in re.findall(r'extra=\{[^}]*"error":', path.read_text(encoding="utf-8")):
            raise AssertionError(f"{path}: {found}")


def test_the_document_has_every_line_with_its_level() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert sorted({(line.text, line.level) for line in lines()}) == sorted(rows)
