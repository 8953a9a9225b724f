"""What vhci_hcd says and is told through sysfs: ports, attach, detach, and where its root hubs are."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from usbip_plugin.clock import Clock
from usbip_plugin.errors import DriverMissing, DriverNotWritable, VhciError

Hub = Literal["hs", "ss"]

NO_DEVICE = "0-0"
SPEED_SUPER = 5
SPEEDS = range(1, 7)  # enum usb_device_speed, USB_SPEED_LOW .. USB_SPEED_SUPER_PLUS
MAX_PORTS = 4096  # the kernel's own limit is 128 controllers of 31 ports
_COLUMNS = 7
_MAX_DIGITS = 10
_BUSID = re.compile(r"[0-9]{1,5}-[0-9]{1,5}(\.[0-9]{1,5}){0,3}")  # becomes part of a path
_HUBS: Final[Mapping[str, Hub]] = {"hs": "hs", "ss": "ss"}


class PortStatus(enum.IntEnum):
    """enum usbip_device_status of drivers/usb/usbip/usbip_common.h, the half that is about vhci."""

    NULL = 4  # free
    NOTASSIGNED = 5  # has a socket, the device has no address yet
    USED = 6  # the device has an address; its sysfs directory follows
    ERROR = 7  # unusable until detached


_STATUS: Final = {f"{status:03d}": status for status in PortStatus}


@dataclass(frozen=True, slots=True)
class Port:
    """One row of status.

    number is global over all controllers. local_busid is the name under /sys/bus/usb/devices, None unless status is
    USED. controller is the N of vhci_hcd.N, root_port counts the ports of its hs or ss hub from 1. speed is the
    kernel's enum usb_device_speed, sockfd the number the socket had in the process that attached it; speed, devid and
    sockfd are 0 unless status is USED.
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
        """devid and sockfd: what tells this attachment from another one on the same port. None unless USED."""
        return (self.devid, self.sockfd) if self.status is PortStatus.USED else None


def hub_of(speed: int) -> Hub:
    """The hub whose ports take a device of this speed: the kernel picks it by the speed, whatever port is written."""
    return "ss" if speed >= SPEED_SUPER else "hs"


def parse_status(text: str, controller: int = 0) -> tuple[Port, ...]:
    """Ports in the text of status (controller 0) or status.N, in the kernel's order.

    ValueError for a row that is not understood, and for more than MAX_PORTS: guessing at ports could detach somebody
    else's device.
    """
    ports: list[Port] = []
    seen: dict[str, int] = {}
    for line in text.splitlines():
        fields = line.split()
        if fields and fields[0] != "hub":
            if len(ports) == MAX_PORTS:
                raise ValueError(f"vhci status with more than {MAX_PORTS} rows")
            seen[fields[0]] = root_port = seen.get(fields[0], 0) + 1
            ports.append(_row(line, fields, controller, root_port))
    return tuple(ports)


def _row(line: str, fields: list[str], controller: int, root_port: int) -> Port:
    if len(fields) != _COLUMNS:
        raise ValueError(f"vhci status row with {len(fields)} columns instead of {_COLUMNS}: {line[:80]!r}")
    hub = _HUBS.get(fields[0])
    try:
        status = _STATUS[fields[2]]
        number, speed, sockfd = (_decimal(fields[column]) for column in (1, 3, 5))
        devid = int(fields[4], 16)
    except (ValueError, KeyError):
        hub = None
    if hub is None or number >= MAX_PORTS or not 0 <= devid < 1 << 32 or not _BUSID.fullmatch(fields[6]):
        raise ValueError(f"vhci status row that cannot be read: {line[:80]!r}")
    local_busid = fields[6] if status is PortStatus.USED and fields[6] != NO_DEVICE else None
    return Port(number, hub, status, speed, devid, local_busid, controller, root_port, sockfd)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ValueError(f"{text[:80]!r} is no number")
    return int(text)


def parse_nports(text: str) -> int:
    """Number of ports of all controllers. ValueError if it is not a number between 1 and MAX_PORTS."""
    number = _decimal(text.strip())
    if not 1 <= number <= MAX_PORTS:
        raise ValueError(f"nports is {number}")
    return number


def status_files(nports: int, rows_in_first: int) -> tuple[str, ...]:
    """Names of the status files that together list nports ports, given how many the first one lists."""
    controllers = -(-nports // rows_in_first) if rows_in_first else 1
    return ("status", *(f"status.{n}" for n in range(1, controllers)))


def format_attach(port: int, fd: int, devid: int, speed: int) -> str:
    """What to write to attach. ValueError for values the kernel would misread."""
    if port < 0 or fd < 0 or not 0 <= devid < 1 << 32 or speed not in SPEEDS:
        raise ValueError(f"cannot attach port {port}, fd {fd}, devid {devid:#x}, speed {speed}")
    return f"{port} {fd} {devid} {speed}"


def format_detach(port: int) -> str:
    """What to write to detach. ValueError for a negative port."""
    if port < 0:
        raise ValueError(f"cannot detach port {port}")
    return str(port)


def choose_port(ports: Iterable[Port], speed: int, penalty: Callable[[Port], int] = lambda _port: 0) -> Port | None:
    """The free port of the hub for this speed with the least penalty, then the lowest, over all controllers.

    None if no port of that hub is free: a penalty makes a port the last choice, never impossible.
    """
    free = [port for port in ports if port.hub == hub_of(speed) and port.status is PortStatus.NULL]
    return min(free, key=lambda port: (penalty(port), port.number), default=None)


WRITE_S = 5.0  # for one write to sysfs; milliseconds in practice
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def write_sysfs(path: Path, text: str) -> None:
    """One write(2), as sysfs wants it. Blocking; OSError; never creates a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


def refusal(path: Path) -> str | None:
    """What the system says to opening a sysfs file for writing, None if it allows it. Nothing is written.

    Only opening asks AppArmor and SELinux; access(2) does not.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return None


class PortTable:
    """The status files of all controllers. Reads are directly in the loop: sysfs answers from memory.

    Parsing is what costs, and most files have not changed since they were last read: each is parsed once per content.
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
        """Every port, by number. DriverMissing, or VhciError for a status that cannot be understood."""
        try:
            first = self._controller(0)
            nports = parse_nports((self._base / "nports").read_text())
            self._per_controller = len(first)
            found = [port for n in range(len(status_files(nports, len(first)))) for port in self._controller(n)]
            return tuple(sorted(found, key=lambda port: port.number))
        except OSError as error:
            raise DriverMissing(str(self._base)) from error
        except ValueError as error:
            raise VhciError(str(error)) from error

    def one(self, number: int) -> Port:
        """One port, from the status file of its controller. Also VhciError if there is no such port."""
        if not self._per_controller:
            self.all()
        controller = number // self._per_controller if self._per_controller else 0
        try:
            ports = self._controller(controller)
        except OSError as error:
            raise (VhciError(f"no port {number}") if self._base.exists() else DriverMissing(str(self._base))) from error
        except ValueError as error:
            raise VhciError(str(error)) from error
        for port in ports:
            if port.number == number:
                return port
        raise VhciError(f"no port {number}")


class Writer:
    """Writes to sysfs in a thread, bounded by WRITE_S. write: (path, text), blocking, OSError."""

    def __init__(self, clock: Clock, write: Callable[[Path, str], None]) -> None:
        self._clock = clock
        self._write = write

    async def write(
        self,
        path: Path,
        text: str,
        *,
        finish: Callable[[], None] = lambda: None,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """OSError from the write; ETIMEDOUT if it has not returned after WRITE_S.

        A write that has begun cannot be stopped. finish is called in its thread when it has ended in whatever way; undo
        is called in the loop if it succeeds after it was given up (timeout or cancellation). When cancelled, a write
        with an undo is waited for, so that it has been undone.
        """

        def work() -> None:
            try:
                self._write(path, text)
            finally:
                finish()

        def late(ended: asyncio.Future[None]) -> None:
            if ended.exception() is None and undo is not None:
                undo()

        future = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            async with self._clock.timeout(WRITE_S):
                await asyncio.wait([future])
        except TimeoutError:
            future.add_done_callback(late)
            raise OSError(errno.ETIMEDOUT, f"the kernel did not take it within {WRITE_S:g} s", str(path)) from None
        except asyncio.CancelledError:
            future.add_done_callback(late)
            if undo is not None:
                with contextlib.suppress(TimeoutError):
                    async with self._clock.timeout(WRITE_S):
                        await asyncio.wait([future])
            raise
        future.result()


def explain(error: OSError, path: Path, otherwise: VhciError) -> VhciError:
    """The VhciError for a failed write: the same for every file where the reason is permission or a missing driver."""
    if error.errno in _NOT_ALLOWED:
        return DriverNotWritable(str(path), error.strerror or str(error))
    if error.errno == errno.ENOENT and path.name in ("attach", "detach"):
        return DriverMissing(str(path.parent))
    return otherwise


STALL_S = 6.0
SAME_PORT, SAME_CONTROLLER = 2, 1


class PortCooldown:
    """Remembers detachments in status 005, per process: a successor finds out by one AttachStuck."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ports: dict[int, float] = {}
        self._controllers: dict[int, float] = {}

    def mark(self, port: Port) -> None:
        """The port has just been freed before its device had enumerated."""
        until = self._clock.monotonic() + STALL_S
        self._ports[port.number] = self._controllers[port.controller] = until

    def penalty(self, port: Port) -> int:
        """0 for a port that is as good as any; the higher, the less it should be chosen."""
        now = self._clock.monotonic()
        if now < self._ports.get(port.number, now):
            return SAME_PORT
        return SAME_CONTROLLER if now < self._controllers.get(port.controller, now) else 0


HIGH_SPEED_MBPS = 480


def controller_dir(sysfs: Path, controller: int) -> Path:
    return sysfs / "devices/platform" / f"vhci_hcd.{controller:d}"


def root_hub(sysfs: Path, controller: int, hub: Hub) -> Path | None:
    """Directory of the hs or ss root hub (".../usb4") of one controller, None if it is not there."""
    for candidate in sorted(controller_dir(sysfs, controller).glob("usb[0-9]*")):
        try:
            fast = float((candidate / "speed").read_text()) > HIGH_SPEED_MBPS
        except (OSError, ValueError):
            continue
        if fast == (hub == "ss"):
            return candidate
    return None


def device_dir(sysfs: Path, port: Port) -> Path | None:
    """Where the device on this port is in sysfs, or would be; None if the hub is not there."""
    if port.local_busid is not None:
        bus = port.local_busid.partition("-")[0]
        return controller_dir(sysfs, port.controller) / f"usb{bus}" / port.local_busid
    hub = root_hub(sysfs, port.controller, port.hub)
    return None if hub is None else hub / f"{hub.name.removeprefix('usb')}-{port.root_port:d}"
