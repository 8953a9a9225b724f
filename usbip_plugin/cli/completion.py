"""Completion of the command line in bash, zsh and fish, and as `kubectl usbip`. Loaded only to complete a word."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from functools import partial

import argcomplete
from argcomplete.completers import BaseCompleter, FilesCompleter
from argcomplete.shell_integration import shellcode

from usbip_plugin.cli.parser import DEVICE, KUBECTL, PROG, parser
from usbip_plugin.errors import PluginError

TIMEOUT_S = 2.0
"""Seconds that a completion waits for the API server."""
KUBECTL_NO_FILES = ":4"
"""The line after the candidates that stops kubectl from completing file names (cobra: ShellCompDirectiveNoFileComp)."""
LINES = {
    "_ARGCOMPLETE": "1",
    "_ARGCOMPLETE_SHELL": "fish",
    "_ARGCOMPLETE_IFS": "\n",
    "_ARGCOMPLETE_DFS": "\t",
    "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
}
"""The environment in which argcomplete prints a candidate a line, with its description after a tab, as kubectl does."""


class _Values(BaseCompleter):
    """Completes devices by asking the API server, and every other value without choices as a file name."""

    def __call__(
        self, *, prefix: str, action: argparse.Action, parser: argparse.ArgumentParser, parsed_args: argparse.Namespace
    ) -> Iterable[str]:
        del parser
        return _devices(parsed_args) if action.metavar == DEVICE else FilesCompleter()(prefix)


def script(shell: str) -> str:
    """Returns the completion script for a shell. `kubectl usbip` needs none: kubectl calls kubectl_complete-usbip."""
    return shellcode([PROG], shell=shell).strip("\n")


_complete = partial(argcomplete.autocomplete, always_complete_options=False, default_completer=_Values())


def autocomplete() -> None:
    """Answers the script of a shell, which sets _ARGCOMPLETE, and ends the process."""
    _complete(parser())


def kubectl() -> int:
    """Carries out `kubectl_complete-usbip WORD...`, which kubectl runs to complete `kubectl usbip WORD...`."""
    *before, current = sys.argv[1:] or [""]
    line = " ".join([PROG, *map(shlex.quote, before), current and shlex.quote(current)])
    os.environ.update(LINES, COMP_LINE=line, COMP_POINT=str(len(line)))
    found = io.StringIO()
    with contextlib.redirect_stderr(io.StringIO()):  # nothing may be written between the candidates
        _complete(parser(KUBECTL), output_stream=found, exit_method=lambda _status: None)
    print(*found.getvalue().splitlines(), KUBECTL_NO_FILES, sep="\n")  # noqa: T201 - this is the answer
    return 0


def _devices(options: argparse.Namespace) -> Mapping[str, str]:
    """Returns the cluster's device IDs, each with SERVER/BUSID; none if the API server takes longer than TIMEOUT_S."""
    from usbip_plugin.cli.cluster_commands import read_devices  # noqa: PLC0415 - most completions need no API server

    async def ask() -> Mapping[str, str]:
        async with asyncio.timeout(TIMEOUT_S):
            return {known.lock.device_id: known.device or "" for known in await read_devices(options)}

    with contextlib.suppress(PluginError, TimeoutError):
        return asyncio.run(ask())
    return {}
