"""What a run does not use is not in its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from usbip_plugin import _narrow

RUN = """
import sys
from usbip_plugin.cli import main
assert main(["run", "--node-name", "n", "--config", "/nonexistent"]) == 2
import usbip_plugin.process
print(*sys.modules)
"""
USED_LATER = """
from usbip_plugin import _narrow
_narrow.install()
import idna
from google.protobuf.internal import python_message
print(idna.encode("bücher").decode(), python_message.GeneratedProtocolMessageType.__name__)
"""


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "unused", ["google.protobuf.text_format", "idna.core", "urllib3.connection", "aiohttp.web_app"]
)
def test_a_run_does_not_load(unused: str, modules_of_a_run: frozenset[str]) -> None:
    assert unused not in modules_of_a_run


def test_what_is_lazy_was_imported(modules_of_a_run: frozenset[str]) -> None:
    assert modules_of_a_run.issuperset(_narrow.LAZY)


def test_what_is_lazy_works_when_it_is_used() -> None:
    assert _python(USED_LATER).split() == ["xn--bcher-kva", "GeneratedProtocolMessageType"]


@pytest.fixture(scope="module")
def modules_of_a_run() -> frozenset[str]:
    return frozenset(_python(RUN).split())
