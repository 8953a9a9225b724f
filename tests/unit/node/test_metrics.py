"""The label values for errors and for changes of locks."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest

from usbip_plugin import errors
from usbip_plugin.errors import (
    CommandError,
    ConfigError,
    HostError,
    KubeError,
    KubeletError,
    ListenFailed,
    LockHeld,
    NotAttached,
    PluginError,
)
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Lock
from usbip_plugin.node.metrics import ALLOCATE_FAILURES, API_ERRORS, OTHER, reason_of, transition

ME = "node-a"
ROOT = Path(__file__).parents[3]


def lock(holder: str, epoch: int = 1) -> Lock:
    return Lock("usbip-x", holder, epoch, 40.0, "1")


@pytest.mark.parametrize(
    ("old", "new", "in_use", "expected"),
    [
        (None, lock(ME), False, "taken"),
        (lock(""), lock(ME, 2), False, "taken"),
        (lock("node-b"), lock(ME, 2), False, "taken_over"),
        (lock(ME), lock(ME, 2), False, "taken"),
        (lock(ME), lock(ME), True, None),
        (lock(ME), lock(""), False, "released"),
        (lock(ME), lock(""), True, "lost"),
        (lock(ME), None, False, "lost"),
        (lock(ME), lock("node-b", 2), False, "lost"),
        (lock("node-b"), lock(""), False, None),
        (lock("node-b"), lock("node-c", 2), False, None),
        (None, lock("node-b"), False, None),
        (lock("node-b"), None, False, None),
    ],
)
def test_a_change_of_a_lock_has_the_transition_of_this_node(
    old: Lock | None, new: Lock | None, in_use: bool, expected: str | None
) -> None:
    change = LockChange("usbip-x", old, new)
    assert transition(change, ME, in_use=in_use) == expected


def test_a_new_annotation_is_not_a_transition() -> None:
    assert transition(LockChange("usbip-x", lock(ME), replace(lock(ME), port=3)), ME, in_use=True) is None


def leaves(base: type[PluginError]) -> set[type[PluginError]]:
    return {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, base) and not kind.__subclasses__()
    }


def test_every_error_that_can_fail_an_allocate_has_a_reason() -> None:
    others = (CommandError, ConfigError, HostError, KubeletError, KubeError, ListenFailed)
    elsewhere = {LockHeld, NotAttached}.union(*map(leaves, others))
    for kind in leaves(PluginError) - elsewhere:
        assert reason_of(kind.__new__(kind), ALLOCATE_FAILURES) != OTHER, kind


def test_every_error_of_the_api_server_has_a_reason() -> None:
    for kind in leaves(KubeError):
        assert reason_of(kind.__new__(kind), API_ERRORS) != OTHER, kind


def test_the_document_has_every_reason_of_an_api_error() -> None:
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    listed = text.split("- `reason` of `api_errors_total`:")[1].split("\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {*API_ERRORS.values(), OTHER}


def test_the_document_has_every_step() -> None:
    document = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    text = document.split("- `step` of `step_seconds`:")[1].split("\n")[0]
    code = "".join(
        (ROOT / "usbip_plugin" / "attach" / name).read_text(encoding="utf-8") for name in ("pipeline.py", "release.py")
    )
    assert set(re.findall(r"`([^`]+)`", text)) == set(re.findall(r'(?:self\.span|_on_step)\("([^"]+)"', code))


def test_an_error_without_its_own_reason_is_other() -> None:
    assert reason_of(errors.VhciError("odd"), ALLOCATE_FAILURES) == OTHER
