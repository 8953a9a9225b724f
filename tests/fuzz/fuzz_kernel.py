"""Targets: texts of the kernel and of /run/vhci_hcd, and texts of devices in sysfs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.fuzz.fuzz_target import Target, attempt, fit_to_show
from tests.rigs.vhci_fake_sysfs import raw_descriptors
from usbip_plugin.errors import VhciError
from usbip_plugin.model import DeviceKey, Endpoint, Hold, InterfaceClass, ServerKey, Tenure, UsbId
from usbip_plugin.vhci import devices, hubs, sysfs, uevents
from usbip_plugin.vhci.children import expected_nodes
from usbip_plugin.vhci.devices import read_attributes
from usbip_plugin.vhci.interfaces import authorized_and_withheld, parse_descriptors
from usbip_plugin.vhci.records import MAX_RECORD, Record, Records, format_record, parse_record
from usbip_plugin.vhci.sysfs import PortTable

STATUS = """hub port sta spd dev      sockfd local_busid
hs  0000 006 003 00010002 000103 3-1
hs  0001 005 000 00000000 000000 0-0
ss  0008 004 000 00000000 000000 0-0
"""
UEVENT = b"add@/devices/platform/vhci_hcd.0/usb3/3-1\0ACTION=add\0SUBSYSTEM=usb\0MAJOR=189\0"


def status(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    ports = attempt(ValueError, sysfs.parse_status, text, 1)
    if ports is None:
        return
    assert len(ports) <= text.count("\n") + len(text.splitlines())
    for port in ports:
        assert 0 <= port.number < sysfs.MAX_PORTS
        assert 0 <= port.devid < 1 << 32
        fit_to_show(port.local_busid, 31)
        assert port.local_busid is None or not set(port.local_busid) & set("/\0")
        assert sysfs.format_detach(port.number) == str(port.number)
    for speed in sysfs.SPEEDS:
        chosen = sysfs.choose_port(ports, speed)
        assert chosen is None or chosen.status is sysfs.PortStatus.NULL


def nports(data: bytes) -> None:
    number = attempt(ValueError, sysfs.parse_nports, data.decode("utf-8", "replace"))
    if number is None:
        return
    assert 1 <= number <= sysfs.MAX_PORTS
    assert len(sysfs.status_files(number, 1)) <= sysfs.MAX_PORTS


def uevent(data: bytes) -> None:
    event = uevents.parse(data)
    if event is not None:
        assert len(data) <= uevents.MAX_UEVENT
        assert event.action.isalpha()
        assert event.devpath.startswith("/")
        assert event.concerns_vhci in (True, False)


def record(data: bytes) -> None:
    key = parse_record(data.decode("utf-8", "replace"))
    if key is not None:
        fit_to_show(str(key), MAX_RECORD)
        assert parse_record(format_record(key)) == key


def _files(data: bytes, names: Iterable[str], directory: Path) -> None:
    """Writes data into these files, cut at NUL bytes."""
    for name, content in zip(names, data.split(b"\0"), strict=False):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def _in_a_directory(look: Callable[[bytes, Path], None]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz") as name:
            look(data, Path(name))

    return run


def port_files(data: bytes, directory: Path) -> None:
    """Reads status, nports and status.1 of a controller, and a port's record."""
    base = "devices/platform/vhci_hcd.0/"
    _files(data, (base + "status", base + "nports", base + "status.1", "port0"), directory)
    table = PortTable(directory)
    for read in (table.all, lambda: table.one(0), lambda: table.one(20)):
        attempt(VhciError, read)
    Records(directory).read(0)


def device_files(data: bytes, directory: Path) -> None:
    """Reads the sysfs directory of a device."""
    device = directory / "3-1"
    child = "3-1:1.0/tty/ttyACM0"
    names = ("idVendor", "idProduct", "devnum", "dev", "authorized", "serial", "uevent", f"{child}/uevent")
    interface = ("3-1:1.0/bInterfaceClass", "3-1:1.0/bInterfaceSubClass", f"{child}/dev")
    strings = ("manufacturer", "product", "3-1:1.0/bInterfaceNumber", "3-1:1.0/port_number")
    device.mkdir()
    _files(data, names + interface + strings, device)
    (device / child).mkdir(parents=True, exist_ok=True)
    (device / child / "subsystem").symlink_to("/sys/class/tty")
    facts = read_attributes(device)
    if facts is not None:
        fit_to_show(str(facts.usb_id), 9)
        for text in (facts.serial, facts.manufacturer, facts.model):
            assert text != ""
            fit_to_show(text, 126)
        assert facts.devnum >= 0
    found = devices.read_nodes(device, facts) if facts is not None else devices.DeviceNodes()
    for node in found.nodes:
        fit_to_show(node.path, 4096)
        assert node.path.startswith("/dev/")
        assert ".." not in node.path.split("/")
        assert 0 <= node.major < 1 << 12
        assert 0 <= node.minor < 1 << 20
        fit_to_show(node.by_id, 300)
        if node.by_id:
            assert node.by_id.startswith("/dev/serial/by-id/usb-")
            assert node.by_id.count("/") == 4
    for name in found.net:
        fit_to_show(name, 15)
    expected_nodes(device)
    authorized_and_withheld(device)


def interfaces(data: bytes) -> None:
    """Parses the descriptors of a device, whose interfaces are all found, whatever lies between them."""
    found = parse_descriptors(data)
    assert all(0 <= number < 256 for place in found.settings for number in place)
    assert all(found.settings.values())


def hub_files(data: bytes, directory: Path) -> None:
    """Reads a root hub and the note of a plugin that crashed while it held the hub."""
    hub = "devices/platform/vhci_hcd.0/usb3/"
    _files(data, (hub + "speed", hub + "authorized_default", "run/authorized_default.usb3"), directory)
    (directory / hub).mkdir(parents=True, exist_ok=True)
    (directory / "run").mkdir(exist_ok=True)
    written: list[str] = []

    def write(path: Path, text: str) -> None:
        assert path.name == "authorized_default"
        written.append(text)

    guard = hubs.HubGuard(directory, directory / "run", write)
    guard.restore_leftovers()
    for kind in ("hs", "ss"):
        port = sysfs.Port(0, "ss" if kind == "ss" else "hs", sysfs.PortStatus.NULL, root_port=1)
        sysfs.device_dir(directory, port)
        with contextlib.suppress(OSError):
            guard.hold(port)
        guard.release(0)
    assert set(written) <= {"-1", "0", "1", "2"}


def _devices() -> Iterable[bytes]:
    own = "MAJOR=189\nMINOR=2\nDEVNAME=bus/usb/003/002\nDEVTYPE=usb_device\n"
    texts = ["0403\n", "6001\n", "2\n", "189:2\n", "1\n", "A1\n", own, "MAJOR=166\nMINOR=0\nDEVNAME=ttyACM0\n"]
    yield "\0".join([*texts, "02\n", "02\n", "166:0\n", "A/B\n", "..\n", "00\n", "0\n"]).encode()


def _records() -> Iterable[bytes]:
    key, former = DeviceKey(ServerKey("10.0.0.1"), "1-2"), DeviceKey(ServerKey("10.0.0.1"), "1-1")
    holds = (Hold(former, Tenure("2d1f5f0a", 12)), Hold(key, Tenure("7f0f6c1c", 1)))
    whole = Record(key, (65538, 7), Endpoint("10.0.0.7", 40123), False, UsbId(0x0951, 0x1666), holds)
    return [format_record(made).encode() for made in (Record(key), Record(key, (65538, 7)), whole)]


TARGETS = (
    Target("status", status, lambda: (STATUS.encode(), STATUS.encode() * 2)),
    Target("nports", nports, lambda: (b"16\n", b"240\n"), 64),
    Target("uevent", uevent, lambda: (UEVENT, b"libudev\0\xfe\xed\xca\xfe"), 512),
    Target(
        "record",
        record,
        _records,
        MAX_RECORD + 100,
    ),
    Target(
        "port-files",
        _in_a_directory(port_files),
        lambda: (b"\0".join([STATUS.encode(), b"6\n", STATUS.encode(), b"10.0.0.1 3240 1-2\n"]),),
    ),
    Target("interfaces", interfaces, lambda: (raw_descriptors(0, (InterfaceClass(2, 2, 1), InterfaceClass(3, 1, 1))),)),
    Target("device-files", _in_a_directory(device_files), _devices),
    Target("hub-files", _in_a_directory(hub_files), lambda: (b"480\n\0001\n\0001\n", b"5000\n\0000\n\000"), 256),
)
