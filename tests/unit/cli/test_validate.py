"""`validate`: files, ConfigMaps and standard input are checked by the plugin's own parser, without a cluster."""

from __future__ import annotations

import copy
import io
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from usbip_plugin.cli.main import main
from usbip_plugin.cli.parser import Exit, parser
from usbip_plugin.cli.validate import check
from usbip_plugin.config.document import MAX_FILE_BYTES
from usbip_plugin.config.problems import ConfigProblem

ROOT = Path(__file__).parents[3]
VALID = """resources:
  storage:
    - target: {host: lab}
      selector: {vendor: "0951"}
"""
MANIFEST = """apiVersion: v1
kind: Namespace
metadata: {name: usbip-system}
---
kind: ConfigMap
data:
  notes.txt: "resources: ["
  config.yaml: |
    # a comment

    resources:
      storage:
        - target: {host: lab}
          selector: {vendor: "xyz"}
---
kind: List
items:
  - kind: ConfigMap
    data:
      export.yaml: |-
        export: [{vendor: "0951", product: }]
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("validate opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refused)


def validated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    status = main(["validate", "-o", "json", *arguments])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return status, found


def written(tmp_path: Path, text: str, name: str = "config.yaml") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_a_valid_file_has_status_0_and_its_contents_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, VALID)
    assert main(["validate", file]) == Exit.DONE
    assert capsys.readouterr().out == f"{file}: valid, 1 resource, 1 selector, 1 server\n"


def test_a_problem_has_status_2_its_line_path_message_and_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, VALID.replace("0951", "a; b"))
    status, (report,) = validated(capsys, file)
    assert status == Exit.USAGE
    assert report == {
        "file": file,
        "valid": False,
        "errors": [
            {
                "path": "resources.storage[0].selector.vendor",
                "line": 4,
                "message": "'a; b' is not a valid USB ID",
                "hint": "expected up to 4 hex digits in quotes",
            }
        ],
        "warnings": [],
    }
    assert main(["validate", file]) == Exit.USAGE
    place = f"{file}:4: resources.storage[0].selector.vendor"
    text = "'a; b' is not a valid USB ID; expected up to 4 hex digits in quotes"
    assert capsys.readouterr().out == f"{place}: {text}\n{file}: not valid, 1 problem\n"


def test_the_configmaps_of_a_manifest_are_checked_with_the_manifests_lines() -> None:
    problems = check(MANIFEST, "all.yaml", ()).errors
    assert [problem.split(": ")[:2] for problem in problems] == [
        ["all.yaml:14", "resources.storage[0].selector.vendor"],
        ["all.yaml:21", "export[0].product"],
    ]


@pytest.mark.parametrize("style", ["'resources: {}'", '"resources: {}"', "{resources: {}}"])
def test_a_configmap_may_quote_its_text_and_must_have_text(style: str) -> None:
    report = check(f"kind: ConfigMap\ndata:\n  config.yaml: {style}\n", "cm.yaml", ())
    assert report.is_valid == (style[0] != "{")


def test_a_manifest_without_a_configuration_is_an_error() -> None:
    for text in ("kind: Pod\n", "kind: ConfigMap\ndata: {other.yaml: 'resources: {}'}\n", "kind: ConfigMap\n"):
        (problem,) = check(text, "m.yaml", ()).errors
        assert problem.startswith("m.yaml: has no ConfigMap with config.yaml or export.yaml below data")


def test_standard_input_and_several_files_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(MANIFEST.encode())))
    status, reports = validated(capsys, written(tmp_path, VALID), "-")
    assert status == Exit.USAGE
    assert [(report["file"].rpartition("/")[2], report["valid"]) for report in reports] == [
        ("config.yaml", True),
        ("stdin", False),
    ]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (b"", "empty file", "add resources, or write resources: {} for none"),
        (b"resources: {}\nlisten: banana\n", "'banana' is not a valid listen address", "use :8080 or 127.0.0.1:8080"),
        (b"\xff", "must be UTF-8 text", ""),
        (b"a: [", "not valid YAML: while parsing a flow node did not find expected node content", ""),
        (b"#" * (MAX_FILE_BYTES + 1), f"must not be larger than {MAX_FILE_BYTES // 1024} KiB", ""),
        (None, "cannot be read: No such file or directory", ""),
    ],
)
def test_what_is_not_a_configuration_has_status_2(
    text: bytes | None, message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_bytes(text)
    status, (report,) = validated(capsys, str(file))
    assert status == Exit.USAGE
    (problem,) = report["errors"]
    assert (problem["message"], problem["hint"]) == (message, hint)


def test_a_warning_leaves_the_file_valid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = written(tmp_path, f"note: x\n{VALID}")
    status, (report,) = validated(capsys, file)
    assert status == Exit.DONE
    (warning,) = report["warnings"]
    assert (warning["path"], warning["line"], warning["message"]) == ("note", 1, "ignored unknown key")


def test_extras_are_checked_as_by_run() -> None:
    text = VALID + "      extras: [{hostPath: /dev/sda}]\n"
    allowed = parser().parse_args(["validate", "-"]).allow_extras
    assert allowed == parser().parse_args(["run"]).allow_extras
    assert "/dev/sda is not allowed" in check(text, "c", allowed).errors[0]
    assert check(text, "c", ("/dev/sd?",)).is_valid


def test_a_hint_begins_after_the_message_and_not_in_a_quoted_value() -> None:
    for text, message, hint in (
        ("no such thing", "no such thing", ""),
        ("a pod's key; remove the pod's key", "a pod's key", "remove the pod's key"),
        ("'a; b' is odd; write c; or d", "'a; b' is odd", "write c; or d"),
        ("x;y", "x;y", ""),
    ):
        problem = ConfigProblem("f", text, line=3, path="a.b")
        assert (problem, problem.message, problem.hint) == (f"f:3: a.b: {text}", message, hint)


def test_a_copy_of_a_problem_is_its_text() -> None:
    problem = ConfigProblem("f", "no such key; write another", line=3)
    copied = copy.deepcopy(problem)
    assert (type(copied), copied) == (str, "f:3: no such key; write another")


def test_the_hook_of_pre_commit_is_a_command_of_this_program() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    program, *words = hook["entry"].split()
    assert program == "usbip-plugin"
    assert parser().parse_args([*words, "config.yaml"]).command == "validate"
