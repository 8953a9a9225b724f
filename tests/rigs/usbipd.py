"""A real usbipd on the loopback of this machine, with its devices. Only for the guest: it rebinds USB devices."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from usbip_plugin.model import ServerKey

DEVICES = Path("/sys/bus/usb/devices")
STUB = Path("/sys/bus/usb/drivers/usbip-host")
CLIENT_MODULES = ("vhci-hcd",)
SERVER_MODULES = (
    *("xhci-pci", "usb-storage", "sd_mod", "usbhid", "hid-generic", "evdev", "usbserial", "ftdi_sio"),
    "usbip-host",
)
PORT = 3240
END_S = 10.0
SETTLE_S = 60.0
"""Limits a wait in seconds: the guest is emulated, and slow on a busy machine."""
STATUS_AVAILABLE = "1"  # SDEV_ST_AVAILABLE


def eventually(check: Callable[[], bool], what: str, limit: float = SETTLE_S) -> None:
    """Blocks until the check is true. Raises AssertionError after the limit in seconds."""
    end = time.monotonic() + limit
    while not check():
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit:g} s: {what}")
        time.sleep(0.02)


def kernel_version() -> str:
    """Returns the version of the running kernel. On Debian the release has the number of an interface instead."""
    debian = re.search(r"Debian ([\d.]+)", platform.version())
    return debian[1] if debian else platform.release()


class RealUsbipd:
    """A usbipd whose devices are found by their serial numbers in QEMU and bound to usbip-host."""

    def __init__(self, port: int = PORT) -> None:
        self.key = ServerKey("127.0.0.1", port)
        self._process: subprocess.Popen[bytes] | None = None
        tools = os.environ.get("GUEST_TOOLS", "")
        folders = [f"{tools}/usr/sbin", f"{tools}/usr/bin"] if tools else []
        libraries = [f"{tools}/usr/lib/x86_64-linux-gnu", f"{tools}/lib/x86_64-linux-gnu"] if tools else []
        self._path = ":".join([*folders, os.environ.get("PATH", "")])
        self._environment = {**os.environ, "PATH": self._path}
        if libraries:
            self._environment["LD_LIBRARY_PATH"] = ":".join(libraries)

    def load_modules(self, modules: Sequence[str] = (*SERVER_MODULES, *CLIENT_MODULES)) -> None:
        for module in modules:
            subprocess.run(["modprobe", module], check=True)

    def start(self) -> None:
        """Starts usbipd, and waits until it accepts connections."""
        command = [self._tool("usbipd"), "-4", f"-t{self.key.port}"]
        self._process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self.accepts, "usbipd accepts connections")

    def stop(self) -> None:
        """Terminates usbipd. Imports continue: the kernel has their sockets."""
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        self._end(subprocess.Popen.kill)

    def _end(self, how: Callable[[subprocess.Popen[bytes]], None]) -> None:
        if self._process is not None:
            how(self._process)
            self._process.wait(timeout=END_S)
            self._process = None

    def version(self) -> str:
        """Returns the program with its version, such as `usbipd 2.0`."""
        shown = subprocess.run(
            [self._tool("usbipd"), "--version"], env=self._environment, capture_output=True, text=True, check=True
        ).stdout
        return f"usbipd {re.findall(r'[0-9.]*[0-9]', shown)[-1]}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "usbipd is not running"
        return self._process.pid

    def accepts(self) -> bool:
        try:
            socket.create_connection((self.key.host, self.key.port), timeout=1).close()
        except OSError:
            return False
        return True

    def busids(self) -> dict[str, str]:
        """Returns {serial number: busid} of the devices on this machine's own controllers, bound or not."""
        found: dict[str, str] = {}
        for device in DEVICES.glob("[0-9]*-*"):
            serial = device / "serial"
            if ":" not in device.name and "vhci_hcd" not in str(device.resolve()):
                with contextlib.suppress(OSError):  # it has none, or is being unplugged
                    found[serial.read_text().strip()] = device.name
        return found

    def busid(self, serial: str) -> str:
        """Waits until the kernel has found the device, and returns its busid."""
        eventually(lambda: serial in self.busids(), f"a USB device with serial {serial}")
        return self.busids()[serial]

    def bind(self, busid: str) -> None:
        if not self.is_bound(busid):
            self.usbip("bind", "-b", busid)

    def unbind(self, busid: str) -> None:
        if self.is_bound(busid):
            self.usbip("unbind", "-b", busid)

    def pull(self, busid: str) -> None:
        """Unbinds the device without another driver: importers see it unplugged. plug() binds it again."""
        (STUB / "unbind").write_text(busid)

    def plug(self, busid: str) -> None:
        (STUB / "bind").write_text(busid)

    def is_bound(self, busid: str) -> bool:
        return (STUB / busid).exists()

    def is_free(self, busid: str) -> bool:
        """Whether the device is bound and not imported."""
        try:
            return (STUB / busid / "usbip_status").read_text().strip() == STATUS_AVAILABLE
        except OSError:
            return False

    def drop(self, busid: str) -> None:
        """Ends the import of a device on the server."""
        (STUB / busid / "usbip_sockfd").write_text("-1\n")

    def usbip_port(self) -> str:
        """Returns the output of `usbip port`, or "" if it fails, as it does while a device enumerates."""
        try:
            return self.usbip("port")
        except AssertionError:
            return ""

    def usbip(self, *arguments: str) -> str:
        """Runs the usbip tool and returns its output."""
        done = subprocess.run(
            [self._tool("usbip"), *arguments], env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise AssertionError(f"usbip {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def _tool(self, name: str) -> str:
        found = shutil.which(name, path=self._path)
        if found is None:
            raise AssertionError(f"{name} is not installed and GUEST_TOOLS does not have it")
        return found
