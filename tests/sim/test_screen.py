"""The lines of the demo on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from usbip_sim.screen import Screen

EVIDENCE = "127.0.0.1:42437/1-1.2 is held by node node-a since 2026-11-29T17:19:13Z"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_longer_than_the_terminal_and_no_evidence_is_lost(width: int) -> None:
    screen = Screen(width)
    shown = screen.outcome("Allocate is denied and names the holder", EVIDENCE, holds=True)
    assert max(map(len, shown.split("\n"))) <= width
    assert shown.split()[-len(EVIDENCE.split()) :] == EVIDENCE.split()
    assert len(screen.cut("├─ lock " * 40)) == width
    assert screen.cut("├─ lock ").endswith("lock ")


def test_outside_a_terminal_lines_are_whole_and_without_colour() -> None:
    screen = Screen.of(io.StringIO(), {"TERM": "xterm"})
    assert screen == Screen()
    line = "├─ lock " * 40
    assert (screen.cut(line), screen.wrapped(line)) == (line, line)
    assert "\x1b" not in screen.outcome("a promise", "its evidence", holds=False)


@pytest.mark.parametrize(
    ("environ", "colour"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
)
def test_a_terminal_has_colours_unless_they_are_forbidden(environ: dict[str, str], colour: bool) -> None:
    screen = Screen.of(Terminal(), environ)
    assert screen.width
    assert screen.colour is colour


def test_colours_show_what_held() -> None:
    screen = Screen(80, colour=True)
    assert "\x1b[32mok\x1b[0m" in screen.outcome("a promise", "ok", holds=True)
    assert "\x1b[31mFAIL\x1b[0m" in screen.outcome("a promise", "its evidence", holds=False)
