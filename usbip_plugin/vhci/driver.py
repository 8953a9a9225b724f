"""The interface to vhci_hcd: ports, attach, enumerate, detach. Implemented by vhci/linux.py.

Its double is usbip_sim/kernel/driver.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Endpoint, Hold, InterfaceRules, UsbId
from usbip_plugin.vhci.sysfs import Hub, PortStatus

CHILD_WAIT_S = 3.0  # seconds to wait for child nodes that the interface classes lead to expect
ASKED_CHILD_WAIT_S = 5.0  # seconds to wait for child nodes of kinds that the caller requests, unless it says otherwise
DEFAULT_RULES = InterfaceRules()
ABANDON_S = 5.0  # seconds that the detach after a failed enumeration may take


@dataclass(frozen=True, slots=True)
class PortState:
    """A port of vhci_hcd (fields as in vhci.sysfs.Port) and the device that its port record names.

    record: the device in the record, written by this node's plugin or the `usbip` tool; None for a free port.
    by_plugin: whether a plugin of this node wrote the record, rather than the tool.
    import_from: this node's end of the connection, as the record has it.
    usb_id, holds: the USB ID of the device that was attached, and its locks, as the record has them.
    """

    number: int
    hub: Hub
    status: PortStatus
    speed: int = 0
    devid: int = 0
    local_busid: str | None = None
    record: DeviceKey | None = None
    by_plugin: bool = False
    import_from: Endpoint | None = None
    usb_id: UsbId | None = None
    holds: tuple[Hold, ...] = ()

    @property
    def allocated_as(self) -> DeviceKey | None:
        """Returns the device as it was allocated; None without a record of a plugin. The record names where it is."""
        if not self.by_plugin:
            return None
        return self.holds[0].key if self.holds else self.record


@dataclass(frozen=True, slots=True)
class DriverReport:
    """The state of vhci_hcd as shown by `usbip-plugin check`. problems: sentences for people."""

    loaded: bool
    nports: int = 0
    hs_total: int = 0
    hs_free: int = 0
    ss_total: int = 0
    ss_free: int = 0
    attach_writable: bool = False
    records_writable: bool = False
    uevents: bool = False
    problems: tuple[str, ...] = ()


class VhciDriver(Protocol):
    """The vhci_hcd of this node's kernel.

    Never changes a port that the caller has not passed in. Every method may raise DriverMissing. No method retries a
    failed operation: the caller decides.
    """

    async def ports(self) -> tuple[PortState, ...]:
        """Returns every port of every controller, sorted by number."""

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...] = ()) -> int:
        """Hands a connected socket to the kernel. Returns the port number once the kernel has its own reference to it.

        holds: the locks under which it is attached, for the port record; that of the device as it was allocated first.

        The caller still owns fd and closes it, on success and on failure. Writes the port record before it asks the
        kernel, and removes the record if the kernel refuses. Tries another port if another process takes the port
        first. Raises PortsExhausted, AttachRefused, DriverNotWritable or RecordNotWritable. If cancelled, leaves no
        port attached.
        """

    async def enumerate(
        self,
        key: DeviceKey,
        descriptor: Descriptor,
        port: int,
        *,
        children: tuple[str, ...] | None = None,
        children_timeout: float = ASKED_CHILD_WAIT_S,
        serial: str | None = None,
        rules: InterfaceRules = DEFAULT_RULES,
        timeout: float,
    ) -> Attachment:
        """Waits until the device on the port has enumerated, verifies and authorises it. Returns it with its nodes.

        children: the kinds of child nodes to wait for.
            None: waits up to CHILD_WAIT_S for the nodes that the interface classes lead to expect.
            Kinds: waits up to children_timeout seconds for a node of at least one of them, and of each interface that
            is expected to bring one. If no interface is, waits until no more nodes come.
            Empty: does not wait.
        children_timeout: seconds. Missing child nodes are not an error. Partitions are awaited with their disk.
        serial: the serial number that the device must have; None accepts any device, also one without a number.
        rules: which interfaces may be authorised. The others are withheld, so that none can be claimed.
        timeout: seconds, a bound on the whole wait.

        A device that enumerates again during the wait is verified again. A wrong device is never authorised.
        Raises AttachStuck if the device is not there in time or the connection ends, WrongDevice if its vendor:product
        is not descriptor.usb_id, WrongSerial, HubRefused, and InterfacesRefused. Detaches the port before it raises,
        which may take ABANDON_S more. Raises DetachFailed if that detach fails. If cancelled, leaves the port as it is:
        the caller must detach it.
        """

    async def inspect(self, key: DeviceKey, port: int) -> Attachment | None:
        """Returns the enumerated, authorised device on the port, or None. The caller must compare it with key."""

    async def detach(self, port: int, *, timeout: float) -> None:
        """Detaches the port, waits until it is free and its device has left sysfs, then removes its port record.

        Succeeds if the port is free already. Succeeds also if the port now has another device than the one that this
        driver attached, enumerated or inspected there; that device belongs to another process and stays attached.
        Raises DetachFailed after timeout (seconds), and keeps the record. If cancelled, the kernel may go on detaching.
        """

    async def note_holds(self, key: DeviceKey, port: int, holds: tuple[Hold, ...]) -> None:
        """Replaces the locks in the port record of an attached device: they were taken again since.

        Does nothing if the port has no record of a plugin that names key. Raises RecordNotWritable.
        """

    async def forget(self, key: DeviceKey) -> None:
        """Removes every port record that names key, which must not be attached to any port of this node."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls callback in the loop when a port may have changed, while `run()` runs. Returns an unsubscriber."""

    async def run(self) -> None:
        """Removes port records of earlier processes for free ports, then watches for changes. Runs until cancelled."""

    async def check(self) -> DriverReport:
        """Returns the state of the driver for people. Raises nothing but CancelledError."""
