"""The command line: exit status, help and completion."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from argcomplete.finders import CompletionFinder

from tests.rigs.command_rig import process_restored
from tests.rigs.kubeconfig import kubeconfig
from usbip_plugin import __version__
from usbip_plugin.cli import completion
from usbip_plugin.cli.main import main
from usbip_plugin.cli.parser import KUBECTL, MEANING, Exit, parser
from usbip_plugin.cli.usage import CommandParser

FILE = "only-file"
DEVICES = {"usbip-abc": "lab:3240/1-1", "usbip-xyz": "lab:3240/1-2"}
Complete = Callable[..., list[str]]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Complete]:
    """Returns a function that completes the last of some words, in a directory with one file."""
    (tmp_path / FILE).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(completion, "_devices", lambda _options: DEVICES)
    # argcomplete would write to file descriptor 9, which this process may use
    monkeypatch.setattr(CompletionFinder, "_init_debug_stream", lambda _self: None)

    def run(*typed: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["kubectl_complete-usbip", *typed])
        assert completion.kubectl() == 0
        *lines, directive = capsys.readouterr().out.splitlines()
        assert directive == ":4", "no file names"
        return [line.partition("\t")[0] for line in lines]

    with process_restored():
        yield run


COMMANDS = [
    *("devices", "nodes", "servers", "explain", "events", "trace", "release", "prune", "support-bundle"),
    *("validate", "check", "version", "help"),
]


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        (("re",), ["release"]),
        (("devices", "-o", ""), ["table", "wide", "json", "yaml", "name"]),
        (("devices", "--output", "j"), ["json"]),
        (("devices", "--kub"), ["--kubeconfig"]),
        (("devices", "--kubeconfig", ""), [FILE]),
        (("devices", ""), ["usbip-abc", "usbip-xyz"]),
        (("nodes", ""), []),
        (("explain", ""), ["usbip-abc", "usbip-xyz"]),
        (("-h", "explain", "usbip-x"), ["usbip-xyz"]),
        (("release", "--namespace", "ns", ""), ["usbip-abc", "usbip-xyz"]),
        (("explain", "--namespace=ns", ""), ["usbip-abc", "usbip-xyz"]),
        (("release", "usbip-abc", ""), []),
        (("release", "usbip-abc", "--f"), ["--force"]),
        (("nonsense", "x", ""), COMMANDS),
    ],
)
def test_the_last_word_is_completed(complete: Complete, typed: tuple[str, ...], completions: list[str]) -> None:
    assert complete(*typed) == completions


def test_the_completion_of_devices_uses_the_flags_given(complete: Complete, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[argparse.Namespace] = []
    monkeypatch.setattr(completion, "_devices", lambda options: given.append(options) or {})  # type: ignore[func-returns-value]
    complete("explain", "--kubeconfig", "f", "-n", "ns", "")
    assert (given[0].kubeconfig, given[0].namespace) == ("f", "ns")


def bash(line: str, tmp_path: Path) -> list[str]:
    """Returns what bash offers at the end of a line."""
    tool = tmp_path / "usbip-plugin"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m usbip_plugin "$@"\n')
    tool.chmod(0o755)
    code = f"""
        source <(usbip-plugin completion bash)
        COMP_LINE="{line}" COMP_POINT={len(line)}
        _python_argcomplete usbip-plugin
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "KUBECONFIG": "/nonexistent"}
    done = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True, env=environ)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values(tmp_path: Path) -> None:
    assert bash("usbip-plugin exp", tmp_path) == ["explain", "export", "exported"]
    assert bash("usbip-plugin devices -o y", tmp_path) == ["yaml"]
    assert bash("usbip-plugin completion ", tmp_path) == ["bash", "zsh", "fish"]
    assert bash("usbip-plugin simulate server --log-level d", tmp_path) == ["debug"]
    assert bash("usbip-plugin release --for", tmp_path) == ["--force"]
    assert bash("usbip-plugin explain usb", tmp_path) == [], "without a cluster, and without an error message"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_completion_script(shell: str) -> None:
    text = completion.script(shell)
    assert "_ARGCOMPLETE" in text
    assert "usbip-plugin" in text


def test_the_status_of_a_usage_error_is_2() -> None:
    for arguments in (
        ["nonsense"],
        ["help", "nonsense"],
        ["explain"],
        ["devices", "-o", "xml"],
        ["release", "x", "--maybe"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == Exit.USAGE


def test_the_status_is_2_without_a_kubeconfig_and_3_without_an_api_server(
    tmp_path: Path, unused_tcp_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "--kubeconfig", str(tmp_path / "none")]) == Exit.USAGE
    config = tmp_path / "kubeconfig"
    config.write_text(kubeconfig(f"http://127.0.0.1:{unused_tcp_port}"))
    for command in (["devices"], ["explain", "x"], ["release", "x"]):
        assert main([*command, "--kubeconfig", str(config)]) == Exit.API
    out, err = capsys.readouterr()
    assert out == ""
    assert "list leases.coordination.k8s.io" in err


def test_the_help_explains_every_exit_status() -> None:
    text = " ".join(parser().format_help().split())
    for number, meaning in MEANING.items():
        assert f"{number:d} {meaning}" in text
    assert set(MEANING) == set(Exit)


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_node_refuses_extras_that_its_command_line_does_not_allow(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    entry = "{target: {host: h}, selector: {vendor: 0x1}, extras: [{hostPath: /dev/sda}]}"
    config.write_text(f"resources: {{a: [{entry}]}}\n", encoding="utf-8")
    with process_restored():
        status = main([command, "--node-name", "n", "--config", str(config), "--allow-extras", "/dev/fuse,/dev/snd/*"])
    out, err = capsys.readouterr()
    assert status == (Exit.USAGE if command == "run" else Exit.PROBLEM)
    assert f"{config}:1: resources.a[0]: extras: /dev/sda is not allowed (/dev/fuse, /dev/snd/*)" in out + err


def test_a_relative_pattern_of_extras_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--allow-extras", "/dev/fuse,dev/sda"])
    assert ended.value.code == Exit.USAGE
    assert "'dev/sda' must be an absolute path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10.0), ("500ms", 0.5), ("2m", 120.0), ("1.5", 1.5), ("1h", 3600.0), ("0", None)]
)
def test_a_request_timeout_is_a_time_as_kubectl_takes_it(text: str, seconds: float | None) -> None:
    assert parser().parse_args(["nodes", "--request-timeout", text]).request_timeout == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "10 s", "1d", "9999999s"])
def test_another_request_timeout_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["nodes", f"--request-timeout={text}"])
    assert "must be a time such as 500ms, 10s, 2m or 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)//{trace_id}", "https://tempo.example.com/", "https://{trace_id} x"]
)
def test_a_link_to_traces_that_is_no_url_of_a_trace_is_refused(link: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", f"--trace-link={link}"])
    assert ended.value.code == Exit.USAGE
    assert "must be an http:// or https:// URL with {trace_id}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "export", "exported", "completion", "demo", "simulate"])
def test_kubectl_has_only_the_commands_for_people(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command], prog=KUBECTL)
    assert ended.value.code == Exit.USAGE
    assert f"unknown command '{command}'" in capsys.readouterr().err
    assert command in parser().format_help()


@pytest.mark.parametrize(
    ("arguments", "usage", "said"),
    [
        (["dveices"], "usbip-plugin [-h]", "unknown command 'dveices'; did you mean devices?"),
        (["xyz"], "usbip-plugin [-h]", "unknown command 'xyz'\n"),
        (["help", "explian"], "usbip-plugin [-h]", "unknown command 'explian'; did you mean explain?"),
        (["simulate", "sever"], "usbip-plugin simulate [-h]", "unknown command 'sever'; did you mean server?"),
        (["nodes", "x"], "usbip-plugin nodes [-h]", "unrecognized arguments: x\n"),
        (["nodes", "--namespce=x"], "usbip-plugin nodes [-h]", "--namespce=x; did you mean --namespace?"),
        (["simulate", "kernel", "--socket", "s", "--sockte"], "usbip-plugin simulate kernel [-h]", "mean --socket?"),
    ],
)
def test_a_usage_error_has_the_commands_own_usage_and_what_was_probably_meant(
    arguments: list[str], usage: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == Exit.USAGE
    assert err.startswith(f"usage: {usage}")
    assert said in err


def leaves(top: CommandParser, before: str = "") -> Iterator[tuple[str, CommandParser]]:
    for name, command in top.commands().items():
        yield before + name, command
        yield from leaves(command, f"{before}{name} ")


@pytest.mark.parametrize("name", dict(leaves(parser())))
def test_the_help_of_each_command_has_a_description_and_examples_that_can_be_parsed(name: str) -> None:
    command = dict(leaves(parser()))[name]
    assert len(command.description or "") > 20
    head, *examples = (command.epilog or "").splitlines()
    assert head == "examples:"
    assert examples
    for example in examples:
        program, *words = shlex.split(example.partition(">")[0])
        parsed = parser().parse_args(words)
        assert (program, parsed.command) == ("usbip-plugin", name.split(maxsplit=1)[0])


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        ([], "usbip-plugin [-h]"),
        (["help"], "usbip-plugin [-h]"),
        (["help", "devices"], "usbip-plugin devices [-h]"),
        (["help", "simulate", "server"], "usbip-plugin simulate server [-h]"),
        (["simulate"], "usbip-plugin simulate [-h]"),
    ],
)
def test_help_is_shown_without_a_command_and_by_help(
    arguments: list[str], usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == Exit.DONE
    out, err = capsys.readouterr()
    assert (out.startswith(f"usage: {usage}"), err) == (True, "")


def test_version_has_a_form_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == Exit.DONE
    assert capsys.readouterr().out == f"usbip-plugin {__version__}\n"
    assert main(["version", "-o", "json"]) == Exit.DONE
    assert json.loads(capsys.readouterr().out)["version"] == __version__
