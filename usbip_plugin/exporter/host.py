"""The USB devices of this host, and the kernel driver usbip-host that exports them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.model import Descriptor, Identity

STUB = "usbip-host"
"""The name of the kernel driver."""
MAX_BUS_IDS = 16
"""Bus IDs that usbip-host takes at most (MAX_BUSID of drivers/usb/usbip/stub_main.c)."""


class StubStatus(enum.IntEnum):
    """The status of a device that is bound to usbip-host (SDEV_ST_ of drivers/usb/usbip/usbip_common.h).

    AVAILABLE: no client has the device.
    USED: a connection has the device. It stays so until the kernel has ended that connection and reset the device.
    ERROR: the reset failed. The device must be bound again or replugged.
    """

    AVAILABLE = 1
    USED = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A USB device of this host.

    descriptor: as in a DEVLIST entry. It has the interfaces even if the device is not configured: usbip-host leaves it
    without configuration, and a client could not tell its class otherwise.
    driver: the kernel driver of the whole device, "usb" for most; "" for none.
    serial, product: strings that the device chooses; None if it has none.
    """

    descriptor: Descriptor
    driver: str
    serial: str | None = None
    product: str | None = None

    @property
    def busid(self) -> str:
        return self.descriptor.busid

    @property
    def is_bound(self) -> bool:
        return self.driver == STUB

    @property
    def identity(self) -> Identity:
        return Identity(self.descriptor.devid, self.serial or "", self.descriptor.interfaces)


class HostDevices(Protocol):
    """The USB devices of this host. Calls that write are bounded in time, and raise subclasses of HostError."""

    async def devices(self) -> tuple[HostDevice, ...]:
        """Returns the devices on this host's own controllers by bus ID, with hubs, without root hubs.

        Bounded in time: raises HostError if a device keeps the kernel from answering.
        """

    def descriptor(self, busid: str) -> Descriptor | None:
        """Returns the descriptor of a device as it is now, without interfaces; None if there is no such device."""

    def status(self, busid: str) -> StubStatus | None:
        """Returns the status of a device, None if it is not bound to usbip-host."""

    async def bind(self, busid: str) -> None:
        """Takes the device from its driver and binds it to usbip-host. Does nothing if it is bound already.

        Raises StubMissing, StubNotWritable, or BindFailed with the cure, and then leaves the device to its driver.
        """

    async def unbind(self, busid: str) -> None:
        """Gives the device back to its driver. Ends a connection that has it. Raises HostError."""

    async def export(self, busid: str, fd: int) -> None:
        """Gives the connected socket to the kernel, which serves the device over it from then on.

        The caller may close fd afterwards. Cancel-safe: an export that was cancelled is ended.
        Raises HostError if the device is not available.
        """

    async def end(self, busid: str) -> None:
        """Ends the connection that has the device. The kernel then resets the device, which takes about 0.3 s.

        Does nothing if there is no such connection. Raises HostError.
        """

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls callback when a device may have come, gone or changed, while run() runs. Returns an unsubscriber."""

    async def run(self) -> None:
        """Watches the devices. Runs until cancelled."""

    def check(self) -> None:
        """Raises StubMissing or StubNotWritable if no device can be bound here."""
