"""What stands on the ports of a simulated vhci_hcd. driver.py is one node's view of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from usbip_plugin.clock import Clock
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, DeviceNode, UsbId
from usbip_plugin.sync import Bell
from usbip_plugin.vhci.sysfs import Hub, Port, PortStatus
from usbip_sim.kernel.children import every, linked
from usbip_sim.sockets import MemorySocket

FOREIGN_DEVID = 0xFFFF
_USB_MAJOR = 189
_DEVICES_PER_BUS = 128


@dataclass(slots=True)
class Occupant:
    """What stands on a port. appears_at: kernel clock, from when on the device is enumerated (infinity: never).

    serial: None where the simulation does not know it; then whatever is expected is believed. asked: the device has
    said itself who it is, and its children are what follows from that.
    """

    number: int
    descriptor: Descriptor | None
    usb_id: UsbId
    appears_at: float
    devnum: int
    authorized: bool = False
    serial: str | None = None
    manufacturer: str = ""
    model: str = ""
    asked: bool = False
    children: list[DeviceNode] = field(default_factory=list)
    let_go: Callable[[], None] = lambda: None


class SimulatedKernel:
    """Ports, devices and sockets of one kernel. What happens to it in real life are its methods."""

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
        """resolve finds the MemorySocket behind a negative fd (SocketTable.resolve); delays are in seconds.

        serial_of: the serial number a device is to tell when it is attached; what `serials` says by default.
        """
        self.clock = clock
        self.enumeration_delay = enumeration_delay
        self.loaded = True
        self.detaching_hangs = False
        self.records_failing: int | None = None  # the errno of each write of a port record
        self.bell = Bell()
        self.records: dict[str, dict[int, DeviceKey]] = {}  # of each node; kind's nodes have each their own /run
        self.marks: dict[str, dict[int, int]] = {}  # of each record: the number of the occupant it is of
        self.serials: dict[DeviceKey, str] = {}
        self.serial_of = serial_of or self.serials.get
        self.child_kinds: dict[
            UsbId, tuple[str, ...]
        ] = {}  # child nodes that devices of this id bring, as in children.py
        self.net: dict[UsbId, tuple[str, ...]] = {}  # network interfaces that devices of this id bring
        self.driverless: set[str] = set()  # kinds for which no driver is loaded: who asks for them waits in vain
        self._per_hub = ports_per_hub
        self._controllers = controllers
        self._resolve = resolve
        self._occupants: dict[int, Occupant] = {}
        self._generation = 0
        self._devnums: dict[int, int] = {}
        self._held: set[str] = set()
        self._stuck = 0
        self._refusals = 0
        self._impostors: list[UsbId] = []

    # Faults.

    def stuck_next(self, times: int = 1) -> None:
        """The next attachments stay in status 005."""
        self._stuck += times

    def refuse_next(self, times: int = 1) -> None:
        """The next attach writes fail."""
        self._refusals += times

    def impostor_next(self, usb_id: UsbId) -> None:
        """The next device turns out to have another vendor:product than its server said."""
        self._impostors.append(usb_id)

    def fill_ports(self, hub: Hub | None = None, leave: int = 0) -> tuple[int, ...]:
        """Somebody else attaches devices to all free ports (of one hub) but `leave`; returns their numbers."""
        free = [port for port in self.ports() if port.status is PortStatus.NULL and hub in (None, port.hub)]
        taken = free[: len(free) - leave]
        for port in taken:
            self._occupy(port, None, UsbId(FOREIGN_DEVID, FOREIGN_DEVID))
        self.bell.ring()
        return tuple(port.number for port in taken)

    def hold(self, path: str) -> None:
        """Somebody keeps a child node open, whose device may go: its path is given to no other until let_go."""
        self._held.add(path)

    def let_go(self, path: str) -> None:
        self._held.discard(path)

    def free_port(self, number: int) -> None:
        """Somebody detaches it, or its connection ends. Nothing if it is free."""
        occupant = self._occupants.pop(number, None)
        if occupant is not None:
            occupant.let_go()
            self.bell.ring()

    def reboot(self) -> None:
        """Everything attached is gone, and so are the records in /run."""
        for number in tuple(self._occupants):
            self.free_port(number)
        self.records.clear()
        self.marks.clear()
        self._devnums.clear()

    # What drivers see.

    def ports(self) -> tuple[Port, ...]:
        """All ports in the kernel's order: per controller the hs rows, then the ss rows."""
        rows: list[Port] = []
        for controller in range(self._controllers):
            hubs: tuple[Hub, Hub] = ("hs", "ss")
            for hub in hubs:
                for root_port in range(1, self._per_hub + 1):
                    rows.append(self._row(len(rows), hub, controller, root_port))
        return tuple(rows)

    def _row(self, number: int, hub: Hub, controller: int, root_port: int) -> Port:
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
        """The attach write. OSError as the kernel; the socket is referenced, not taken over."""
        if self._refusals:
            self._refusals -= 1
            raise OSError(errno.EINVAL, "refused by the simulation")
        usb_id = self._impostors.pop(0) if self._impostors else descriptor.usb_id
        occupant = self._occupy(port, descriptor, usb_id)
        if self._stuck:
            self._stuck -= 1
            occupant.appears_at = float("inf")
        try:
            occupant.let_go = self._refer(port.number, occupant, fd)
        except OSError:
            self._occupants.pop(port.number, None)
            raise
        self.bell.ring()
        return occupant

    def attachment(self, key: DeviceKey, number: int) -> Attachment | None:
        """What stands on a port, as key's; None unless it is enumerated and authorised."""
        occupant = self._occupants.get(number)
        row = self.ports()[number]
        if occupant is None or not occupant.authorized or row.local_busid is None:
            return None
        bus = _bus(row.controller, row.hub)
        path = f"/dev/bus/usb/{bus:03d}/{occupant.devnum:03d}"
        own = DeviceNode(path, "usb", False, _USB_MAJOR, (bus - 1) * _DEVICES_PER_BUS + occupant.devnum - 1)
        usb_id, serial = occupant.usb_id, occupant.serial or ""
        nodes = (own, *linked(occupant.children, usb_id, occupant.manufacturer, occupant.model, serial))
        texts = (occupant.manufacturer or None, occupant.model or None)
        return Attachment(
            key, number, row.local_busid, usb_id, serial or None, nodes, *texts, net=self.net.get(usb_id, ())
        )

    def bring(self, number: int, kinds: Sequence[str]) -> bool | None:
        """What stands on the port has nodes of these kinds from now on; None while one of them has no driver.

        A device that was asked who it is has what it has.
        """
        occupant = self._occupants.get(number)
        if occupant is None:
            return True
        for kind in kinds:
            if not occupant.asked and kind not in self.driverless and kind not in _kinds(occupant):
                occupant.children.append(next(self.unused(kind)))
        return True if _kinds(occupant) >= set(kinds) else None

    def enumerate_anew(self, number: int, usb_id: UsbId | None = None) -> None:
        """What stands on the port leaves the bus and comes back over the same connection, as something else perhaps."""
        occupant, row = self._occupants[number], self.ports()[number]
        bus = _bus(row.controller, row.hub)
        self._devnums[bus] = occupant.devnum = self._devnums[bus] % (_DEVICES_PER_BUS - 1) + 1
        occupant.usb_id = usb_id or occupant.usb_id
        self.bell.ring()

    def unused(self, name: str) -> Iterator[DeviceNode]:
        """The child nodes of this name in children.py that no device here has, by index."""
        used = self._held | {node.path for occupant in self._occupants.values() for node in occupant.children}
        return (node for node in every(name) if node.path not in used)

    def _occupy(self, port: Port, descriptor: Descriptor | None, usb_id: UsbId) -> Occupant:
        bus = _bus(port.controller, port.hub)
        self._devnums[bus] = self._devnums.get(bus, 1) % (_DEVICES_PER_BUS - 1) + 1
        self._generation += 1
        appears_at = self.clock.monotonic() + (self.enumeration_delay if descriptor is not None else 0.0)
        occupant = Occupant(self._generation, descriptor, usb_id, appears_at, self._devnums[bus])
        self._occupants[port.number] = occupant
        for name in self.child_kinds.get(usb_id, ()):
            occupant.children.append(next(self.unused(name)))
        return occupant

    def _refer(self, number: int, occupant: Occupant, fd: int) -> Callable[[], None]:
        def ended() -> None:
            if self._occupants.get(number) is occupant:
                self.free_port(number)

        if fd >= 0:
            return _watch(fd, ended)
        memory_socket = self._resolve(fd)
        if memory_socket is None:
            raise OSError(errno.EINVAL, "no such socket")
        reference = memory_socket.dup()
        if reference.ended:  # the kernel takes it, and finds out at once
            reference.close()
            del self._occupants[number]
            return lambda: None
        unsubscribe = reference.on_close(ended)

        def let_go() -> None:
            unsubscribe()
            reference.close()

        return let_go


def _watch(fd: int, ended: Callable[[], None]) -> Callable[[], None]:
    """Keep a reference to a real socket and notice its end. Returns what lets go of it."""
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
            sock.shutdown(socket.SHUT_RDWR)  # as the kernel does: other references do not keep it up
        sock.close()

    loop.add_reader(sock, readable)
    return let_go


def _bus(controller: int, hub: Hub) -> int:
    return 3 + 2 * controller + (hub == "ss")


def _kinds(occupant: Occupant) -> set[str]:
    return {node.kind for node in occupant.children}
