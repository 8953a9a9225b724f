"""A problem of a configuration, as text and in its parts. Needs no YAML, so that the command line starts fast."""

from __future__ import annotations

import re
from typing import Self

MAX_SHOWN = 80
"""Characters of a key or value shown in a message."""
_MESSAGE = re.compile(r"(?:(?<!\w)'[^']*'|[^;]|;(?! ))*")  # up to the first "; " outside of quotes


class ConfigProblem(str):
    """A problem of a configuration as one line of text, "source:line: path: message; hint", with its parts.

    line: from 1, None if the problem has no line.
    path: of the keys, such as resources.storage[0].selector; "" for the whole file.
    hint: what to do; "" if the message says it.
    """

    __slots__ = ("hint", "line", "message", "path")

    line: int | None
    path: str
    message: str
    hint: str

    def __new__(cls, source: str, text: str, *, line: int | None = None, path: str = "") -> Self:
        """Returns the problem. text: what is wrong; and what to do after "; ", if that is said."""
        place = source if line is None else f"{source}:{line}"
        problem = super().__new__(cls, f"{place}: {path}: {text}" if path else f"{place}: {text}")
        end = found.end() if (found := _MESSAGE.match(text)) else len(text)
        problem.line, problem.path = line, path
        problem.message, problem.hint = text[:end], text[end:].removeprefix("; ")
        return problem

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Makes a copy, as dataclasses.asdict() makes one for the status page, the plain text."""
        return str, (str(self),)


def shown(text: str) -> str:
    """Returns a key or value for a message: cut at MAX_SHOWN, and without characters that control a terminal."""
    short = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
    return short if short.isprintable() else repr(short)[1:-1]
