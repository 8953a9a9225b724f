"""The interface to vhci_hcd: ports, attach, enumerate, detach. Implemented by vhci/linux.py.

Its double is usbip_sim/kernel/driver.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.model import Attachment, Descriptor, DeviceKey
from usbip_plugin.vhci.sysfs import Hub, PortStatus

CHILD_WAIT_S = 3.0  # for children that the interface classes promise
ASKED_CHILD_WAIT_S = 5.0  # for children that the caller asks for
ABANDON_S = 5.0  # for the detach that follows a failed enumeration


@dataclass(frozen=True, slots=True)
class PortState:
    """A port and whose it is. record is what this node wrote (or the usbip tool), None for a free port.

    by_plugin: whether a plugin of this node wrote it, and not the tool. The other fields are those of vhci.sysfs.Port.
    """

    number: int
    hub: Hub
    status: PortStatus
    speed: int = 0
    devid: int = 0
    local_busid: str | None = None
    record: DeviceKey | None = None
    by_plugin: bool = False


@dataclass(frozen=True, slots=True)
class DriverReport:
    """What `usbip-plugin check` wants to know. problems: sentences for people, empty when all is well."""

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
    """One node's view of its kernel's vhci_hcd. Ports that were not passed in are never touched.

    Every method may raise DriverMissing. Nothing here is retried; the caller decides.
    """

    async def ports(self) -> tuple[PortState, ...]:
        """Every port of every controller, by number."""
        ...

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int) -> int:
        """Hand a connected socket to the kernel; the port number once the kernel has its own reference to it.

        The caller still owns fd and closes it, on success and on failure. The port's record is written before the
        kernel is asked and taken back if it refuses. A port that somebody else takes in between is replaced by another.
        PortsExhausted, AttachRefused, DriverNotWritable, RecordNotWritable. If cancelled, no port is left attached.
        """
        ...

    async def enumerate(
        self,
        key: DeviceKey,
        descriptor: Descriptor,
        port: int,
        *,
        children: tuple[str, ...] | None = None,
        children_timeout: float = ASKED_CHILD_WAIT_S,
        serial: str | None = None,
        timeout: float,
    ) -> Attachment:
        """Wait until the device on this port is there, is the one promised, and is authorised; collect its nodes.

        Child nodes: children None waits up to CHILD_WAIT_S for what the interface classes promise; a tuple of kinds
        waits up to children_timeout seconds for each of them, and for all that the classes promise of them; an empty
        tuple does not wait. Partitions come with their disk. Children that do not come are no error, and timeout
        (seconds) bounds the waiting as a whole. A device that enumerates anew meanwhile is verified anew.
        serial: the device must tell this serial number; None: any or none will do.
        AttachStuck (not there in time, or the connection ended), WrongDevice (other vendor:product than
        descriptor.usb_id) and WrongSerial after the port has been detached again, which may take up to ABANDON_S more;
        DetachFailed if that fails. A wrong device is never authorised. If cancelled, the port stays as it is: the
        caller detaches.
        """
        ...

    async def inspect(self, key: DeviceKey, port: int) -> Attachment | None:
        """What stands on the port now, enumerated and authorised, as key's attachment; None if there is nothing such.

        Does not compare it with anything: the caller knows what it expects.
        """
        ...

    async def detach(self, port: int, *, timeout: float) -> None:
        """Free the port, wait until it is free and its sysfs entry has gone, remove its record.

        A port that is free already is a success. So is one on which there now stands another device than the one this
        driver attached, enumerated or inspected there: that one is somebody else's and is left alone.
        DetachFailed after timeout (seconds), with the record kept. If cancelled, the kernel may go on detaching.
        """
        ...

    async def forget(self, key: DeviceKey) -> None:
        """Remove every port record that names key: the caller has seen that its device stands on no port of ours."""
        ...

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back, in the event loop, after whatever may have changed a port; returns the unsubscribe function.

        Says only "look again". Needs run().
        """
        ...

    async def run(self) -> None:
        """Forget a predecessor's records of ports that are free by now; then listen for changes until cancelled."""
        ...

    async def check(self) -> DriverReport:
        """State of the driver for people. Raises nothing but CancelledError."""
        ...
