"""A problem of a configuration, as text and in its parts."""

from __future__ import annotations

import re
from typing import Self

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
