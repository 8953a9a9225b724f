"""Ports of a simulated vhci_hcd, and the devices attached to them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from usbip_plugin.clock import Clock
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, DeviceNode, Endpoint, Hold, InterfaceClass, UsbId
from usbip_plugin.sync import Broadcast
from usbip_plugin.vhci.records import local_endpoint
from usbip_plugin.vhci.sysfs import Hub, Port, PortStatus
from usbip_sim.kernel.children import every, linked
from usbip_sim.kernel.enumeration import drivers_children
from usbip_sim.sockets import MemorySocket

FOREIGN_DEVID = 0xFFFF
_USB_MAJOR = 189
_DEVICES_PER_BUS = 128


@dataclass(slots=True)
class Occupant:
    """Device attached to a port.

    number: counts the occupants of the kernel, so that a later device on the same port has another number.
    descriptor: None for a device that was not attached over the network.
    appears_at: when the device is enumerated, in seconds of the kernel's clock; infinity for never.
    serial: None if the simulation does not know it; then any expected serial number matches.
    withheld: numbers of the interfaces that are not authorised.
    recorded_by: the node whose port record is for this device; "" for none.
    identified: the kernel has read the identity from the device itself, and `children` follow from that identity.
    interfaces: as read from the device itself, where that was done.
    import_from: the node's end of the connection, None if it has no address.
    holds: the locks under which it was attached, as the port record has them.
    let_go: releases the kernel's reference to the socket.
    """

    number: int
    descriptor: Descriptor | None
    usb_id: UsbId
    appears_at: float
    devnum: int
    authorized: bool = False
    withheld: frozenset[int] = frozenset()
    serial: str | None = None
    manufacturer: str = ""
    model: str = ""
    recorded_by: str = ""
    identified: bool = False
    interfaces: tuple[InterfaceClass, ...] = ()
    children: list[DeviceNode] = field(default_factory=list)
    import_from: Endpoint | None = None
    holds: tuple[Hold, ...] = ()
    let_go: Callable[[], None] = lambda: None

    @property
    def known_interfaces(self) -> tuple[InterfaceClass, ...]:
        """Returns the interfaces; of a device that was not read, those that its server lists."""
        return self.interfaces or (self.descriptor.interfaces if self.descriptor is not None else ())

    def present_children(self) -> list[DeviceNode]:
        """Returns the child nodes of the interfaces that are authorised."""
        return [node for node in self.children if node.interface not in self.withheld]


class SimulatedKernel:
    """Ports, devices and sockets of one kernel."""

    def __init__(
        self,
        clock: Clock,
        *,
        controllers: int = 1,
        ports_per_hub: int = 8,
        enumeration_delay: float = 0.0,
        resolve: Callable[[int], MemorySocket | None] = lambda _token: None,
        serial_of: Callable[[DeviceKey], str | None] | None = None,
    ) -> None:
        """Makes a kernel whose ports are all free.

        enumeration_delay: seconds from attach to enumerated.
        resolve: returns the MemorySocket of a negative fd (SocketTable.resolve).
        serial_of: returns the serial number of a device that is attached; by default from `serials`.
        """
        self.clock = clock
        self.enumeration_delay = enumeration_delay
        self.loaded = True
        self.detaching_hangs = False
        self.records_failing: int | None = None  # errno with which each write of a port record fails
        self.changed = Broadcast()
        self.records: dict[str, dict[int, DeviceKey]] = {}  # port records by node; each kind node has its own /run
        self.serials: dict[DeviceKey, str] = {}
        self.serial_of = serial_of or self.serials.get
        self.child_kinds: dict[UsbId, tuple[str, ...]] = {}  # names in children.CHILDREN, by id
        self.net: dict[UsbId, tuple[str, ...]] = {}  # network interfaces of devices with this id
        self.interfaces: dict[UsbId, tuple[InterfaceClass, ...]] = {}  # as read from devices with this id
        self.mute: set[DeviceKey] = set()  # devices that never enumerate
        self.driverless: set[str] = set()  # kinds of child nodes that never appear, for lack of a loaded driver
        self._controllers, self._per_hub, self._resolve = controllers, ports_per_hub, resolve
        self._occupants: dict[int, Occupant] = {}
        self._generation = 0
        self._devnums: dict[int, int] = {}
        self._held: set[str] = set()
        self._stuck = 0
        self._refusals = 0
        self._impostors: list[UsbId] = []

    # Faults.

    def stuck_next(self, times: int = 1) -> None:
        """Leaves the next attached devices in port status 005 (VDEV_ST_NOTASSIGNED): they never enumerate."""
        self._stuck += times

    def refuse_next(self, times: int = 1) -> None:
        """Makes the next attach writes fail with EINVAL."""
        self._refusals += times

    def impostor_next(self, usb_id: UsbId) -> None:
        """Gives the next attached device another vendor:product than its server reports."""
        self._impostors.append(usb_id)

    def attach_well(self) -> None:
        """Forgets what was to happen to the next attached devices."""
        self._stuck = self._refusals = 0
        self._impostors.clear()

    def fill_ports(self, hub: Hub | None = None, leave: int = 0) -> tuple[int, ...]:
        """Fills all free ports (of one hub) except `leave` with devices of another user, and returns their numbers."""
        free = [port for port in self.ports() if port.status is PortStatus.NULL and hub in (None, port.hub)]
        taken = free[: len(free) - leave]
        for port in taken:
            self._occupy(port, None, UsbId(FOREIGN_DEVID, FOREIGN_DEVID))
        self.changed.fire()
        return tuple(port.number for port in taken)

    def hold(self, path: str) -> None:
        """Reserves the path of a child node until let_go(), as a process does that keeps the node open."""
        self._held.add(path)

    def let_go(self, path: str) -> None:
        self._held.discard(path)

    def free_port(self, number: int) -> None:
        """Frees a port, as a detach or the end of its connection does. Does nothing if the port is free."""
        occupant = self._occupants.pop(number, None)
        if occupant is not None:
            occupant.let_go()
            self.changed.fire()

    def reboot(self) -> None:
        """Frees all ports and removes the port records of all nodes, as a reboot empties /run."""
        for number in tuple(self._occupants):
            self.free_port(number)
        self.records.clear()
        self._devnums.clear()

    # What drivers see.

    def ports(self) -> tuple[Port, ...]:
        """Returns all ports in the kernel's order: for each controller the hs rows, then the ss rows."""
        hubs: tuple[Hub, Hub] = ("hs", "ss")
        places = itertools.product(range(self._controllers), hubs, range(1, self._per_hub + 1))
        return tuple(self._row(number, *place) for number, place in enumerate(places))

    def _row(self, number: int, controller: int, hub: Hub, root_port: int) -> Port:
        occupant = self._occupants.get(number)
        if occupant is None:
            return Port(number, hub, PortStatus.NULL, controller=controller, root_port=root_port)
        if self.clock.monotonic() < occupant.appears_at:
            return Port(number, hub, PortStatus.NOTASSIGNED, controller=controller, root_port=root_port)
        descriptor = occupant.descriptor
        speed = descriptor.speed if descriptor is not None else 5 if hub == "ss" else 3
        devid = descriptor.devid if descriptor is not None else FOREIGN_DEVID
        busid = f"{_bus(controller, hub)}-{root_port}"
        return Port(number, hub, PortStatus.USED, speed, devid, busid, controller, root_port, occupant.number)

    def occupant(self, number: int) -> Occupant | None:
        return self._occupants.get(number)

    def attach(self, port: Port, descriptor: Descriptor, fd: int) -> Occupant:
        """Attaches a device to a port, as a write to vhci_hcd's attach file does. Raises OSError as the kernel does.

        Takes its own reference to the socket; the caller keeps fd.
        """
        if self._refusals:
            self._refusals -= 1
            raise OSError(errno.EINVAL, "refused by the simulation")
        usb_id = self._impostors.pop(0) if self._impostors else descriptor.usb_id
        occupant = self._occupy(port, descriptor, usb_id)
        for interface, name in drivers_children(usb_id, descriptor.interfaces):
            occupant.children.append(replace(next(self.unused(name)), interface=interface))
        if self._stuck:
            self._stuck -= 1
            occupant.appears_at = float("inf")
        try:
            occupant.let_go = self._refer(port.number, occupant, fd)
        except OSError:
            self._occupants.pop(port.number, None)
            raise
        self.changed.fire()
        return occupant

    def attachment(self, key: DeviceKey, number: int) -> Attachment | None:
        """Returns the port's device as the attachment of key. None unless the device is enumerated and authorised."""
        occupant = self._occupants.get(number)
        row = self.ports()[number]
        if occupant is None or not occupant.authorized or row.local_busid is None:
            return None
        bus = _bus(row.controller, row.hub)
        path = f"/dev/bus/usb/{bus:03d}/{occupant.devnum:03d}"
        own = DeviceNode(path, "usb", False, _USB_MAJOR, (bus - 1) * _DEVICES_PER_BUS + occupant.devnum - 1)
        usb_id, serial = occupant.usb_id, occupant.serial or ""
        nodes = (own, *linked(occupant.present_children(), usb_id, occupant.manufacturer, occupant.model, serial))
        texts = (occupant.manufacturer or None, occupant.model or None)
        by: dict[bool, set[InterfaceClass]] = {True: set(), False: set()}
        for place, interface in enumerate(occupant.known_interfaces):
            by[place not in occupant.withheld].add(interface)
        return Attachment(
            *(key, number, row.local_busid, usb_id, serial or None, nodes, *texts),
            net=self.net.get(usb_id, ()),
            interfaces=tuple(sorted(by[True])),
            withheld=tuple(sorted(by[False])),
        )

    def bring(self, number: int, kinds: Sequence[str]) -> bool | None:
        """Adds child nodes of these kinds to the port's device. Returns None while a kind is missing, else True.

        Adds no kinds without a driver, and none to an identified device. Returns True also if the port is free.
        """
        occupant = self._occupants.get(number)
        if occupant is None:
            return True
        for kind in kinds:
            if not occupant.identified and kind not in self.driverless and kind not in _kinds(occupant):
                occupant.children.append(next(self.unused(kind)))
        return True if _kinds(occupant) >= set(kinds) else None

    def enumerate_anew(self, number: int, usb_id: UsbId | None = None) -> None:
        """Enumerates the port's device again over the same connection, with another id if usb_id is given."""
        occupant, row = self._occupants[number], self.ports()[number]
        bus = _bus(row.controller, row.hub)
        self._devnums[bus] = occupant.devnum = self._devnums[bus] % (_DEVICES_PER_BUS - 1) + 1
        occupant.usb_id = usb_id or occupant.usb_id
        self.changed.fire()

    def unused(self, name: str) -> Iterator[DeviceNode]:
        """Yields the child nodes of this name in children.CHILDREN that no device of this kernel has, by index."""
        used = self._held | {node.path for occupant in self._occupants.values() for node in occupant.children}
        return (node for node in every(name) if node.path not in used)

    def _occupy(self, port: Port, descriptor: Descriptor | None, usb_id: UsbId) -> Occupant:
        bus = _bus(port.controller, port.hub)
        self._devnums[bus] = self._devnums.get(bus, 1) % (_DEVICES_PER_BUS - 1) + 1
        self._generation += 1
        appears_at = self.clock.monotonic() + (self.enumeration_delay if descriptor is not None else 0.0)
        occupant = Occupant(self._generation, descriptor, usb_id, appears_at, self._devnums[bus])
        occupant.interfaces = self.interfaces.get(usb_id, ())
        self._occupants[port.number] = occupant
        for name in self.child_kinds.get(usb_id, ()):
            occupant.children.append(next(self.unused(name)))
        return occupant

    def _refer(self, number: int, occupant: Occupant, fd: int) -> Callable[[], None]:
        def ended() -> None:
            if self._occupants.get(number) is occupant:
                self.free_port(number)

        if fd >= 0:
            occupant.import_from = local_endpoint(fd)
            return _watch(fd, ended)
        memory_socket = self._resolve(fd)
        if memory_socket is None:
            raise OSError(errno.EINVAL, "no such socket")
        reference = memory_socket.dup()
        occupant.import_from = reference.connection.endpoint
        if reference.ended:  # the kernel accepts the socket, and notices its end at once
            reference.close()
            del self._occupants[number]
            return lambda: None
        unsubscribe = reference.on_close(ended)

        def let_go() -> None:
            unsubscribe()
            reference.close()

        return let_go


def _watch(fd: int, ended: Callable[[], None]) -> Callable[[], None]:
    """Keeps a reference to a real socket and calls ended() at its end. Returns a function that drops the reference."""
    sock = socket.socket(fileno=os.dup(fd))
    sock.setblocking(False)
    loop = asyncio.get_running_loop()

    def readable() -> None:
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            ended()

    def let_go() -> None:
        loop.remove_reader(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # as the kernel does: ends the connection despite other references
        sock.close()

    loop.add_reader(sock, readable)
    return let_go


def _bus(controller: int, hub: Hub) -> int:
    return 3 + 2 * controller + (hub == "ss")


def _kinds(occupant: Occupant) -> set[str]:
    return {node.kind for node in occupant.present_children()}
