"""Which child nodes are waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from usbip_plugin.model import DeviceNode
from usbip_plugin.vhci.children import ExpectedNode, complete, expected_nodes, missing, wants


def interface(device: Path, number: int, class_: int, subclass: int) -> None:
    folder = device / f"{device.name}:1.{number}"
    folder.mkdir(parents=True)
    for name, value in (("Number", number), ("Class", class_), ("SubClass", subclass)):
        (folder / f"bInterface{name}").write_text(f"{value:02x}\n")


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
def test_classes_that_promise_nodes(tmp_path: Path, class_: int, subclass: int, kinds: set[str]) -> None:
    interface(tmp_path / "4-1", 3, class_, subclass)
    assert expected_nodes(tmp_path / "4-1") == (ExpectedNode(3, frozenset(kinds)),)


@pytest.mark.parametrize(
    ("class_", "subclass"), [(0xFF, 0), (0x02, 6), (0x0A, 0), (0x0E, 2), (0x01, 2), (0x01, 3), (0x0B, 0)]
)
def test_classes_that_promise_none(tmp_path: Path, class_: int, subclass: int) -> None:
    interface(tmp_path / "4-1", 0, class_, subclass)
    assert expected_nodes(tmp_path / "4-1") == ()


TWO_HID = (ExpectedNode(0, frozenset({"hidraw", "input"})), ExpectedNode(1, frozenset({"hidraw", "input"})))
DISK_AND_HID = (ExpectedNode(0, frozenset({"block"})), TWO_HID[1])


def test_each_interface_brings_a_node_of_its_own() -> None:
    assert not complete(None, TWO_HID, (USB, node("hidraw", 0), node("input", 0)))
    assert complete(None, TWO_HID, (USB, node("hidraw", 0), node("input", 1)))


def test_one_of_what_is_asked_for_is_waited_for_and_what_is_promised_of_it() -> None:
    assert not complete(("tty", "hidraw"), (), (USB, node("input")))
    assert complete(("tty", "hidraw"), (), (USB, node("tty")))
    assert not complete(("tty", "hidraw"), DISK_AND_HID, (USB, node("tty", 3)))
    assert complete(("hidraw",), DISK_AND_HID, (USB, node("hidraw", 1)))
    assert not complete(("hidraw",), TWO_HID, (USB, node("hidraw", 1)))
    assert complete((), DISK_AND_HID, (USB,))


def test_what_is_missing() -> None:
    assert missing(None, (USB,)) == missing((), (USB,)) == ()
    assert missing(("tty", "block"), (USB, node("tty"))) == ()
    assert missing(("tty", "block"), (USB, node("hidraw"))) == ("tty", "block")


def test_a_printers_node_is_one_of_usbmisc() -> None:
    assert missing(("usbmisc",), (USB, node("printer"))) == ()
    assert missing(("printer",), (USB, node("usbmisc"))) == ("printer",)
    assert wants(("usbmisc",), node("printer"))
    assert not wants(("printer",), node("usbmisc"))
    assert wants(None, node("printer"))
