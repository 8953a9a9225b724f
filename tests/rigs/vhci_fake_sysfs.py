"""A directory tree that behaves like the sysfs of vhci_hcd, to run SysfsVhci without the kernel."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from usbip_plugin.model import Descriptor, InterfaceClass, UsbId
from usbip_plugin.vhci.sysfs import hub_of
from usbip_plugin.vhci.uevents import Uevent

CONTROLLERS = 2
NODE_OF_CLASS = {"02": "tty", "03": "hidraw"}
"""Subsystem of the node that the driver of an interface makes, by bInterfaceClass."""
PER_HUB = 3


@dataclass
class Row:
    """A port of the fake."""

    number: int
    hub: str
    device: Path
    status: int = 4
    devid: int = 0
    speed: int = 0
    sockfd: int = 0
    fd: int = -1
    lingering: bool = False


@dataclass
class FakeSysfs:
    """A fake of vhci_hcd's sysfs, whose `write` is for SysfsVhci.

    devices, serials: the device and its serial number by devid.
    stuck: devids that never enumerate.
    silent: devids that answer no driver: a write to their `authorized` returns when they are detached.
    linger: whether sysfs directories stay until vanish().
    before_attach: called with the port before each attach.
    refuse: errnos for the next writes, by file name.
    heard: called with each uevent.
    written: all writes, as (path, text).
    """

    root: Path
    devices: dict[int, Descriptor]
    serials: dict[int, str] = field(default_factory=dict)
    stuck: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    linger: bool = False
    before_attach: Callable[[int], None] = lambda _port: None
    child_kinds: dict[UsbId, tuple[str, ...]] = field(default_factory=dict)  # subsystems of the nodes that drivers make
    refuse: dict[str, list[int]] = field(default_factory=dict)
    heard: Callable[[Uevent | None], None] = lambda _event: None
    written: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._gone = threading.Condition(self._lock)
        self._closed = False
        self._devnums: dict[str, int] = {}
        self.rows: list[Row] = []
        base = self.root / "devices/platform"
        bus = 3
        for controller in range(CONTROLLERS):
            for hub, speed in (("hs", "480"), ("ss", "5000")):
                folder = base / f"vhci_hcd.{controller}" / f"usb{bus}"
                folder.mkdir(parents=True)
                (folder / "speed").write_text(speed + "\n")
                (folder / "authorized_default").write_text("1\n")
                (folder / "interface_authorized_default").write_text("1\n")
                for port in range(PER_HUB):
                    self.rows.append(Row(len(self.rows), hub, folder / f"{bus}-{port + 1}"))
                bus += 1
        self.probe_file = self.root / "bus/usb/drivers_probe"
        self.probe_file.parent.mkdir(parents=True)
        self.probe_file.write_text("")
        self.base = base / "vhci_hcd.0"
        (self.base / "nports").write_text(f"{len(self.rows)}\n")
        for name in ("attach", "detach"):
            (self.base / name).write_text("")
        self._render()

    def hub_dir(self, port: int) -> Path:
        return self.rows[port].device.parent

    def close(self) -> None:
        self._closed = True
        for row in self.rows:
            self.free(row.number)

    def write(self, path: Path, text: str) -> None:
        """Handles a write by SysfsVhci, like the kernel."""
        if path.name == "attach":
            self.before_attach(int(text.split(maxsplit=1)[0]))
        with self._lock:
            self.written.append((str(path.relative_to(self.root)), text))
            if codes := self.refuse.get(path.name):
                code = codes.pop(0)
                raise OSError(code, os.strerror(code), str(path))
            if not path.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            match path.name:
                case "attach":
                    self._attach(*(int(word) for word in text.split()))
                case "detach":
                    row = self.rows[int(text)]
                    if row.status == 4:
                        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                    self.free(row.number)
                case "authorized" if ":" in path.parent.name:
                    self._hang(path.parent.parent)
                    path.write_text(text + "\n")
                case "drivers_probe":
                    for interface in self.base.parent.glob(f"vhci_hcd.*/usb*/*/{text}"):
                        self._hang(interface.parent)
                        self._bind(interface)
                case "authorized":
                    self._hang(path.parent)
                    path.write_text(text + "\n")
                    self._probe(path.parent)
                    self._uevent("bind", path.parent)
                case _:
                    path.write_text(text + "\n")

    def _hang(self, device: Path) -> None:
        row = next(row for row in self.rows if row.device == device)
        if row.devid in self.silent:
            devid = row.devid
            self._gone.wait_for(lambda: row.devid != devid or self._closed)
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def _attach(self, port: int, fd: int, devid: int, speed: int) -> None:
        row = self.rows[port]
        if row.hub != hub_of(speed):
            raise AssertionError("a real kernel would take another port than the one written")
        if row.status != 4:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        row.fd, row.devid, row.speed, row.sockfd, row.status = os.dup(fd), devid, speed, fd, 5
        if devid not in self.stuck:
            self._enumerate(row)
        self._render()

    def _probe(self, device: Path) -> None:
        """Makes the device's interfaces, and binds drivers to those that are authorised.

        Other nodes are each in an interface of vendor class.
        """
        row = next(row for row in self.rows if row.device == device)
        authorized = (device.parent / "interface_authorized_default").read_text()
        for number, one in enumerate(self.devices[row.devid].interfaces):
            if not (device / f"{device.name}:1.{number}").exists():
                interface = add_interface(device, number, one.class_, one.subclass)
                (interface / "authorized").write_text(authorized)
                self._bind(interface)
        for number, subsystem in enumerate(self.child_kinds.get(self.devices[row.devid].usb_id, ())):
            interface = add_interface(device, number, 0xFF)
            add_node(interface / subsystem / f"{subsystem}{number}", subsystem, f"{subsystem}{number}", 240, number)

    def _bind(self, interface: Path) -> None:
        """Binds a driver to an interface if it is authorised and has none."""
        if (interface / "authorized").read_text() != "1\n" or (interface / "driver").exists():
            return
        (interface / "driver").mkdir()
        if subsystem := NODE_OF_CLASS.get((interface / "bInterfaceClass").read_text().strip()):
            add_node(interface / subsystem / f"{subsystem}0", subsystem, f"{subsystem}0", 240, 0)

    def take(self, port: int, *, status: int = 6, devid: int = 0xFFFF) -> None:
        """Occupies a port, like an attach by another process."""
        with self._lock:
            row = self.rows[port]
            row.status, row.devid, row.speed, row.sockfd = status, devid, 5 if row.hub == "ss" else 3, 3
            self._render()

    def free(self, port: int) -> None:
        """Frees a port, like the end of its connection."""
        with self._lock:
            row = self.rows[port]
            if row.fd >= 0:
                os.close(row.fd)
            row.status, row.devid, row.speed, row.sockfd, row.fd = 4, 0, 0, 0, -1
            self._gone.notify_all()
            self._render()
            if row.device.exists():
                row.lingering = True
                if not self.linger:
                    self.vanish(port)

    def vanish(self, port: int) -> None:
        """Removes the device from sysfs, some time after its port has become free."""
        row = self.rows[port]
        row.lingering = False
        shutil.rmtree(row.device, ignore_errors=True)
        self._uevent("remove", row.device)

    def _enumerate(self, row: Row) -> None:
        descriptor = self.devices[row.devid]
        bus = row.device.name.partition("-")[0]
        devnum = self._devnums[bus] = self._devnums.get(bus, 1) + 1
        row.status = 6
        authorized = (self.hub_dir(row.number) / "authorized_default").read_text()
        add_device(row.device, descriptor.usb_id, int(bus), devnum, authorized, self.serials.get(row.devid))
        (row.device / "descriptors").write_bytes(raw_descriptors(descriptor.device_class, descriptor.interfaces))
        self._uevent("add", row.device)

    def enumerate_anew(self, port: int, usb_id: UsbId) -> None:
        """Replaces the device on the bus by one with this id, over its connection."""
        with self._lock:
            row = self.rows[port]
            shutil.rmtree(row.device)
            self._uevent("remove", row.device)
            self.devices[row.devid] = replace(self.devices[row.devid], usb_id=usb_id)
            self._enumerate(row)

    def configure_anew(self, port: int) -> None:
        """Makes the interfaces of the device on a port anew, like USBDEVFS_SETCONFIGURATION."""
        with self._lock:
            device = self.rows[port].device
            for interface in device.glob("*:*"):
                shutil.rmtree(interface)
            self._probe(device)

    def _uevent(self, action: str, device: Path) -> None:
        self.heard(Uevent(action, "/" + str(device.relative_to(self.root)), {}))

    def _render(self) -> None:
        size = 2 * PER_HUB
        for controller in range(CONTROLLERS):
            lines = ["hub port sta spd dev      sockfd local_busid"]
            for row in self.rows[controller * size : (controller + 1) * size]:
                used = row.status == 6
                speed, devid, sockfd = (row.speed, row.devid, row.sockfd) if used else (0, 0, 0)
                busid = row.device.name if used else "0-0"
                lines.append(
                    f"{row.hub}  {row.number:04d} {row.status:03d} {speed:03d} {devid:08x} {sockfd:06d} {busid}"
                )
            path = self.base / (f"status.{controller}" if controller else "status")
            fresh = path.with_name("." + path.name)
            fresh.write_text("\n".join(lines) + "\n")
            fresh.replace(path)


def add_device(device: Path, usb_id: UsbId, bus: int, devnum: int, authorized: str, serial: str | None = None) -> None:
    """Makes the directory of a USB device with the files that the plugin reads."""
    device.mkdir(parents=True)
    files = {
        "idVendor": f"{usb_id.vendor:04x}",
        "idProduct": f"{usb_id.product:04x}",
        "busnum": str(bus),
        "authorized": authorized.strip(),
        "uevent": f"MAJOR=189\nMINOR={(bus - 1) * 128 + devnum - 1}\nDEVNAME=bus/usb/{bus:03d}/{devnum:03d}",
        "dev": f"189:{(bus - 1) * 128 + devnum - 1}",
        "devnum": str(devnum),
    }
    if serial is not None:
        files["serial"] = serial
    for name, text in files.items():
        (device / name).write_text(text + "\n")


def raw_descriptors(device_class: int, interfaces: Iterable[InterfaceClass]) -> bytes:
    """Returns a device descriptor and a configuration with these interfaces, each with an endpoint."""
    device = bytes([18, 1, 0, 2, device_class]).ljust(18, b"\0")
    parts = [
        bytes([9, 4, number, 0, 1, i.class_, i.subclass, i.protocol, 0]) + bytes([7, 5, 0x81, 2, 0, 2, 0])
        for number, i in enumerate(interfaces)
    ]
    body = b"".join(parts)
    return device + struct.pack("<BBHBBBBB", 9, 2, 9 + len(body), len(parts), 1, 0, 0x80, 50) + body


def add_interface(device: Path, number: int, class_: int, subclass: int = 0) -> Path:
    """Makes the directory of an interface, and returns it."""
    interface = device / f"{device.name}:1.{number}"
    interface.mkdir()
    (interface / "bInterfaceNumber").write_text(f"{number:02x}\n")
    (interface / "bInterfaceClass").write_text(f"{class_:02x}\n")
    (interface / "bInterfaceSubClass").write_text(f"{subclass:02x}\n")
    return interface


def add_node(folder: Path, subsystem: str, devname: str, major: int, minor: int) -> Path:
    """Makes a directory with a device node, such as .../ttyUSB0/tty/ttyUSB0, without a uevent."""
    folder.mkdir(parents=True)
    (folder / "dev").write_text(f"{major}:{minor}\n")
    (folder / "uevent").write_text(f"MAJOR={major}\nMINOR={minor}\nDEVNAME={devname}\n")
    (folder / "subsystem").symlink_to(f"../../../../class/{subsystem}")
    return folder
