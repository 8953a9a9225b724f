"""The rig of the VhciDriver contract on the real kernel, with usbipd's devices imported over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import termios
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.gadget import CLIENT_DRIVERS, gadget
from tests.rigs.usbipd import RealUsbipd, eventually
from usbip_plugin.attach.pipeline import import_busy
from usbip_plugin.clock import SystemClock
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.client import Imported, TcpUsbipClient
from usbip_plugin.vhci.hubs import DEVICES, INTERFACES
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.sysfs import STALL_S, PortStatus
from usbip_plugin.vhci.uevents import NetlinkUevents

TWINS = ("SERIAL1", "SERIAL2")
DISK, DISK_SUPER, KEYBOARD = "DISKHS", "DISKSS", "KEYBOARD"
MODEM = "MODEM"
"""Serial number of a gadget, which is there once it was imported."""
ALL = (*TWINS, DISK, DISK_SUPER, KEYBOARD)
LIMIT_S = 10.0
CLEAN_S = 90.0
"""Seconds to detach hundreds of ports at once in an emulated guest."""


@contextlib.contextmanager
def raw_tty(path: str) -> Iterator[int]:
    """Yields a raw, non-blocking file descriptor of the tty."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield fd
    finally:
        os.close(fd)


def hubs_authorize(*names: str) -> bool:
    """Returns whether all root hubs of vhci authorise by default, as the kernel begins.

    names: DEVICES or INTERFACES; none for both.
    """
    folders = list(Path("/sys/devices/platform").glob("vhci_hcd.*/usb[0-9]*"))
    files = [folder / name for folder in folders for name in names or (DEVICES, INTERFACES)]
    return bool(files) and all(file.read_text() == "1\n" for file in files)


@dataclass(frozen=True)
class Connection:
    """An import with the attributes that the contract needs."""

    imported: Imported

    @property
    def key(self) -> DeviceKey:
        return self.imported.key

    @property
    def descriptor(self) -> Descriptor:
        return self.imported.descriptor

    def fileno(self) -> int:
        return self.imported.sock.fileno()

    def close(self) -> None:
        self.imported.close()


class KernelRig:
    """Imports and drivers of one test. group: owns the drivers' run()."""

    def __init__(self, usbipd: RealUsbipd, group: asyncio.TaskGroup) -> None:
        self.usbipd = usbipd
        self.clock = SystemClock()
        self.client = TcpUsbipClient(self.clock)
        self._group = group
        self._tasks: list[asyncio.Task[None]] = []
        self._silent: list[socket.socket] = []
        self._gadgets = contextlib.ExitStack()
        self._has_modem = False

    def plugin(self) -> SysfsVhci:
        driver = SysfsVhci(self.clock, NetlinkUevents(self.clock))
        self._tasks.append(self._group.create_task(driver.run()))
        return driver

    async def import_serial(self, serial: str) -> Connection:
        """Imports the device with this serial number."""
        key = DeviceKey(self.usbipd.key, self.usbipd.busid(serial))
        async for attempt in import_busy(self.clock, random.Random(1)):
            with attempt:
                return Connection(await self.client.import_device(key, timeout=LIMIT_S))
        raise AssertionError("unreachable")

    async def import_twin(self, number: int) -> Connection:
        return await self.import_serial(TWINS[number])

    async def import_super(self) -> Connection:
        return await self.import_serial(DISK_SUPER)

    async def import_keyboard(self) -> Connection:
        return await self.import_serial(KEYBOARD)

    async def import_modem(self) -> Connection:
        """Imports a gadget with the functions of a modem and of a keyboard."""
        if not self._has_modem:
            self._has_modem = True
            self.usbipd.load_modules(CLIENT_DRIVERS)
            self._gadgets.enter_context(gadget(self.usbipd, MODEM, "acm", "hid")).plug()
            self.usbipd.bind(self.usbipd.busid(MODEM))
        return await self.import_serial(MODEM)

    async def import_stuck(self) -> Connection:
        near, far = socket.socketpair()
        self._silent.append(near)
        key = DeviceKey(ServerKey("192.0.2.1"), "9-9")
        descriptor = Descriptor("9-9", "/sys/x", 9, 9, 3, UsbId(1, 1), 0, 0, 0, 0, 1, 1, 1)
        return Connection(Imported(key, descriptor, far))

    async def server_ends(self, imported: object) -> None:
        assert isinstance(imported, Connection)
        self.usbipd.drop(imported.key.busid)

    async def is_free_on_server(self, key: DeviceKey) -> bool:
        try:
            eventually(lambda: self.usbipd.is_free(key.busid), "free", 0.5)
        except AssertionError:
            return False
        return True

    async def fill(self, hub: str) -> None:
        driver = self.plugin()
        free = [port for port in await driver.ports() if port.hub == hub and port.status is PortStatus.NULL]
        for _ in free:
            one = await self.import_stuck()
            await driver.attach(one.key, one.descriptor, one.fileno())
            one.close()
            await driver.forget(one.key)  # as another program's: an agent would detach what an earlier plugin has left

    async def clean(self) -> None:
        """Detaches every port."""
        driver = self.plugin()
        taken = [port.number for port in await driver.ports() if port.status is not PortStatus.NULL]
        await asyncio.gather(*(driver.detach(number, timeout=CLEAN_S) for number in taken))
        if self._silent:
            # the plugins of the next test have no PortCooldown (vhci/sysfs.py) for the stalled hub
            await asyncio.sleep(STALL_S)
        for end in self._silent:
            end.close()
        self._silent.clear()

    async def close(self) -> None:
        await self.clean()
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks)
        self._gadgets.close()
