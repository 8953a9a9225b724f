"""How the demo shows its lines: coloured, and within the width of a terminal. Pure, except `Screen.of`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

BOLD, GREEN, RED = "1", "32", "31"
"""SGR parameters (ECMA-48)."""
INDENT = " " * 8
"""Of an outcome's further lines: the width of its mark."""
ELLIPSIS = "..."


@dataclass(frozen=True)
class Screen:
    """Where lines are shown.

    width: columns of the terminal; None: a line has any length. colour: whether the terminal shows colours.
    """

    width: int | None = None
    colour: bool = False

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str]) -> Screen:
        """Returns the screen behind a stream. NO_COLOR, set to anything, forbids colours (no-color.org)."""
        if not stream.isatty():
            return cls()
        colour = not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
        return cls(shutil.get_terminal_size().columns, colour)

    def heading(self, text: str) -> str:
        return self._painted(text, BOLD)

    def outcome(self, promise: str, evidence: str, *, holds: bool) -> str:
        """Returns one promise with its evidence, on as many lines as the width demands."""
        mark, colour = ("ok", GREEN) if holds else ("FAIL", RED)
        first, *more = self.wrapped(f"  {mark:<4}  {promise:<48} {evidence}", INDENT).split("\n")
        return "\n".join([first.replace(mark, self._painted(mark, colour), 1), *more])

    def verdict(self, text: str, *, holds: bool) -> str:
        return self._painted(text, GREEN if holds else RED)

    def wrapped(self, text: str, indent: str = "") -> str:
        """Returns a text on lines that fit, broken at blanks. indent: begins each further line."""
        if self.width is None:
            return text
        return textwrap.fill(text, self.width, subsequent_indent=indent, break_on_hyphens=False)

    def cut(self, line: str) -> str:
        """Returns a line, or what fits of it with "..." at its end."""
        if self.width is None or len(line) <= self.width:
            return line
        return line[: max(self.width - len(ELLIPSIS), 0)] + ELLIPSIS

    def _painted(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour else text
