"""A host with virtual USB devices and a usbip-host: the double of SysfsHost. Serves the sockets that it is given."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from usbip_plugin.clock import Clock
from usbip_plugin.errors import BindFailed, HostError, StubMissing, StubNotWritable
from usbip_plugin.exporter.host import MAX_BUS_IDS, STUB, HostDevice, StubStatus
from usbip_plugin.model import HUB_CLASS, Descriptor
from usbip_plugin.sync import Broadcast
from usbip_plugin.usbip import wire
from usbip_sim.server.server import RESET_TIME
from usbip_sim.server.usbdevice import Transfers, VirtualDevice

_DEVNUMS = 127


@dataclass(slots=True)
class _Plugged:
    device: VirtualDevice
    devnum: int
    is_hub: bool
    driver: str = "usb"
    configured: bool = True
    broken: bool = False
    held: bool = False
    connection: _Connection | None = None
    free_at: float = float("-inf")


class SimulatedHost:
    """A host whose devices are plugged in and unplugged by a test. For one event loop.

    reset_time: seconds that a device stays in use after its connection has ended.
    loaded, writable: whether the kernel has usbip-host, and this process may write to its files.
    in_use: by bus ID, why the host itself needs the device. stuck: bus IDs whose driver does not let go.
    settled: fires when a device has become available after a connection.
    unreadable: why the devices cannot be read now, "" if they can.
    """

    def __init__(self, devices: Iterable[VirtualDevice], clock: Clock, reset_time: float = RESET_TIME) -> None:
        self._clock, self._reset_time = clock, reset_time
        self._plugged: dict[str, _Plugged] = {}
        self._table: set[str] = set()
        self._devnum = 1
        self._changed = Broadcast()
        self.settled = Broadcast()
        self.loaded = self.writable = True
        self.in_use: dict[str, str] = {}
        self.stuck: set[str] = set()
        self.unreadable = ""
        for device in devices:
            self.plug(device)

    def plug(self, device: VirtualDevice, *, is_hub: bool = False) -> None:
        """Plugs a device in. Raises ValueError if its bus ID is taken."""
        if device.busid in self._plugged:
            raise ValueError(f"{device.busid} is already plugged in")
        self._devnum = self._devnum % _DEVNUMS + 1
        self._plugged[device.busid] = _Plugged(device, self._devnum, is_hub)
        self._changed.fire()

    def unplug(self, busid: str) -> None:
        """Unplugs a device, which ends its connection. Raises KeyError if there is no such device."""
        plugged = self._plugged.pop(busid)
        if plugged.connection is not None:
            plugged.connection.end()
        self._changed.fire()

    def close(self) -> None:
        """Ends every connection, as the end of the kernel does."""
        for plugged in self._plugged.values():
            if plugged.connection is not None:
                plugged.connection.end()

    def check(self) -> None:
        if not self.loaded:
            raise StubMissing(f"/sys/bus/usb/drivers/{STUB}")
        if not self.writable:
            raise StubNotWritable(f"/sys/bus/usb/drivers/{STUB}/match_busid", "Permission denied")

    async def devices(self) -> tuple[HostDevice, ...]:
        if self.unreadable:
            raise HostError(self.unreadable)
        return tuple(self._device(plugged) for _, plugged in sorted(self._plugged.items()))

    def hold(self, busid: str) -> None:
        """Makes another program export the device, until let_go()."""
        self._plugged[busid].held = True

    def let_go(self, busid: str) -> None:
        self._plugged[busid].held = False

    def break_reset(self, busid: str) -> None:
        """Makes the device unusable, as a reset that fails."""
        self._plugged[busid].broken = True

    def _device(self, plugged: _Plugged) -> HostDevice:
        device = plugged.device
        interfaces = device.descriptor(configured=True).interfaces
        descriptor = replace(self._descriptor(plugged), interfaces=interfaces)
        return HostDevice(descriptor, plugged.driver, device.serial or None, device.product or None)

    def descriptor(self, busid: str) -> Descriptor | None:
        plugged = self._plugged.get(busid)
        return None if plugged is None else self._descriptor(plugged)

    def _descriptor(self, plugged: _Plugged) -> Descriptor:
        descriptor = plugged.device.descriptor(plugged.configured)
        device_class = HUB_CLASS if plugged.is_hub else descriptor.device_class
        return replace(descriptor, devnum=plugged.devnum, device_class=device_class, interfaces=())

    def status(self, busid: str) -> StubStatus | None:
        plugged = self._plugged.get(busid)
        if plugged is None or plugged.driver != STUB:
            return None
        if plugged.held or plugged.connection is not None or self._clock.monotonic() < plugged.free_at:
            return StubStatus.USED
        return StubStatus.ERROR if plugged.broken else StubStatus.AVAILABLE

    async def bind(self, busid: str) -> None:
        self.check()
        plugged = self._bus(busid)
        if plugged.driver == STUB:
            return
        if busid in self.in_use:
            raise BindFailed(busid, self.in_use[busid])
        if busid not in self._table and len(self._table) >= MAX_BUS_IDS:
            raise BindFailed(busid, f"usbip-host takes at most {MAX_BUS_IDS} bus IDs")
        self._table.add(busid)
        if busid in self.stuck:
            raise BindFailed(busid, f"driver {plugged.driver} does not release it", stuck=True)
        if plugged.is_hub:
            raise BindFailed(busid, "the kernel refused: No such device")
        plugged.driver, plugged.configured, plugged.broken = STUB, False, False
        self._changed.fire()

    async def unbind(self, busid: str) -> None:
        self.check()
        plugged = self._bus(busid)
        if plugged.driver != STUB:
            raise BindFailed(busid, "the kernel refused: No such device")
        if plugged.connection is not None:
            plugged.connection.end()
        self._table.discard(busid)
        plugged.driver, plugged.configured = "usb", True
        self._changed.fire()

    def _bus(self, busid: str) -> _Plugged:
        if busid not in self._plugged:
            raise BindFailed(busid, "the kernel refused: No such device")
        return self._plugged[busid]

    async def export(self, busid: str, fd: int) -> None:
        plugged = self._bus(busid)
        if self.status(busid) is not StubStatus.AVAILABLE:
            raise BindFailed(busid, "the kernel refused: Invalid argument")
        sock = socket.socket(fileno=os.dup(fd))
        sock.setblocking(False)
        connection = plugged.connection = _Connection(plugged, lambda: self._lost(plugged))
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        except BaseException:
            sock.close()
            plugged.connection = None
            raise

    def _lost(self, plugged: _Plugged) -> None:
        plugged.connection = None
        plugged.free_at = self._clock.monotonic() + self._reset_time
        asyncio.get_running_loop().call_later(self._reset_time, self.settled.fire)

    async def end(self, busid: str) -> None:
        plugged = self._plugged.get(busid)
        if plugged is not None:
            plugged.held = False
            if plugged.connection is not None:
                plugged.connection.end()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._changed.subscribe(callback)

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()


class _Connection(asyncio.Protocol):
    """A connection that usbip-host serves: answers the commands of the client's kernel."""

    def __init__(self, plugged: _Plugged, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()

        def configure(value: int) -> None:
            plugged.configured = value > 0

        device = replace(plugged.device, configured=plugged.configured)
        self._steps = Transfers(device, device.usb_id, self._write, configure).run()
        self._need = next(self._steps)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"expected a stream transport, got {transport!r}")
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= self._need:
            piece = bytes(self._received[: self._need])
            del self._received[: self._need]
            try:
                self._need = self._steps.send(piece)
            except (StopIteration, wire.ProtocolViolation):
                self.end()
                return

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's interface)
        self._transport = None
        self._on_lost()

    def end(self) -> None:
        """Ends the connection, also for others who have the same socket open (kernel_sock_shutdown)."""
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the client has ended it
            sock.shutdown(socket.SHUT_RDWR)
        self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
