"""The texts vhci_hcd reads and writes below /sys/devices/platform/vhci_hcd.0, and the choice of a port. Pure.

Follows drivers/usb/usbip/vhci_sysfs.c and tools/usb/usbip (Linux 4.17 and later, where status has a hub column).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

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
