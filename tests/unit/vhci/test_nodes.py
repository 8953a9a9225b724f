"""Device nodes from sysfs directories like those of Linux 6.12, and their by-id names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs.vhci_fake_sysfs import add_interface, add_node
from usbip_plugin.model import DeviceNode, UsbId, valid_kind
from usbip_plugin.vhci.devices import MAX_NODES, MAX_STRING, read_attributes, read_nodes

ID = UsbId(0x0403, 0x6001)


def nodes_of(device: Path) -> tuple[DeviceNode, ...]:
    """Returns the nodes of the device in this sysfs directory, or none if it is incomplete or gone."""
    attributes = read_attributes(device)
    return () if attributes is None else read_nodes(device, attributes).nodes


def write(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text + "\n")
    return path


def usb_device(path: Path, busid: str = "4-1", devnum: int = 2, **strings: str) -> Path:
    device = write(
        path / busid,
        **strings,
        idVendor="0403",
        idProduct="6001",
        devnum=str(devnum),
        authorized="1",
        dev=f"189:{384 + devnum - 1}",
        uevent=f"MAJOR=189\nMINOR={384 + devnum - 1}\nDEVNAME=bus/usb/004/{devnum:03d}\nDEVTYPE=usb_device",
    )
    (device / "subsystem").symlink_to("../../../../../bus/usb")
    return device


USB_NODE = DeviceNode("/dev/bus/usb/004/002", "usb", False, 189, 385)


class TestNodes:
    def test_the_usb_node_comes_first_then_children_by_path(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        host = add_interface(device, 0, 8) / "host0/target0:0:0/0:0:0:0"
        add_node(host / "block/sda", "block", "sda", 8, 0)
        for partition in (1, 10):
            add_node(host / f"block/sda/sda{partition}", "block", f"sda{partition}", 8, partition)
            write(host / f"block/sda/sda{partition}", partition=str(partition))
        add_node(host / "bsg/0:0:0:0", "bsg", "bsg/0:0:0:0", 246, 0)
        hid = add_interface(device, 1, 3) / "0003:0627:0001.0002"
        add_node(hid / "hidraw/hidraw0", "hidraw", "hidraw0", 244, 0)
        add_node(hid / "input/input3/event1", "input", "input/event1", 13, 65)
        add_node(add_interface(device, 2, 255) / "ttyUSB0/tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        assert [(n.path, n.kind, n.block, n.major, n.minor, n.interface, n.partition) for n in nodes_of(device)] == [
            ("/dev/bus/usb/004/002", "usb", False, 189, 385, None, 0),
            ("/dev/bsg/0:0:0:0", "bsg", False, 246, 0, 0, 0),
            ("/dev/hidraw0", "hidraw", False, 244, 0, 1, 0),
            ("/dev/input/event1", "input", False, 13, 65, 1, 0),
            ("/dev/sda", "block", True, 8, 0, 0, 0),
            ("/dev/sda1", "block", True, 8, 1, 0, 1),
            ("/dev/sda10", "block", True, 8, 10, 0, 10),
            ("/dev/ttyUSB0", "tty", False, 188, 0, 2, 0),
        ]

    def test_the_node_of_a_printer_has_its_own_kind(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        add_node(add_interface(device, 0, 7) / "usbmisc/lp0", "usbmisc", "usb/lp0", 180, 0)
        add_node(add_interface(device, 1, 255) / "usbmisc/cdc-wdm0", "usbmisc", "cdc-wdm0", 180, 176)
        assert [(n.path, n.kind) for n in nodes_of(device)[1:]] == [
            ("/dev/cdc-wdm0", "usbmisc"),
            ("/dev/usb/lp0", "printer"),
        ]

    @pytest.mark.parametrize(
        ("place", "subsystem", "devnames"),
        [
            ("host6/target6:0:0/6:0:0:0/scsi_generic/sg2", "scsi_generic", ["sg2"]),
            ("host6/target6:0:0/6:0:0:0/scsi_tape/{}", "scsi_tape", ["nst0", "st0"]),
            ("dvb/{}", "dvb", ["dvb/adapter0/demux0", "dvb/adapter0/dvr0", "dvb/adapter0/frontend0"]),
            ("rc/rc0/lirc0", "lirc", ["lirc0"]),
            ("i2c-7/i2c-dev/i2c-7", "i2c-dev", ["i2c-7"]),
            ("gpiochip1", "gpio", ["gpiochip1"]),
            ("drm/{}", "drm", ["dri/card1", "dri/renderD128"]),
            ("0003:1:2.3/HID-SENSOR-200073.1.auto/iio:device0", "iio", ["iio:device0"]),
            ("nvme/nvme1/ng1n1", "nvme-generic", ["ng1n1"]),
            ("nobody/thought0", "nobody_thought-of_it", ["nobody/thought0"]),
        ],
    )
    def test_a_node_of_any_subsystem_is_a_child_of_that_kind(
        self, tmp_path: Path, place: str, subsystem: str, devnames: list[str]
    ) -> None:
        device = usb_device(tmp_path)
        face = add_interface(device, 0, 255)
        for number, devname in enumerate(devnames):
            add_node(face / place.format(devname.replace("/", ".")), subsystem, devname, 240, number)
        assert [(n.path, n.kind, n.minor, n.interface) for n in nodes_of(device)[1:]] == [
            (f"/dev/{devname}", subsystem, number, 0) for number, devname in enumerate(devnames)
        ]

    def test_a_node_of_the_device_itself_belongs_to_no_interface(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        add_node(device / "media0", "media", "media0", 240, 0)
        assert [(n.path, n.kind, n.interface) for n in nodes_of(device)[1:]] == [("/dev/media0", "media", None)]

    def test_a_subsystem_whose_name_is_not_a_kind_is_written_as_one(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        add_node(device / "x", "Vendor's.Own" + "x" * 40, "own0", 240, 0)
        (child,) = nodes_of(device)[1:]
        assert child.kind == "vendor-s-own" + "x" * 20
        assert valid_kind(child.kind)

    def test_a_directory_without_a_subsystem_or_a_name_below_dev_is_no_node(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        write(device / "a", dev="240:0", uevent="MAJOR=240\nMINOR=0\nDEVNAME=a")
        add_node(device / "b", "usb", "bus/usb/004/099", 189, 99)
        write(device / "c", dev="240:1", uevent="MAJOR=240\nMINOR=1")
        (device / "c/subsystem").symlink_to("../../../../../class/dvb")
        assert nodes_of(device) == (USB_NODE,)

    def test_network_interfaces_are_listed_apart_from_nodes(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        folder = add_interface(device, 0, 2, 6) / "net"
        for name in ("usb1", "enx0201"):
            write(folder / name, address="02:01:00:00:00:00")
            (folder / name / "subsystem").symlink_to("../../../../../class/net")
        attributes = read_attributes(device)
        assert attributes is not None
        found = read_nodes(device, attributes)
        assert (found.nodes, found.net) == ((USB_NODE,), ("enx0201", "usb1"))

    def test_devices_behind_a_hub_are_not_nodes_of_the_hub(self, tmp_path: Path) -> None:
        hub = usb_device(tmp_path)
        inner = usb_device(hub, "4-1.1", devnum=3)
        add_node(add_interface(inner, 0, 255) / "ttyUSB0/tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        assert nodes_of(hub) == (USB_NODE,)

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path / "a")
        other = usb_device(tmp_path / "b", "4-2", 3)
        add_node(add_interface(other, 0, 255) / "ttyUSB7/tty/ttyUSB7", "tty", "ttyUSB7", 188, 7)
        (device / "port").symlink_to(other / "4-2:1.0")
        assert nodes_of(device) == (USB_NODE,)

    @pytest.mark.parametrize("devname", ["../etc/shadow", "/etc/shadow"])
    def test_names_outside_dev_are_ignored(self, tmp_path: Path, devname: str) -> None:
        device = usb_device(tmp_path)
        add_node(device / "4-1:1.0/tty/x", "tty", devname, 1, 1)
        assert nodes_of(device) == (USB_NODE,)

    def test_the_number_of_nodes_is_bounded(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        for number in range(MAX_NODES + 20):
            add_node(device / f"i/{number}/x", "tty", f"tty{number}", 4, number)
        assert len(nodes_of(device)) <= MAX_NODES + 1

    def test_the_number_of_directories_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("usbip_plugin.vhci.devices.MAX_DIRECTORIES", 5)
        device = usb_device(tmp_path)
        for number in range(10):
            add_node(device / f"tty{number}", "tty", f"tty{number}", 4, number)
        assert len(nodes_of(device)) == 1 + 5

    def test_a_device_that_is_gone_has_no_nodes(self, tmp_path: Path) -> None:
        assert nodes_of(tmp_path / "4-1") == ()


class TestFacts:
    def test_ids_number_authorization_and_serial_number_are_read(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        write(device, serial="SERIAL1", authorized="0")
        attributes = read_attributes(device)
        assert attributes is not None
        assert (attributes.usb_id, attributes.devnum, attributes.authorized, attributes.serial) == (
            ID,
            2,
            False,
            "SERIAL1",
        )

    def test_strings_are_bounded_and_printable(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path, manufacturer="x" * 500, product="two\nlines", serial="\x1b[2J")
        attributes = read_attributes(device)
        assert attributes is not None
        assert (attributes.manufacturer, attributes.model, attributes.serial) == ("x" * MAX_STRING, None, None)

    def test_a_missing_serial_number_is_none(self, tmp_path: Path) -> None:
        attributes = read_attributes(usb_device(tmp_path))
        assert attributes is not None
        assert attributes.serial is None

    @pytest.mark.parametrize("missing", ["idVendor", "idProduct", "devnum", "authorized", "dev"])
    def test_an_incomplete_directory_is_not_a_device_yet(self, tmp_path: Path, missing: str) -> None:
        device = usb_device(tmp_path)
        (device / missing).unlink()
        assert read_attributes(device) is None


class TestNames:
    """The names that Debian's udev gives these devices."""

    def by_id(self, device: Path) -> dict[str, str]:
        return {n.path: n.by_id for n in nodes_of(device)[1:]}

    def test_a_converter(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path, manufacturer="FTDI", product="FT232R USB UART", serial="A50285BI")
        tty = add_interface(device, 0, 255) / "ttyUSB0"
        add_node(tty / "tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        write(tty, port_number="0")
        assert self.by_id(device) == {"/dev/ttyUSB0": "/dev/serial/by-id/usb-FTDI_FT232R_USB_UART_A50285BI-if00-port0"}

    def test_a_modem(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path, product="ConBee II ", manufacturer="dresden elektronik ingenieurtechnik GmbH")
        add_node(add_interface(device, 2, 2, 2) / "tty/ttyACM0", "tty", "ttyACM0", 166, 0)
        assert self.by_id(device) == {
            "/dev/ttyACM0": "/dev/serial/by-id/usb-dresden_elektronik_ingenieurtechnik_GmbH_ConBee_II-if02"
        }

    def test_a_device_without_strings_is_named_by_its_ids(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path)
        add_node(add_interface(device, 0, 2, 2) / "tty/ttyACM0", "tty", "ttyACM0", 166, 0)
        assert self.by_id(device) == {"/dev/ttyACM0": "/dev/serial/by-id/usb-0403_6001-if00"}

    def test_a_disk_is_named_by_its_scsi_device(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path, manufacturer="Kingston", product="DataTraveler", serial="001CC0EC34F1")
        scsi = write(
            add_interface(device, 0, 8, 6) / "host0/target0:0:0/0:0:0:0", vendor="Kingston", model="DT 101 G2       "
        )
        add_node(scsi / "block/sda", "block", "sda", 8, 0)
        add_node(scsi / "block/sda/sda1", "block", "sda1", 8, 1)
        write(scsi / "block/sda/sda1", partition="1")
        assert self.by_id(device) == {
            "/dev/sda": "/dev/disk/by-id/usb-Kingston_DT_101_G2_001CC0EC34F1-0:0",
            "/dev/sda1": "/dev/disk/by-id/usb-Kingston_DT_101_G2_001CC0EC34F1-0:0-part1",
        }

    def test_a_keyboard_with_a_second_interface(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path, manufacturer="QEMU", product="QEMU USB Keyboard")
        for number, key in ((0, "1000000000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe"), (1, "10 0")):
            hid = add_interface(device, number, 3) / f"0003:0627:0001.000{number}"
            add_node(hid / f"hidraw/hidraw{number}", "hidraw", f"hidraw{number}", 244, number)
            add_node(hid / f"input/input{number}/event{number}", "input", f"input/event{number}", 13, 64 + number)
            write(hid / f"input/input{number}/capabilities", key=key, rel="0", abs="0", ev="120013")
        name = "/dev/input/by-id/usb-QEMU_QEMU_USB_Keyboard"
        assert self.by_id(device) == {
            "/dev/hidraw0": f"{name}-hidraw",
            "/dev/hidraw1": f"{name}-if01-hidraw",
            "/dev/input/event0": f"{name}-event-kbd",
            "/dev/input/event1": f"{name}-event-if01",
        }

    def test_a_webcam_with_a_microphone(self, tmp_path: Path) -> None:
        device = usb_device(tmp_path, manufacturer="046d", product="HD Pro Webcam C920", serial="A1B2")
        video = add_interface(device, 0, 14, 1)
        for index in (0, 1):
            add_node(video / f"video4linux/video{index}", "video4linux", f"video{index}", 81, index)
            write(video / f"video4linux/video{index}", index=str(index))
        sound = add_interface(device, 2, 1, 1) / "sound/card1"
        add_node(sound / "controlC1", "sound", "snd/controlC1", 116, 8)
        add_node(sound / "pcmC1D0c", "sound", "snd/pcmC1D0c", 116, 7)
        assert self.by_id(device) == {
            "/dev/snd/controlC1": "/dev/snd/by-id/usb-046d_HD_Pro_Webcam_C920_A1B2-02",
            "/dev/snd/pcmC1D0c": "",
            "/dev/video0": "/dev/v4l/by-id/usb-046d_HD_Pro_Webcam_C920_A1B2-video-index0",
            "/dev/video1": "/dev/v4l/by-id/usb-046d_HD_Pro_Webcam_C920_A1B2-video-index1",
        }
