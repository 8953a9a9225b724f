"""Device nodes from sysfs, on directories shaped as Linux 6.12 shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from usbip_plugin.model import DeviceNode, UsbId
from usbip_plugin.vhci.nodes import MAX_NODES, collect, promised_kinds, read_facts

ID = UsbId(0x0403, 0x6001)


def write(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text + "\n")
    return path


def node(path: Path, subsystem: str, devname: str, major: int, minor: int) -> None:
    write(path, dev=f"{major}:{minor}", uevent=f"MAJOR={major}\nMINOR={minor}\nDEVNAME={devname}")
    (path / "subsystem").symlink_to(f"../../../../../class/{subsystem}")


def usb_device(path: Path, busid: str = "4-1", devnum: int = 2) -> Path:
    device = write(
        path / busid,
        idVendor="0403",
        idProduct="6001",
        devnum=str(devnum),
        authorized="1",
        dev=f"189:{384 + devnum - 1}",
        uevent=f"MAJOR=189\nMINOR={384 + devnum - 1}\nDEVNAME=bus/usb/004/{devnum:03d}\nDEVTYPE=usb_device",
    )
    (device / "subsystem").symlink_to("../../../../../bus/usb")
    return device


def interface(device: Path, number: int, class_: int, subclass: int = 0) -> Path:
    return write(
        device / f"{device.name}:1.{number}",
        bInterfaceClass=f"{class_:02x}",
        bInterfaceSubClass=f"{subclass:02x}",
    )


USB_NODE = DeviceNode("/dev/bus/usb/004/002", "usb", False, 189, 385)


class TestCollect:
    def test_the_usb_node_comes_first_then_children_by_path(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        host = interface(device, 0, 8) / "host0/target0:0:0/0:0:0:0"
        node(host / "block/sda", "block", "sda", 8, 0)
        node(host / "block/sda/sda1", "block", "sda1", 8, 1)
        node(host / "bsg/0:0:0:0", "bsg", "bsg/0:0:0:0", 246, 0)
        hid = interface(device, 1, 3) / "0003:0627:0001.0002"
        node(hid / "hidraw/hidraw0", "hidraw", "hidraw0", 244, 0)
        node(hid / "input/input3/event1", "input", "input/event1", 13, 65)
        node(interface(device, 2, 255) / "ttyUSB0/tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        assert collect(device) == (
            USB_NODE,
            DeviceNode("/dev/hidraw0", "hidraw", False, 244, 0),
            DeviceNode("/dev/input/event1", "input", False, 13, 65),
            DeviceNode("/dev/sda", "block", True, 8, 0),
            DeviceNode("/dev/sda1", "block", True, 8, 1),
            DeviceNode("/dev/ttyUSB0", "tty", False, 188, 0),
        )

    def test_devices_behind_a_hub_are_not_ours(self, tmp_path: Path) -> None:
        hub = usb_device(tmp_path)
        inner = usb_device(hub, "4-1.1", devnum=3)
        node(interface(inner, 0, 255) / "ttyUSB0/tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        assert collect(hub) == (USB_NODE,)

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path / "a")
        other = usb_device(tmp_path / "b", "4-2", 3)
        node(interface(other, 0, 255) / "ttyUSB7/tty/ttyUSB7", "tty", "ttyUSB7", 188, 7)
        (device / "port").symlink_to(other / "4-2:1.0")
        assert collect(device) == (USB_NODE,)

    @pytest.mark.parametrize("devname", ["../etc/shadow", "/etc/shadow"])
    def test_names_that_leave_dev_are_dropped(self, tmp_path: Path, devname: str) -> None:
        device = usb_device(tmp_path)
        node(device / "4-1:1.0/tty/x", "tty", devname, 1, 1)
        assert collect(device) == (USB_NODE,)

    def test_the_number_of_nodes_is_bounded(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        for number in range(MAX_NODES + 20):
            node(device / f"i/{number}/x", "tty", f"tty{number}", 4, number)
        assert len(collect(device)) <= MAX_NODES + 1

    def test_a_device_that_has_gone_has_no_nodes(self, tmp_path: Path) -> None:
        assert collect(tmp_path / "4-1") == ()


class TestFacts:
    def test_what_is_read(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        write(device, serial="SERIAL1", authorized="0")
        facts = read_facts(device)
        assert facts is not None
        assert (facts.usb_id, facts.devnum, facts.authorized, facts.serial) == (ID, 2, False, "SERIAL1")

    def test_no_serial_is_none(self, tmp_path: Path) -> None:
        facts = read_facts(usb_device(tmp_path))
        assert facts is not None
        assert facts.serial is None

    @pytest.mark.parametrize("missing", ["idVendor", "idProduct", "devnum", "authorized", "dev"])
    def test_a_directory_that_is_not_complete_is_no_device_yet(self, tmp_path: Path, missing: str) -> None:
        device = usb_device(tmp_path)
        (device / missing).unlink()
        assert read_facts(device) is None


class TestPromises:
    @pytest.mark.parametrize(
        ("class_", "subclass", "kinds"),
        [
            (0x08, 6, {"block"}),
            (0x03, 1, {"hidraw", "input"}),
            (0x02, 2, {"tty"}),
            (0x0E, 1, {"video4linux"}),
        ],
    )
    def test_classes_that_promise_nodes(self, tmp_path: Path, class_: int, subclass: int, kinds: set[str]) -> None:
        device = usb_device(tmp_path)
        interface(device, 0, class_, subclass)
        assert promised_kinds(device) == (frozenset(kinds),)

    @pytest.mark.parametrize(("class_", "subclass"), [(0xFF, 0), (0x02, 6), (0x0A, 0)])
    def test_classes_that_promise_none(self, tmp_path: Path, class_: int, subclass: int) -> None:
        device = usb_device(tmp_path)
        interface(device, 0, class_, subclass)
        assert promised_kinds(device) == ()
