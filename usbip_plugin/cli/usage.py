"""The parser class of the command line: suggestions for what is misspelt, and errors with the command's own usage."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeAlias

_CHOICE = re.compile(r"argument (?:COMMAND|WHAT): invalid choice: '(.*?)' \(", re.DOTALL)
_UNRECOGNIZED = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser with one level of commands, or of one command."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **more)

    def commands(self) -> dict[str, CommandParser]:
        """Returns the parsers of the commands by name; none for a command without any."""
        found: dict[str, CommandParser] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - argparse has no public way
                found |= action.choices
        return found

    def command(self, names: Sequence[str]) -> CommandParser:
        """Returns the parser of a command, such as ("simulate", "server"). Ends the process if there is none."""
        found = self
        for name in names:
            if name not in found.commands():
                found.error(_unknown_command(name, found.commands()))
            found = found.commands()[name]
        return found

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses arguments. A command refuses what it does not know itself, so that its own usage is shown."""
        parsed, extras = super().parse_known_args(args, namespace)
        if extras and not self.commands():
            self.error(_UNRECOGNIZED + " ".join(extras))
        return parsed, extras

    def error(self, message: str) -> NoReturn:
        """Ends the process with the usage and the message, which names what was probably meant."""
        if (found := _CHOICE.match(message)) is not None:
            message = _unknown_command(found[1], self.commands())
        elif message.startswith(_UNRECOGNIZED):
            first = message.removeprefix(_UNRECOGNIZED).split()[0].partition("=")[0]
            if first.startswith("-"):
                message += _meant(first, self._option_string_actions)
        super().error(f"{message}\nrun `{self.prog} --help` for help")


def _unknown_command(name: str, known: Iterable[str]) -> str:
    return f"unknown command {name!r}{_meant(name, known)}"


def _meant(word: str, known: Iterable[str]) -> str:
    import difflib  # noqa: PLC0415 - only for errors

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"  # noqa: SLF001
"""What add_subparsers() returns."""
