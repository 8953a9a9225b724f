"""The devices of the cluster, joined from locks and from what this node offers, and the addresses of the pages."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.unit.observe.test_page import DEVICE
from usbip_plugin.model import DeviceKey, Lock, PodRef, ServerKey, UsbId
from usbip_plugin.node.cluster import lock_row, node_rows, page_url, port_for_others
from usbip_plugin.node.status import seconds_held
from usbip_plugin.observe.status import NodeRow

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
KEY = DeviceKey(ServerKey("lab"), "1-2")
LOCK = Lock(
    KEY.id,
    "b",
    3,
    40.0,
    "7",
    acquired_at=NOW.replace(hour=1),
    server="lab:3240",
    busid="1-2",
    key=KEY,
    usb_id=UsbId(0x951, 0x1666),
    serial="S1",
    port=4,
    pod=PodRef("ns", "p"),
)


def test_a_device_that_only_its_lock_names_is_shown() -> None:
    row = lock_row(KEY.id, (), LOCK, NOW, "Acme Stick")
    assert (row.device, row.usb_id, row.serial, row.product) == ("lab:3240/1-2", "0951:1666", "S1", "Acme Stick")
    assert (row.holder, row.pod, row.held_for, row.epoch, row.port) == ("b", "ns/p", 7200.0, 3, 4)
    assert (row.resources, row.healthy, row.reason) == ((), False, "")


def test_a_released_device_has_no_holder_and_no_pod() -> None:
    row = lock_row(KEY.id, (), replace(LOCK, holder=""), NOW, None)
    assert (row.holder, row.pod, row.since, row.held_for, row.port) == (None,) * 5
    assert row.epoch == 3


def test_a_lock_of_another_name_is_shown_by_its_own_name() -> None:
    assert lock_row("usbip-x", (), replace(LOCK, key=None), NOW, None).device == "usbip-x"


def test_a_device_without_a_lock_is_shown_as_this_node_offers_it() -> None:
    row = lock_row(
        "usbip-a", (replace(DEVICE, healthy=False), replace(DEVICE, resource="usbip.dev/b")), None, NOW, None
    )
    assert (row.device, row.resources) == ("lab:3240/1-1", ("usbip.dev/stick", "usbip.dev/b"))
    assert (row.healthy, row.reason, row.serial, row.epoch) == (True, "free", "A1", None)


def test_a_clock_that_is_ahead_makes_no_negative_age() -> None:
    assert seconds_held(replace(LOCK, acquired_at=NOW.replace(hour=23)), NOW) == 0.0
    assert seconds_held(replace(LOCK, acquired_at=None), NOW) is None
    assert seconds_held(None, NOW) is None


def test_nodes_have_links_by_address_else_by_name() -> None:
    rows = node_rows({"b", "a", "c"}, {"a": 2}, {"a": "10.0.0.1", "b": "fd00::1"}, 13240)
    assert rows == (
        NodeRow("a", "http://10.0.0.1:13240/", 2),
        NodeRow("b", "http://[fd00::1]:13240/", 0),
        NodeRow("c", "http://c:13240/", 0),
    )
    assert [row.url for row in node_rows({"a"}, {}, {"a": "10.0.0.1"}, None)] == [None]


@pytest.mark.parametrize("host", ["", "a/b", "a:b", "javascript:x", "a b", "a@b", "A" * 300, "-a", "é"])
def test_a_holder_that_is_no_host_name_has_no_link(host: str) -> None:
    assert page_url(host, 13240) is None


@pytest.mark.parametrize(
    ("listen", "port"),
    [
        ("127.0.0.1:13240,[192.0.2.7]:13241", 13241),
        ("127.0.0.1:13240,192.0.2.7:13241", 13241),
        (":8080", 8080),
        ("127.0.0.1:8080,[::1]:8080,localhost:1", None),
        ("node.example:8080", 8080),
    ],
)
def test_other_hosts_reach_the_pages_at_an_address_that_is_not_loopback(listen: str, port: int | None) -> None:
    assert port_for_others(listen) == port
