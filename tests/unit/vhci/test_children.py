"""The child nodes that an attach waits for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs.vhci_fake_sysfs import add_interface
from usbip_plugin.model import DeviceNode
from usbip_plugin.vhci.children import ExpectedNode, complete, expected_nodes, missing, wants


def node(kind: str, interface: int | None = 0, minor: int = 0) -> DeviceNode:
    return DeviceNode(f"/dev/{kind}{minor}", kind, kind == "block", 1, minor, interface)


USB = node("usb", None)


@pytest.mark.parametrize(
    ("class_", "subclass", "kinds"),
    [
        (0x08, 6, {"block"}),
        (0x03, 1, {"hidraw", "input"}),
        (0x02, 2, {"tty"}),
        (0x0E, 1, {"video4linux"}),
        (0x01, 1, {"sound"}),
        (0x07, 1, {"printer"}),
    ],
)
def test_an_interface_class_with_nodes_is_expected_to_have_them(
    tmp_path: Path, class_: int, subclass: int, kinds: set[str]
) -> None:
    add_interface(tmp_path, 3, class_, subclass)
    assert expected_nodes(tmp_path) == (ExpectedNode(3, frozenset(kinds)),)


@pytest.mark.parametrize(
    ("class_", "subclass"), [(0xFF, 0), (0x02, 6), (0x0A, 0), (0x0E, 2), (0x01, 2), (0x01, 3), (0x0B, 0)]
)
def test_other_interface_classes_are_not_expected_to_have_nodes(tmp_path: Path, class_: int, subclass: int) -> None:
    add_interface(tmp_path, 0, class_, subclass)
    assert expected_nodes(tmp_path) == ()


def test_an_interface_that_is_not_authorised_is_not_expected_to_have_nodes(tmp_path: Path) -> None:
    for number, authorized in enumerate("01"):
        (add_interface(tmp_path, number, 0x03) / "authorized").write_text(f"{authorized}\n")
    assert [expected.interface for expected in expected_nodes(tmp_path)] == [1]


TWO_HID = (ExpectedNode(0, frozenset({"hidraw", "input"})), ExpectedNode(1, frozenset({"hidraw", "input"})))
DISK_AND_HID = (ExpectedNode(0, frozenset({"block"})), TWO_HID[1])


def test_each_interface_has_its_own_node() -> None:
    assert not complete(None, TWO_HID, (USB, node("hidraw", 0), node("input", 0)))
    assert complete(None, TWO_HID, (USB, node("hidraw", 0), node("input", 1)))


def test_an_attach_waits_for_one_configured_kind_and_its_expected_nodes() -> None:
    assert not complete(("tty", "hidraw"), (), (USB, node("input")))
    assert complete(("tty", "hidraw"), (), (USB, node("tty")))
    assert not complete(("tty", "hidraw"), DISK_AND_HID, (USB, node("tty", 3)))
    assert complete(("hidraw",), DISK_AND_HID, (USB, node("hidraw", 1)))
    assert not complete(("hidraw",), TWO_HID, (USB, node("hidraw", 1)))
    assert complete((), DISK_AND_HID, (USB,))


def test_a_kind_that_no_class_leads_to_expect_is_waited_for_by_its_name() -> None:
    assert not complete(("dvb", "sg"), DISK_AND_HID, (USB, node("block", 0)))
    assert complete(("dvb", "sg"), DISK_AND_HID, (USB, node("dvb", 0)))


def test_all_configured_kinds_are_missing_if_none_is_present() -> None:
    assert missing(None, (USB,)) == missing((), (USB,)) == ()
    assert missing(("tty", "block"), (USB, node("tty"))) == ()
    assert missing(("tty", "block"), (USB, node("hidraw"))) == ("tty", "block")


def test_the_node_of_a_printer_counts_as_usbmisc() -> None:
    assert missing(("usbmisc",), (USB, node("printer"))) == ()
    assert missing(("printer",), (USB, node("usbmisc"))) == ("printer",)
    assert wants(("usbmisc",), node("printer"))
    assert not wants(("printer",), node("usbmisc"))
    assert wants(None, node("printer"))
