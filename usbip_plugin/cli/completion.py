"""Completion of the command line in bash, zsh and fish, by a small script for each shell that calls this program.

`usbip-plugin __complete WORD...` prints the candidates for the last word, one a line, each with a description after a
tab. If it prints nothing, the shell completes file names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from usbip_plugin.cli.parser import DEVICE, parser
from usbip_plugin.errors import PluginError

PROG = "usbip-plugin"
COMPLETE = "__complete"
TIMEOUT_S = 2.0
"""Seconds that a completion waits for the API server. A shell that waits for longer is a nuisance."""
FILES = frozenset({"FILE", "DIR"})
"""Metavars of options whose values are paths: the shell completes them."""
KUBECTL_NO_FILES = ":4"
"""The line after the candidates that stops kubectl from completing file names (cobra: ShellCompDirectiveNoFileComp)."""

Candidates = Iterable[tuple[str, str]]
"""Pairs of (word, description)."""

_BASH = """\
# bash completion for {prog}; load it with: source <({prog} completion bash)
_{name}() {{
    local line IFS=$'\\n'
    COMPREPLY=()
    while read -r line; do
        COMPREPLY+=("${{line%%$'\\t'*}}")
    done < <({prog} __complete "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null)
}}
complete -o default -F _{name} {prog}
"""
_ZSH = """\
#compdef {prog}
# zsh completion for {prog}; load it with: source <({prog} completion zsh)
_{name}() {{
    local line
    local -a found
    for line in "${{(@f)$({prog} __complete "${{(@)words[2,CURRENT]}}" 2>/dev/null)}}"; do
        [[ -n $line ]] && found+=("${{${{line//:/\\\\:}}/$'\\t'/:}}")
    done
    if (( $#found )); then
        _describe '{prog}' found
    else
        _files
    fi
}}
compdef _{name} {prog}
"""
_FISH = """\
# fish completion for {prog}; load it with: {prog} completion fish | source
function __{name}
    set -l words (commandline -opc) (commandline -ct)
    {prog} __complete $words[2..-1] 2>/dev/null
end
complete -c {prog} -f -n 'test (count (__{name})) -gt 0' -a '(__{name})'
"""


def script(shell: str) -> str:
    """Returns the completion script for a shell.

    `kubectl usbip` needs no script: kubectl's own script calls kubectl_complete-usbip.
    """
    form = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[shell]
    return form.format(prog=PROG, name=PROG.replace("-", "_")).rstrip("\n")


def complete(words: Sequence[str]) -> int:
    """Prints the candidates for the last of words. words begin after the program's name. Returns the exit status."""
    for word, text in candidates(words, _devices):
        print(f"{word}\t{text}" if text else word)  # noqa: T201 - this is the answer
    return 0


def kubectl() -> int:
    """Carries out `kubectl_complete-usbip WORD...`, which kubectl runs to complete `kubectl usbip WORD...`."""
    complete(sys.argv[1:])
    print(KUBECTL_NO_FILES)  # noqa: T201
    return 0


def candidates(words: Sequence[str], devices: Callable[[argparse.Namespace], Candidates]) -> list[tuple[str, str]]:
    """Returns the candidates for the last of words.

    devices: returns the devices; called with the API flags found in words, and only if the last word is a device.
    """
    *before, current = words or [""]
    here = parser()
    flags: dict[str, str] = {}
    waiting: argparse.Action | None = None
    positional = 0
    for word in before:
        if waiting is not None:
            flags[waiting.dest], waiting = word, None
        elif word.startswith("-"):
            waiting = _taking_value(here, word)
        elif (deeper := _commands(here).get(word)) is not None:
            here, positional = deeper, 0
        else:
            positional += 1
    if waiting is not None:
        found = [] if waiting.metavar in FILES else [(str(choice), "") for choice in waiting.choices or ()]
    elif current.startswith("-"):
        found = _options(here)
    elif _commands(here):
        found = _helped_commands(here)
    else:
        found = _positional(here, positional, flags, devices)
    return [(word, text) for word, text in found if word.startswith(current)]


def _commands(here: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in here._actions:  # noqa: SLF001 - argparse has no public way to look at a parser
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            return dict(action.choices)
    return {}


def _helped_commands(here: argparse.ArgumentParser) -> list[tuple[str, str]]:
    return [
        (choice.dest, choice.help or "")
        for action in here._actions  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
        for choice in action._choices_actions  # noqa: SLF001
    ]


def _taking_value(here: argparse.ArgumentParser, option: str) -> argparse.Action | None:
    """Returns the option's action if the next word is its value, else None. "--option=VALUE" gives None too."""
    action = here._option_string_actions.get(option)  # noqa: SLF001
    return action if action is not None and action.nargs is None else None


def _options(here: argparse.ArgumentParser) -> list[tuple[str, str]]:
    return [
        (max(action.option_strings, key=len), (action.help or "").replace("%(default)s", str(action.default)))
        for action in here._actions  # noqa: SLF001
        if action.option_strings
    ]


def _positional(
    here: argparse.ArgumentParser,
    number: int,
    flags: dict[str, str],
    devices: Callable[[argparse.Namespace], Candidates],
) -> list[tuple[str, str]]:
    wanted = [action for action in here._actions if not action.option_strings]  # noqa: SLF001
    if number >= len(wanted):
        return []
    if wanted[number].metavar == DEVICE:
        return list(devices(argparse.Namespace(kubeconfig=flags.get("kubeconfig"), namespace=flags.get("namespace"))))
    return [(str(choice), "") for choice in wanted[number].choices or ()]


def _devices(options: argparse.Namespace) -> Candidates:
    """Returns the devices of the cluster, or none if the API server does not list them within TIMEOUT_S."""
    from usbip_plugin.cli.cluster_commands import read_devices  # noqa: PLC0415 - most completions need no API server

    async def ask() -> Candidates:
        async with asyncio.timeout(TIMEOUT_S):
            return [(known.lock.device_id, known.device or "") for known in await read_devices(options)]

    with contextlib.suppress(PluginError, TimeoutError), _quiet():
        return asyncio.run(ask())
    return []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what the block writes to stderr: nothing may be written between the candidates."""
    with Path(os.devnull).open("w", encoding="ascii") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
