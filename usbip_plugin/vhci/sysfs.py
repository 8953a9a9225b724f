"""The sysfs files of vhci_hcd: the status of its ports, attach, detach, and the directories of its root hubs.

Follows drivers/usb/usbip/vhci_sysfs.c and tools/usb/usbip of Linux 4.17 and later, where status has a hub column.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from usbip_plugin.clock import Clock
from usbip_plugin.errors import DriverMissing, DriverNotWritable, KernelUnsupported, VhciError
from usbip_plugin.sync import OwnThreads, done_within

Hub = Literal["hs", "ss"]

NO_DEVICE = "0-0"  # local bus ID in the status row of a port without a device
SPEED_SUPER = 5  # USB_SPEED_SUPER of enum usb_device_speed
SPEED_SUPER_PLUS = 6  # USB_SPEED_SUPER_PLUS; vhci_hcd refuses it before Linux 6.12
SPEEDS = range(1, 7)  # enum usb_device_speed, USB_SPEED_LOW to USB_SPEED_SUPER_PLUS
MAX_PORTS = 4096  # ports of all controllers; the kernel's own limit is 128 controllers with 31 ports each
_COLUMNS = 7
_MAX_DIGITS = 10
_BUSID = re.compile(r"[0-9]{1,5}-[0-9]{1,5}(\.[0-9]{1,5}){0,3}")  # strict, because it becomes part of a path
_HUBS: Final[Mapping[str, Hub]] = {"hs": "hs", "ss": "ss"}


class PortStatus(enum.IntEnum):
    """The status of a vhci port: the vhci values of enum usbip_device_status (drivers/usb/usbip/usbip_common.h)."""

    NULL = 4  # free: the port has no socket
    NOTASSIGNED = 5  # the port has a socket, but its device has no USB address yet
    USED = 6  # the device has a USB address; its sysfs directory may not exist yet
    ERROR = 7  # the port is unusable until it is detached


_STATUS: Final = {f"{status:03d}": status for status in PortStatus}


@dataclass(frozen=True, slots=True)
class Port:
    """A vhci port: one row of a status file. speed, devid and sockfd are 0 unless status is USED.

    number: unique over all controllers.
    speed: a value of the kernel's enum usb_device_speed.
    devid: see Descriptor.devid.
    local_busid: the name under /sys/bus/usb/devices, None unless status is USED.
    controller: the N of vhci_hcd.N.
    root_port: number of the port on its hs or ss root hub, from 1.
    sockfd: the descriptor number that the socket had in the process that attached it.
    """

    number: int
    hub: Hub
    status: PortStatus
    speed: int = 0
    devid: int = 0
    local_busid: str | None = None
    controller: int = 0
    root_port: int = 0
    sockfd: int = 0

    @property
    def occupant(self) -> tuple[int, int] | None:
        """devid and sockfd, which distinguish two attachments of one port. None unless status is USED."""
        return (self.devid, self.sockfd) if self.status is PortStatus.USED else None


def hub_of(speed: int) -> Hub:
    """Returns the hub for a device of this speed. The kernel chooses the hub by speed, whatever port is written."""
    return "ss" if speed >= SPEED_SUPER else "hs"


def parse_status(text: str, controller: int = 0) -> tuple[Port, ...]:
    """Returns the ports in the text of status (controller 0) or status.N, in the kernel's order.

    Raises ValueError for a row that is not valid and for more than MAX_PORTS rows: a guess at ports could detach a
    device of another process.
    """
    ports: list[Port] = []
    root_ports: Counter[str] = Counter()
    for line in text.splitlines():
        fields = line.split()
        if fields and fields[0] != "hub":
            if len(ports) == MAX_PORTS:
                raise ValueError(f"vhci status has more than {MAX_PORTS} rows")
            root_ports[fields[0]] += 1
            ports.append(_row(line, fields, controller, root_ports[fields[0]]))
    return tuple(ports)


def _row(line: str, fields: list[str], controller: int, root_port: int) -> Port:
    if len(fields) != _COLUMNS:
        raise ValueError(f"expected {_COLUMNS} columns in a vhci status row, got {len(fields)}: {line[:80]!r}")
    hub = _HUBS.get(fields[0])
    try:
        status = _STATUS[fields[2]]
        number, speed, sockfd = (_decimal(fields[column]) for column in (1, 3, 5))
        devid = int(fields[4], 16)
    except (ValueError, KeyError):
        hub = None
    if hub is None or number >= MAX_PORTS or not 0 <= devid < 1 << 32 or not _BUSID.fullmatch(fields[6]):
        raise ValueError(f"vhci status row is not valid: {line[:80]!r}")
    local_busid = fields[6] if status is PortStatus.USED and fields[6] != NO_DEVICE else None
    return Port(number, hub, status, speed, devid, local_busid, controller, root_port, sockfd)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ValueError(f"{text[:80]!r} is not a number")
    return int(text)


def parse_nports(text: str) -> int:
    """Returns the number of ports of all controllers. Raises ValueError unless it is between 1 and MAX_PORTS."""
    number = _decimal(text.strip())
    if not 1 <= number <= MAX_PORTS:
        raise ValueError(f"nports must be between 1 and {MAX_PORTS}, got {number}")
    return number


def status_files(nports: int, rows_in_first: int) -> tuple[str, ...]:
    """Returns the names of the status files that list nports ports, of which each lists at most rows_in_first."""
    controllers = -(-nports // rows_in_first) if rows_in_first else 1
    return ("status", *(f"status.{n}" for n in range(1, controllers)))


def format_attach(port: int, fd: int, devid: int, speed: int) -> str:
    """Returns the text to write to attach. Raises ValueError for values that the kernel would misread."""
    if port < 0 or fd < 0 or not 0 <= devid < 1 << 32 or speed not in SPEEDS:
        raise ValueError(f"cannot attach port {port}, fd {fd}, devid {devid:#x}, speed {speed}")
    return f"{port} {fd} {devid} {speed}"


def format_detach(port: int) -> str:
    """Returns the text to write to detach. Raises ValueError for a negative port."""
    if port < 0:
        raise ValueError(f"cannot detach port {port}")
    return str(port)


def choose_port(ports: Iterable[Port], speed: int, penalty: Callable[[Port], int] = lambda _port: 0) -> Port | None:
    """Returns the free port of any controller for this speed with the lowest (penalty, number), or None."""
    free = [port for port in ports if port.hub == hub_of(speed) and port.status is PortStatus.NULL]
    return min(free, key=lambda port: (penalty(port), port.number), default=None)


WRITE_S = 5.0  # seconds that one write to sysfs may take; it takes milliseconds in practice
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def write_sysfs(path: Path, text: str) -> None:
    """Writes text to a sysfs file with one write(2), as sysfs requires. Blocks. Raises OSError. Creates no file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


def refusal(path: Path) -> str | None:
    """Returns why a sysfs file cannot be opened for writing, or None if it can. Writes nothing.

    Opens the file, because AppArmor and SELinux check open(2) but not access(2).
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return None


class PortTable:
    """A reader of the status files of all controllers. Parses a file only if its content has changed.

    Reads in the event loop, because sysfs answers from memory. Parsing is the expensive part.
    """

    def __init__(self, sysfs: Path) -> None:
        self._base = controller_dir(sysfs, 0)
        self._per_controller = 0
        self._parsed: dict[int, tuple[str, tuple[Port, ...]]] = {}

    def _controller(self, number: int) -> tuple[Port, ...]:
        text = (self._base / (f"status.{number}" if number else "status")).read_text()
        known = self._parsed.get(number)
        if known is None or known[0] != text:
            known = self._parsed[number] = (text, parse_status(text, number))
        return known[1]

    def all(self) -> tuple[Port, ...]:
        """Returns every port, sorted by number. Raises DriverMissing, and KernelUnsupported if a file is not valid."""
        try:
            first = self._controller(0)
            nports = parse_nports((self._base / "nports").read_text())
            self._per_controller = len(first)
            found = [port for n in range(len(status_files(nports, len(first)))) for port in self._controller(n)]
            return tuple(sorted(found, key=lambda port: port.number))
        except OSError as error:
            older = self._base, self._base.with_suffix("")  # without a number before Linux 4.9
            if error.errno == errno.ENOENT and any(path.exists() for path in older):
                raise KernelUnsupported(os.uname().release, str(error)) from error
            raise DriverMissing(str(self._base)) from error
        except ValueError as error:
            raise KernelUnsupported(os.uname().release, str(error)) from error

    def one(self, number: int) -> Port:
        """Returns one port. Raises what all() raises, and VhciError if there is no such port."""
        if not self._per_controller:
            self.all()
        controller = number // self._per_controller if self._per_controller else 0
        try:
            for port in self._controller(controller):
                if port.number == number:
                    return port
        except OSError as error:
            if not self._base.exists():
                raise DriverMissing(str(self._base)) from error
        except ValueError as error:
            raise KernelUnsupported(os.uname().release, str(error)) from error
        raise VhciError(f"vhci port {number} does not exist")


class Writer:
    """An asynchronous writer to sysfs that calls write(path, text) in a thread and waits at most WRITE_S.

    Each file of each device has a thread of its own, so that a detach waits neither for another device nor for this
    one, which may let a write to `authorized` hang until it is detached.
    """

    def __init__(self, clock: Clock, write: Callable[[Path, str], None]) -> None:
        self._clock = clock
        self._write = write
        self._under_way: dict[tuple[str, int | str], asyncio.Future[bool]] = {}

    async def write(
        self,
        path: Path,
        text: str,
        *,
        device: int | str,
        finish: Callable[[], None] = lambda: None,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """Writes text to a sysfs file for a device. A write that has begun cannot be stopped; another does not begin.

        Raises the OSError of the write, or one with ETIMEDOUT if the write has not returned after WRITE_S, which
        includes the wait for an earlier one to the same file.
        device: its port number or bus ID. Its writes to files of one name are made one after the other.
        finish: called once, when the write has ended or will not begin, perhaps in another thread.
        undo: called in the event loop if the write succeeds after a timeout or cancellation. If cancelled, waits up to
        WRITE_S more for a write with an undo, so that it is undone before the cancellation goes on.
        """
        lane = path.name, device
        future: asyncio.Future[bool] | None = None
        begins = threading.Lock()  # taken for good by the thread that writes, or by the caller that gives up before

        def work() -> bool:
            try:
                if written := begins.acquire(blocking=False):
                    self._write(path, text)
                return written
            finally:
                finish()

        def ended(_future: object) -> None:
            del self._under_way[lane]

        def late(future: asyncio.Future[bool]) -> None:
            if future.exception() is None and future.result() and undo is not None:
                undo()

        try:
            async with self._clock.timeout(WRITE_S):
                while (earlier := self._under_way.get(lane)) is not None:
                    await asyncio.wait([earlier])
                thread = OwnThreads(f"{path.name} {device}")
                future = self._under_way[lane] = asyncio.get_running_loop().run_in_executor(thread, work)
                future.add_done_callback(ended)
                await asyncio.wait([future])
        except (TimeoutError, asyncio.CancelledError) as error:
            begins.acquire(blocking=False)
            if future is None:
                finish()
            else:
                future.add_done_callback(late)
                if undo is not None and not isinstance(error, TimeoutError):
                    await done_within(self._clock, WRITE_S, asyncio.wait([future]))
            if isinstance(error, TimeoutError):
                raise OSError(errno.ETIMEDOUT, f"no answer from the kernel within {WRITE_S:g} s", str(path)) from None
            raise
        future.result()


def explain(error: OSError, path: Path, otherwise: VhciError) -> VhciError:
    """Returns DriverNotWritable if a write failed for lack of permission, DriverMissing of a file, else `otherwise`."""
    if error.errno in _NOT_ALLOWED:
        return DriverNotWritable(str(path), error.strerror or str(error))
    if error.errno == errno.ENOENT and path.name in ("attach", "detach"):
        return DriverMissing(str(path.parent))
    return otherwise


STALL_S = 6.0
"""Seconds for which a port and its controller are avoided after a device was detached before it had an address.

Such a detach leaves the hub's worker in the kernel waiting for an answer that never comes (hub_port_init,
initial_descriptor_timeout: 5 s). Meanwhile nothing else enumerates on either root hub of that controller, because they
share one address0_mutex. A device attached to the very same port may stay in status 005 for good. Other controllers are
not affected.
"""
SAME_PORT, SAME_CONTROLLER = 2, 1  # penalties of PortCooldown; the port itself is worse than others of its controller


class PortCooldown:
    """The ports and controllers to avoid for STALL_S. In memory only: the next process finds out by one AttachStuck."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ports: dict[int, float] = {}
        self._controllers: dict[int, float] = {}

    def mark(self, port: Port) -> None:
        """Records that the port has just lost its device before the device enumerated."""
        until = self._clock.monotonic() + STALL_S
        self._ports[port.number] = self._controllers[port.controller] = until

    def penalty(self, port: Port) -> int:
        """Returns how much to avoid a port: 0 for no reason, SAME_CONTROLLER, or SAME_PORT for the most."""
        now = self._clock.monotonic()
        if now < self._ports.get(port.number, now):
            return SAME_PORT
        return SAME_CONTROLLER if now < self._controllers.get(port.controller, now) else 0


HIGH_SPEED_MBPS = 480  # Mbit/s, as in the hub's speed file; a root hub above this speed is an ss hub


def controller_dir(sysfs: Path, controller: int) -> Path:
    return sysfs / "devices/platform" / f"vhci_hcd.{controller:d}"


def root_hub(sysfs: Path, controller: int, hub: Hub) -> Path | None:
    """Returns the directory of a controller's hs or ss root hub (".../usb4"), or None if it does not exist."""
    for candidate in sorted(controller_dir(sysfs, controller).glob("usb[0-9]*")):
        try:
            fast = float((candidate / "speed").read_text()) > HIGH_SPEED_MBPS
        except (OSError, ValueError):
            continue
        if fast == (hub == "ss"):
            return candidate
    return None


def device_dir(sysfs: Path, port: Port) -> Path | None:
    """Returns the sysfs directory that the device on this port has or would have, or None if its hub does not exist."""
    if port.local_busid is not None:
        bus = port.local_busid.partition("-")[0]
        return controller_dir(sysfs, port.controller) / f"usb{bus}" / port.local_busid
    hub = root_hub(sysfs, port.controller, port.hub)
    return None if hub is None else hub / f"{hub.name.removeprefix('usb')}-{port.root_port:d}"
