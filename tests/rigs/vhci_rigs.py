"""Rigs for the contract of a VhciDriver: the simulated kernel, also as a service, and SysfsVhci on a fake sysfs."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.rigs.vhci_contract import BOOT_KEYBOARD, Imported
from tests.rigs.vhci_fake_sysfs import FakeSysfs
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.model import Descriptor, DeviceKey, InterfaceClass, ServerKey, UsbId
from usbip_plugin.vhci.driver import VhciDriver
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.uevents import Uevent
from usbip_sim.kernel.device_nodes import DeviceNodes
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kernel.remote import RemoteVhci
from usbip_sim.kernel.service import KernelService
from usbip_sim.sockets import MemorySocket, SocketTable

SERVER = ServerKey("192.0.2.1")
STICK = UsbId(0x0403, 0x6001)


def descriptor(busid: str, devnum: int, speed: int, usb_id: UsbId = STICK) -> Descriptor:
    return Descriptor(busid, f"/sys/devices/x/{busid}", 1, devnum, speed, usb_id, 0x100, 0, 0, 0, 1, 1, 1)


TWINS = (descriptor("1-1", 2, 2), descriptor("1-2", 3, 2))
SUPER = descriptor("2-1", 4, 5, UsbId(0x46F4, 1))
KEYBOARD = replace(descriptor("1-3", 5, 1, UsbId(0x046D, 0xC31C)), interfaces=(BOOT_KEYBOARD,))
MODEM = replace(
    descriptor("1-4", 6, 2, UsbId(0x1D6B, 0x0104)),
    interfaces=(InterfaceClass(0x02, 2, 1), InterfaceClass(0x0A, 0, 0), BOOT_KEYBOARD),
)
STUCK = descriptor("1-9", 9, 3)
DEVICES = {one.devid: one for one in (*TWINS, SUPER, KEYBOARD, MODEM, STUCK)}


@dataclass
class Connection:
    """An import. sock: the end of the client. end: ends it on the server. free: whether the device is free there."""

    key: DeviceKey
    descriptor: Descriptor
    sock: socket.socket | MemorySocket
    end: Callable[[], None]
    free: Callable[[], bool]

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()


class SocketServer:
    """A server with its ends of socketpairs. A device is free when its connection has ended."""

    def __init__(self) -> None:
        self.ends: dict[DeviceKey, socket.socket] = {}

    def connect(self, device: Descriptor) -> Connection:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        key = DeviceKey(SERVER, device.busid)
        if key in self.ends:
            self.ends[key].close()
        self.ends[key] = ours
        return Connection(key, device, theirs, ours.close, lambda: self.free(key))

    def free(self, key: DeviceKey) -> bool:
        try:
            return self.ends[key].recv(1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        for end in self.ends.values():
            end.close()


class MemoryServer:
    """A server with in-memory sockets."""

    def __init__(self) -> None:
        self.table = SocketTable()
        self.ended: dict[DeviceKey, MemorySocket] = {}

    def connect(self, device: Descriptor) -> Connection:
        sock = self.table.open()
        key = DeviceKey(SERVER, device.busid)
        self.ended[key] = sock
        return Connection(key, device, sock, sock.server_end, lambda: sock.ended)

    def free(self, key: DeviceKey) -> bool:
        return self.ended[key].ended

    def close(self) -> None:
        assert len(self.table) == 0, "references to connections leak"


class BaseRig:
    """A rig with a server."""

    def __init__(self, server: SocketServer | MemoryServer) -> None:
        self.server = server

    async def import_twin(self, number: int) -> Connection:
        return self.server.connect(TWINS[number])

    async def import_super(self) -> Connection:
        return self.server.connect(SUPER)

    async def import_keyboard(self) -> Connection:
        return self.server.connect(KEYBOARD)

    async def import_modem(self) -> Connection:
        return self.server.connect(MODEM)

    async def is_free_on_server(self, key: DeviceKey) -> bool:
        return self.server.free(key)


class SimRig(BaseRig):
    """A rig for SimulatedVhci."""

    def __init__(self, server: SocketServer | MemoryServer, delay: float) -> None:
        super().__init__(server)
        self.clock = SystemClock()
        resolve = server.table.resolve if isinstance(server, MemoryServer) else lambda _token: None
        self.kernel = SimulatedKernel(
            self.clock, controllers=2, ports_per_hub=3, enumeration_delay=delay, resolve=resolve
        )

    def plugin(self) -> VhciDriver:
        return SimulatedVhci(self.kernel)

    async def import_stuck(self) -> Connection:
        self.kernel.stuck_next()
        return self.server.connect(STUCK)

    async def server_ends(self, imported: Imported) -> None:
        assert isinstance(imported, Connection)
        imported.end()

    def drivers_make(self, *kinds: str) -> None:
        self.kernel.child_kinds[STICK] = kinds

    async def fill(self, hub: str) -> None:
        self.kernel.fill_ports("ss" if hub == "ss" else "hs")

    def close(self) -> None:
        self.kernel.reboot()
        self.server.close()


class RemoteRig(SimRig):
    """A rig for RemoteVhci, with the simulated kernel as a service. group: owns the service and the drivers' run()."""

    def __init__(self, tmp_path: Path, group: asyncio.TaskGroup, delay: float) -> None:
        super().__init__(SocketServer(), delay)
        self.path = tmp_path / "kernel.sock"
        self.devices = tmp_path / "dev"
        self.group = group
        self.tasks: list[asyncio.Task[None]] = []

    def boot(self) -> asyncio.Task[None]:
        """Starts the service on the socket. The caller cancels the task for a crash."""
        nodes = DeviceNodes(self.devices, self.path.parent / "nodes", Path.touch, Path.is_file)
        task = self.group.create_task(KernelService(self.kernel, self.path, nodes).run())
        self.tasks.append(task)
        return task

    def plugin(self) -> RemoteVhci:
        driver = RemoteVhci(self.path, self.clock, random.Random(1))
        self.tasks.append(self.group.create_task(driver.run()))
        return driver

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        super().close()


class FakeUevents:
    """Uevents of a fake sysfs, from any thread."""

    def __init__(self, sysfs: FakeSysfs) -> None:
        self.sysfs = sysfs
        self.listeners: list[Callable[[Uevent | None], None]] = []
        self.loop = asyncio.get_running_loop()
        sysfs.heard = self.deliver_soon

    def deliver_soon(self, event: Uevent | None) -> None:
        self.loop.call_soon_threadsafe(lambda: [listener(event) for listener in self.listeners])

    async def run(self, deliver: Callable[[Uevent | None], None]) -> None:
        self.listeners.append(deliver)
        try:
            await asyncio.Event().wait()
        finally:
            self.listeners.remove(deliver)

    def problem(self) -> str | None:
        return None


class FakeSysfsRig(BaseRig):
    """A rig for SysfsVhci on a fake sysfs. group: owns the drivers' run()."""

    def __init__(self, tmp_path: Path, group: asyncio.TaskGroup) -> None:
        super().__init__(SocketServer())
        self.sysfs = FakeSysfs(tmp_path / "sys", dict(DEVICES), stuck={STUCK.devid})
        self.records = tmp_path / "run/vhci_hcd"
        self.records.parent.mkdir()
        self.uevents = FakeUevents(self.sysfs)
        self.group = group
        self.tasks: list[asyncio.Task[None]] = []

    def plugin(self, *, clock: Clock | None = None) -> SysfsVhci:
        driver = SysfsVhci(
            clock or SystemClock(),
            self.uevents,
            sysfs=self.sysfs.root,
            records=self.records,
            write=self.sysfs.write,
        )
        self.tasks.append(self.group.create_task(driver.run()))
        return driver

    async def import_stuck(self) -> Connection:
        return self.server.connect(STUCK)

    async def server_ends(self, imported: Imported) -> None:
        assert isinstance(imported, Connection)
        imported.end()
        for row in self.sysfs.rows:
            if row.status == 6 and row.devid == imported.descriptor.devid:
                self.sysfs.free(row.number)

    def drivers_make(self, *kinds: str) -> None:
        self.sysfs.child_kinds[STICK] = kinds

    async def fill(self, hub: str) -> None:
        for row in self.sysfs.rows:
            if row.hub == hub and row.status == 4:
                self.sysfs.take(row.number)

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.sysfs.close()
        self.server.close()
