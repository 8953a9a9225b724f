"""`usbip-plugin validate`: checks configuration files, and connects to nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.cli.parser import STDIN, Exit
from usbip_plugin.config.export import parse_export
from usbip_plugin.config.manifest import Configuration, configurations, read_text
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.problems import ConfigProblem
from usbip_plugin.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Report:
    """What is wrong with one file, and if nothing is, what it configures."""

    file: str
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        return not self.errors


def validate(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin validate FILE...`: prints each file's report and returns the exit status."""
    reports = [_checked(file, options.allow_extras) for file in options.file]
    print(as_json(reports) if options.output == "json" else "\n".join(map(as_text, reports)))  # noqa: T201
    return Exit.DONE if all(report.is_valid for report in reports) else Exit.USAGE


def check(text: str, source: str, allow_extras: Sequence[str]) -> Report:
    """Returns the report on a file's text. allow_extras: as of parse_config(). source: the file's name."""
    errors: list[str] = []
    warnings: list[str] = []
    contents: list[str] = []
    try:
        found = configurations(text, source)
    except ConfigError as error:
        return Report(source, error.problems)
    for one in found:
        try:
            content, warned = _contents(one, source, allow_extras)
        except ConfigError as error:
            errors += error.problems
        else:
            contents.append(content)
            warnings += warned
    return Report(source, tuple(errors), tuple(warnings), tuple(contents))


def _contents(one: Configuration, source: str, allow_extras: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Returns what a configuration has, and its warnings. Raises ConfigError."""
    if one.exporter:
        exported = parse_export(one.text, source)
        return _count(len(exported.config.export), "selector") + " to export", exported.warnings
    parsed = parse_config(one.text, source, allow_extras=allow_extras)
    config = parsed.config
    entries = sum(len(resource.devices) for resource in config.resources)
    counts = ((len(config.resources), "resource"), (entries, "selector"), (len(config.servers()), "server"))
    return ", ".join(_count(number, noun) for number, noun in counts), parsed.warnings


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _checked(file: str, allow_extras: Sequence[str]) -> Report:
    source = "stdin" if file == STDIN else file
    try:
        return check(_text(file, source), source, allow_extras)
    except ConfigError as error:
        return Report(source, error.problems)


def _text(file: str, source: str) -> str:
    """Returns the text of the file. Raises ConfigError."""
    try:
        if file == STDIN:
            return read_text(sys.stdin.buffer, source)
        with Path(file).open("rb") as opened:
            return read_text(opened, source)
    except OSError as error:
        raise ConfigError(source, [ConfigProblem(source, f"cannot be read: {error.strerror}")]) from error


def as_text(report: Report) -> str:
    """Returns the report for people: a line for each problem, and a last one with the result."""
    result = f"not valid, {_count(len(report.errors), 'problem')}"
    if report.is_valid:
        result = f"valid, {'; '.join(report.contents)}"
    warnings = (f"{warning} (warning)" for warning in report.warnings)
    return "\n".join([*report.errors, *warnings, f"{report.file}: {result}"])


def as_json(reports: Sequence[Report]) -> str:
    """Returns the reports as a JSON list. Its keys are stable."""
    return json.dumps([_structured(report) for report in reports], indent=2)


def _structured(report: Report) -> dict[str, object]:
    return {
        "file": report.file,
        "valid": report.is_valid,
        "errors": [_parts(problem) for problem in report.errors],
        "warnings": [_parts(problem) for problem in report.warnings],
    }


def _parts(problem: str) -> dict[str, object]:
    if not isinstance(problem, ConfigProblem):
        return {"path": "", "line": None, "message": problem, "hint": ""}
    return {"path": problem.path, "line": problem.line, "message": problem.message, "hint": problem.hint}
