"""A directory tree that behaves like the sysfs of usbip-host, to run SysfsHost without the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from usbip_plugin.exporter.host import MAX_BUS_IDS, STUB
from usbip_plugin.sync import Broadcast
from usbip_plugin.vhci.uevents import Uevent
from usbip_sim.server.usbdevice import VirtualDevice

CONTROLLER = "devices/pci0000:00/0000:00:14.0/usb1"
SPEEDS = {3: "480", 5: "5000"}
HUB_DRIVERS = "hub"


@dataclass
class FakeHostSysfs:
    """A fake of the parts of sysfs that SysfsHost uses; `write` is for SysfsHost. For one event loop.

    table: the bus IDs in match_busid. hung: paths, relative to the root, whose writes block until let_go().
    refuse: errnos for the next writes, by path relative to the root. written: all writes.
    heard: called with each uevent. settled: fires when a connection has ended.
    """

    root: Path
    table: set[str] = field(default_factory=set)
    hung: set[str] = field(default_factory=set)
    refuse: dict[str, list[int]] = field(default_factory=dict)
    written: list[tuple[str, str]] = field(default_factory=list)
    heard: Callable[[Uevent | None], None] = lambda _event: None
    settled: Broadcast = field(default_factory=Broadcast)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._go = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._sockets: dict[str, socket.socket] = {}
        self._devnum = 1
        self.devices: dict[str, VirtualDevice] = {}
        bus = self.root / "bus/usb"
        for folder in (bus / "devices", bus / "drivers/usb", self.root / CONTROLLER):
            folder.mkdir(parents=True)
        (bus / "devices/usb1").symlink_to(self.root / CONTROLLER)
        self._files(bus, "drivers_probe")
        self._files(bus / "drivers/usb", "bind", "unbind")
        self.load()

    @property
    def stub(self) -> Path:
        return self.root / "bus/usb/drivers" / STUB

    def load(self) -> None:
        """Loads the module."""
        self.stub.mkdir()
        self._files(self.stub, "match_busid", "bind", "unbind", "rebind")

    def unload(self) -> None:
        shutil.rmtree(self.stub)

    def plug(self, device: VirtualDevice, *, is_hub: bool = False, below: str = CONTROLLER) -> Path:
        """Plugs a device in. below: the directory of its bus. Returns the device's directory."""
        self.devices[device.busid] = device
        self._devnum += 1
        path = self.root / below / device.busid
        path.mkdir(parents=True)
        files = {
            "idVendor": f"{device.usb_id.vendor:04x}",
            "idProduct": f"{device.usb_id.product:04x}",
            "bcdDevice": "0100",
            "bDeviceClass": "09" if is_hub else "00",
            "bDeviceSubClass": "00",
            "bDeviceProtocol": "00",
            "bNumConfigurations": "1",
            "busnum": "1",
            "devnum": str(self._devnum),
            "speed": SPEEDS[device.speed],
            "authorized": "1",
            "dev": f"189:{self._devnum - 1}",
            "uevent": f"MAJOR=189\nMINOR={self._devnum - 1}\nDEVNAME=bus/usb/001/{self._devnum:03d}",
            "serial": device.serial,
            "product": device.product,
        }
        for name, text in files.items():
            if text:
                (path / name).write_text(text + "\n")
        descriptors = [device.usb_descriptor(kind, 0, device.usb_id) or b"" for kind in (1, 2)]
        (path / "descriptors").write_bytes(b"".join(descriptors))
        (self.root / "bus/usb/devices" / device.busid).symlink_to(path)
        self._probe(path)
        self._uevent("add", path)
        return path

    def unplug(self, busid: str) -> None:
        path = self._path(busid)
        self._disconnect(busid)
        (self.root / "bus/usb/devices" / busid).unlink()
        shutil.rmtree(path)
        del self.devices[busid]
        self._uevent("remove", path)

    def let_go(self) -> None:
        """Ends the writes that hang."""
        self.hung.clear()
        self._go.set()

    def close(self) -> None:
        self.let_go()
        for busid in tuple(self._sockets):
            self._disconnect(busid)

    def write(self, path: Path, text: str) -> None:
        """Handles a write by SysfsHost, like the kernel."""
        name = str(path.relative_to(self.root))
        if name in self.hung:
            self._go.wait(60)
        with self._lock:
            self.written.append((name, text))
            if codes := self.refuse.get(name):
                raise self._error(codes.pop(0), path)
            if not path.exists():
                raise self._error(errno.ENOENT, path)
            match path.name:
                case "match_busid":
                    self._match(text, path)
                case "bind":
                    self._bind(self._path(text), path)
                case "unbind":
                    self._unbind(self._path(text), path)
                case "rebind":
                    if text not in self.table:
                        raise self._error(errno.ENODEV, path)
                    self.table.discard(text)
                    self._probe(self._path(text))
                case "drivers_probe":
                    self._probe(self._path(text))
                case "usbip_sockfd":
                    self._sockfd(path, int(text))

    def _match(self, text: str, path: Path) -> None:
        action, busid = text.split(" ")
        if action == "add" and busid not in self.table:
            if len(self.table) >= MAX_BUS_IDS:
                raise self._error(errno.ENOMEM, path)
            self.table.add(busid)
        elif action == "del" and busid not in self.table:
            raise self._error(errno.ENODEV, path)

    def _bind(self, device: Path, path: Path) -> None:
        is_hub = (device / "bDeviceClass").read_text().strip() == "09"
        if device.name not in self.table or is_hub or (device / "driver").exists():
            raise self._error(errno.ENODEV, path)
        (device / "driver").symlink_to(self.stub)
        (device / "usbip_status").write_text("1\n")
        self._files(device, "usbip_sockfd")
        self._uevent("bind", device)

    def _unbind(self, device: Path, path: Path) -> None:
        driver = device / "driver"
        if not driver.exists() or driver.readlink() != path.parent:
            raise self._error(errno.ENODEV, path)
        self._disconnect(device.name)
        driver.unlink()
        for attribute in ("usbip_status", "usbip_sockfd"):
            (device / attribute).unlink(missing_ok=True)
        for interface in device.glob(f"{device.name}:*"):  # without a driver it has no configuration
            shutil.rmtree(interface)
        self._uevent("unbind", device)

    def _probe(self, device: Path) -> None:
        """Binds the generic driver, which configures the device."""
        if not (device / "driver").exists():
            (device / "driver").symlink_to(self.root / "bus/usb/drivers/usb")
            for number in range(1 + len(self.devices[device.name].more)):
                (device / f"{device.name}:1.{number}").mkdir()

    def _sockfd(self, path: Path, fd: int) -> None:
        device = path.parent
        status = device / "usbip_status"
        if (status.read_text() == "1\n") != (fd != -1):
            raise self._error(errno.EINVAL, path)
        if fd == -1:
            self._disconnect(device.name)
            return
        sock = socket.socket(fileno=os.dup(fd))
        self._sockets[device.name] = sock
        status.write_text("2\n")
        self._loop.call_soon_threadsafe(self._loop.add_reader, sock.fileno(), self._read, device.name, sock)

    def _read(self, busid: str, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if sock.recv(4096, socket.MSG_DONTWAIT):
                return
        self._disconnect(busid)

    def _disconnect(self, busid: str) -> None:
        sock = self._sockets.pop(busid, None)
        if sock is None:
            return

        def close() -> None:
            self._loop.remove_reader(sock.fileno())
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            with self._lock:  # an unbind removes the file
                if (status := self.root / "bus/usb/devices" / busid / "usbip_status").exists():
                    status.write_text("1\n")
            self.settled.fire()

        self._loop.call_soon_threadsafe(close)

    def break_reset(self, busid: str) -> None:
        """Makes the device unusable, as a reset that fails."""
        (self._path(busid) / "usbip_status").write_text("3\n")

    def _path(self, busid: str) -> Path:
        link = self.root / "bus/usb/devices" / busid
        if not link.exists():
            raise self._error(errno.ENODEV, link)
        return link.readlink()

    def _uevent(self, action: str, device: Path) -> None:
        event = Uevent(action, "/" + str(device.relative_to(self.root)), {"SUBSYSTEM": "usb"})
        self._loop.call_soon_threadsafe(lambda: self.heard(event))

    @staticmethod
    def _files(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).write_text("")

    @staticmethod
    def _error(code: int, path: Path) -> OSError:
        return OSError(code, os.strerror(code), str(path))
