"""The rows of /exported."""

from __future__ import annotations

from dataclasses import astuple, replace
from datetime import UTC, datetime

from tests.rigs.host_suite import CONVERTER, STICK
from usbip_plugin.exporter.host import STUB, HostDevice, StubStatus
from usbip_plugin.exporter.report import NOT_SELECTED, exported_rows
from usbip_plugin.exporter.state import Export
from usbip_plugin.model import Endpoint

BOUND = HostDevice(STICK.descriptor(configured=False), STUB, STICK.serial, STICK.product)
OTHER = HostDevice(CONVERTER.descriptor(configured=True), "usb", None, CONVERTER.product)
SINCE = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
EXPORT = Export("1-1", Endpoint("10.0.0.5", 40112), SINCE)


def test_a_row_says_who_has_the_device_since_when() -> None:
    (row,) = exported_rows([BOUND, OTHER], {"1-1": StubStatus.USED}, {"1-1": EXPORT}, {}, {"1-1"})
    expected = ("1-1", "0951:1666", "KINGSTON-42", "stick", "in_use", "10.0.0.5:40112", "2026-05-04T03:02:01Z", None)
    assert astuple(row) == expected


def test_a_client_that_has_gone_or_is_unknown_is_not_named() -> None:
    (free,) = exported_rows([BOUND], {"1-1": StubStatus.AVAILABLE}, {"1-1": EXPORT}, {}, {"1-1"})
    assert (free.state, free.peer, free.since) == ("available", None, None)
    unknown = replace(EXPORT, peer=None)
    (row,) = exported_rows([BOUND], {"1-1": StubStatus.USED}, {"1-1": unknown}, {}, {"1-1"})
    assert (row.state, row.peer, row.since) == ("in_use", None, "2026-05-04T03:02:01Z")


def test_a_problem_has_a_row_and_so_has_what_is_still_bound() -> None:
    rows = exported_rows([BOUND, OTHER], {"1-1": StubStatus.ERROR}, {}, {"1-2.3": "sda1 is mounted"}, set())
    assert [(row.busid, row.state, row.problem) for row in rows] == [
        ("1-1", "error", NOT_SELECTED),
        ("1-2.3", "unbound", "sda1 is mounted"),
    ]
    (row,) = exported_rows([BOUND], {"1-1": StubStatus.AVAILABLE}, {}, {})
    assert row.problem is None, "without the exporter, nobody knows what is selected"
