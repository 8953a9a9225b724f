"""Records `make demo` in a terminal of its own: python docs/cast.py docs/demo.cast docs/demo.svg

The first file is an asciinema cast (version 2), the second an animated picture of it without the trace. What names this
machine is replaced. With --draw, makes the picture from the cast that is there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, ROWS = 90, 40
"""Of the terminal."""
SECONDS = 120.0
"""Longest time of the demo."""
CHUNK = 65536
"""Bytes of one read."""
PROMPT = "$ make demo\r\n"
TITLE = "usbip-plugin: make demo"
LEFT_OUT = "The trace of the first Allocate"
"""Begins the part that the picture leaves out, up to the last line."""

FONT, LINE, COLUMN, MARGIN = 13, 18, 7.83, 14
"""Of the picture, in pixels: size of the text, height of a line, width of a character, edge."""
STYLE = """text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#d8dee9;white-space:pre}
.b{font-weight:700;fill:#fff}.g{fill:#8fce7a}.r{fill:#ff7b72}
text{animation:show .1s both}@keyframes show{from{opacity:0}}
@media (prefers-reduced-motion:reduce){text{animation:none}}"""
CLASSES = {"1": "b", "32": "g", "31": "r"}
"""Class of a colour in the picture, by its SGR parameter (ECMA-48)."""


class Output(NamedTuple):
    """Text that appeared on the terminal, and when: seconds since the start."""

    at: float
    text: str


def record(command: Sequence[str]) -> list[Output]:
    """Runs the command in a terminal and returns its output.

    Raises CalledProcessError if it fails, and TimeoutError if it does not end within SECONDS.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environ = {**os.environ, "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environ.pop(name, None)
    found, began, rest = [Output(0.0, PROMPT)], time.monotonic(), b""
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as process:  # noqa: S603
        os.close(theirs)
        try:
            while True:
                left = began + SECONDS - time.monotonic()
                if not select.select([ours], [], [], max(left, 0.0))[0]:
                    raise TimeoutError(f"no end within {SECONDS:g} s")
                try:
                    read = os.read(ours, CHUNK)
                except OSError:  # EIO: the last program has closed the terminal
                    break
                if not read:
                    break
                # whole lines only, so that no character is divided
                lines, newline, rest = (rest + read).rpartition(b"\n")
                if newline:
                    found.append(Output(round(time.monotonic() - began, 3), (lines + newline).decode()))
        finally:
            process.kill()
            os.close(ours)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return found


def scrubbed(text: str) -> str:
    """Returns a text without the paths of this machine."""
    return text.replace(str(ROOT), "usbip-plugin").replace(str(Path.home()), "~")


def cast(outputs: Iterable[Output]) -> str:
    """Returns the recording as an asciinema cast: a JSON header, then one JSON list a line."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": TITLE, "env": {"TERM": "xterm-256color"}}
    events = ([output.at, "o", scrubbed(output.text)] for output in outputs)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *events))


def outputs_of(text: str) -> list[Output]:
    """Returns the output in a cast."""
    return [Output(at, shown) for at, kind, shown in map(json.loads, text.splitlines()[1:]) if kind == "o"]


def lines_of(outputs: Iterable[Output]) -> Iterator[Output]:
    """Yields the lines that the picture shows, and when each appeared."""
    shown = True
    last = None
    for output in outputs:
        for line in output.text.replace("\r", "").splitlines():
            shown = shown and LEFT_OUT not in line
            last = Output(output.at, line)
            if shown:
                yield last
    if last is not None and not shown:
        yield last


def picture(lines: Sequence[Output]) -> str:
    """Returns an SVG that shows each line when it appeared."""
    width, height = round(COLUMNS * COLUMN) + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN
    rows = "".join(
        f'<text x="{MARGIN}" y="{MARGIN + LINE * number + FONT}" style="animation-delay:{line.at:.2f}s">'
        f"{_spans(line.text)}</text>\n"
        for number, line in enumerate(lines)
        if line.text
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{TITLE}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#1f2430"/>\n{rows}</svg>\n'
    )


def _spans(line: str) -> str:
    """Returns a line with colours as elements of an SVG."""
    parts = re.split(r"\x1b\[(\d*)m", line)
    texts = [escape(parts[0])]
    for colour, text in zip(parts[1::2], parts[2::2], strict=True):
        name = CLASSES.get(colour)
        texts.append(f'<tspan class="{name}">{escape(text)}</tspan>' if name and text else escape(text))
    return "".join(texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only make the picture, from the cast that is there")
    parser.add_argument("cast", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    if not options.draw:
        recorded = record([sys.executable, "-m", "usbip_plugin", "demo"])
        options.cast.write_text(cast(recorded), encoding="utf-8")
    shown = list(lines_of(outputs_of(options.cast.read_text(encoding="utf-8"))))
    options.picture.write_text(picture(shown), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
