"""The recorded demo in docs, and how docs/cast.py records and draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import cast
import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
MAX_BYTES = 60 * 1024


def recorded() -> str:
    return (DOCS / "demo.cast").read_text(encoding="utf-8")


def test_the_recording_is_a_small_cast_of_a_demo_that_went_well() -> None:
    header, *events = map(json.loads, recorded().splitlines())
    assert (header["version"], header["width"]) == (2, cast.COLUMNS)
    assert len(recorded().encode()) < MAX_BYTES
    assert all(kind == "o" for _, kind, _ in events)
    times = [at for at, _, _ in events]
    assert times == sorted(times)
    assert "17 of 17 promises held" in events[-1][2]


def test_the_recording_names_no_machine() -> None:
    assert not [line for line in recorded().splitlines() if "/home/" in line or "/root" in line or "/tmp" in line]
    assert cast.scrubbed(f"{cast.ROOT}/.venv and {Path.home()}/x") == "usbip-plugin/.venv and ~/x"


def test_the_picture_is_made_from_the_recording() -> None:
    lines = list(cast.lines_of(cast.outputs_of(recorded())))
    drawn = (DOCS / "demo.svg").read_text(encoding="utf-8")
    assert drawn == cast.picture(lines), "python docs/cast.py --draw docs/demo.cast docs/demo.svg"
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(drawn)[2:]]
    assert texts[0] == "$ make demo"
    assert texts[-1] == "17 of 17 promises held"
    assert not [text for text in texts if "lock.write" in text], "it has no trace"


def test_colours_become_classes_and_markup_is_escaped() -> None:
    drawn = cast.picture([cast.Output(1.5, "  \x1b[32mok\x1b[0m  a<b & c")])
    assert '<tspan class="g">ok</tspan>  a&lt;b &amp; c</text>' in drawn
    assert "animation-delay:1.50s" in drawn


def test_a_command_has_a_terminal_and_its_output_is_kept_in_order() -> None:
    program = "import sys; print(sys.stdout.isatty()); print('ä' * 70000)"
    _, *found = cast.record([sys.executable, "-c", program])
    text = "".join(output.text for output in found)
    assert text.split() == ["True", "ä" * 70000]


def test_a_command_that_fails_is_no_recording() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        cast.record([sys.executable, "-c", "raise SystemExit(3)"])
