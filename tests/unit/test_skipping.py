"""No test of `make test` is skipped unnoticed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAYS_TO_SKIP = re.compile(r"\b(importorskip|skipif|mark\.skip|pytest\.skip|unittest\.skip|SkipTest)\b")


def test_a_missing_requirement_skips_a_test_and_fails_it_if_ci_is_true(
    needs: Callable[[bool, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for ci in ("true", ""):
        monkeypatch.setenv("CI", ci)
        needs(True, "nothing")
    with pytest.raises(pytest.skip.Exception, match="needs a printer"):
        needs(False, "a printer")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="needs a printer"):
        needs(False, "a printer")


def test_only_the_fixture_needs_skips_a_test_of_make_test() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = settings["tool"]["pytest"]["ini_options"]["testpaths"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)]
    assert len(files) > 100
    found = [str(file.relative_to(ROOT)) for file in files if WAYS_TO_SKIP.search(file.read_text(encoding="utf-8"))]
    assert found == [], "use the fixture needs of tests/conftest.py"
