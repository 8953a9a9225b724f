"""The HostDevices of the real kernel, which work through /sys/bus/usb.

Follows drivers/usb/usbip/stub_main.c and stub_dev.c of Linux 6.12, and tools/usb/usbip: usbip_bind.c, usbip_unbind.c
and libsrc/usbip_host_common.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from usbip_plugin.clock import Clock
from usbip_plugin.errors import BindFailed, HostError, StubMissing, StubNotWritable
from usbip_plugin.exporter.host import MAX_BUS_IDS, STUB, HostDevice, StubStatus
from usbip_plugin.exporter.host_use import in_use
from usbip_plugin.model import Descriptor, InterfaceClass, UsbId
from usbip_plugin.sync import Broadcast
from usbip_plugin.usbip.identify import parse_interfaces
from usbip_plugin.vhci.devices import MAX_DESCRIPTORS, DeviceAttributes, read_attributes, read_nodes, text
from usbip_plugin.vhci.sysfs import Writer, refusal, write_sysfs
from usbip_plugin.vhci.uevents import Uevent, UeventSource

log = logging.getLogger(__name__)

READ_S = 5.0
"""Seconds for reading all devices: milliseconds, unless a device that is being reset keeps its lock in the kernel."""
_PATH_BYTES = 255  # bytes of a device's path that fit into a reply; usbipd cuts it, too
_DEVICE = re.compile(r"[0-9]{1,5}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}")  # a device, not a root hub ("usb1") or interface
_NUMBER = re.compile(r"[0-9]{1,5}")
_SPEEDS = {"1.5": 1, "12": 2, "480": 3}
_SUPER = 5
_DEVICE_DESCRIPTOR_BYTES = 18


@dataclass(frozen=True, slots=True)
class _Strings:
    """What does not change while a device is plugged in. Reading it may wait for the device's lock in the kernel."""

    attributes: DeviceAttributes
    interfaces: tuple[InterfaceClass, ...]


class SysfsHost:
    """The HostDevices that read and write sysfs.

    proc: /proc, where mounts and swap are read.
    write: performs every write to sysfs; takes path and text, blocks, raises OSError.
    """

    def __init__(
        self,
        clock: Clock,
        uevents: UeventSource,
        *,
        sysfs: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        write: Callable[[Path, str], None] = write_sysfs,
    ) -> None:
        self._clock = clock
        self._uevents = uevents
        self._sysfs, self._proc = sysfs, proc
        self._bus = sysfs / "bus/usb"
        self._stub = self._bus / "drivers" / STUB
        self._blocking_write = write
        self._writer = Writer(clock, write)
        self._changed = Broadcast()
        self._strings: dict[str, _Strings] = {}
        self._reading: asyncio.Future[tuple[HostDevice, ...]] | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether this host's kernel has usbip-host."""
        return self._stub.exists()

    def check(self) -> None:
        table = self._stub / "match_busid"
        if not self.is_loaded:
            raise StubMissing(str(self._stub))
        if (cause := refusal(table)) is not None:
            raise StubNotWritable(str(table), cause)

    async def devices(self) -> tuple[HostDevice, ...]:
        if self._reading is None or self._reading.done():  # a thread that hangs is not followed by more of them
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._read_all)
        try:
            async with self._clock.timeout(READ_S):
                return await asyncio.shield(self._reading)
        except TimeoutError:
            raise HostError(
                f"the USB devices in {self._bus} cannot be read within {READ_S:g} s; unplug a device that hangs"
            ) from None

    def _read_all(self) -> tuple[HostDevice, ...]:
        try:
            names = sorted(filter(_DEVICE.fullmatch, _names(self._bus / "devices")))
        except OSError:
            names = []
        for gone in self._strings.keys() - set(names):
            del self._strings[gone]
        return tuple(device for name in names if (device := self._read(name)) is not None)

    def _read(self, busid: str) -> HostDevice | None:
        descriptor = self.descriptor(busid)
        if descriptor is None:
            return None
        strings = self._strings.get(busid)
        if strings is None or strings.attributes.devnum != descriptor.devnum:
            strings = _read_strings(self._path(busid))
            if strings is None:
                return None
            self._strings[busid] = strings
        attributes = strings.attributes
        return HostDevice(
            replace(descriptor, interfaces=strings.interfaces), self._driver(busid), attributes.serial, attributes.model
        )

    def descriptor(self, busid: str) -> Descriptor | None:
        if not _DEVICE.fullmatch(busid):
            return None
        path = self._path(busid)
        real = os.path.realpath(path)
        if "/vhci_hcd." in real:  # it is imported from elsewhere; usbip-host refuses it (stub_probe)
            return None
        try:
            configuration, interfaces = _configuration(busid, _names(path))
            return Descriptor(
                busid=busid,
                path=os.fsencode(real)[:_PATH_BYTES].decode(errors="ignore"),
                busnum=int(busid.partition("-")[0]),
                devnum=_number(text(path / "devnum")),
                speed=_SPEEDS.get(text(path / "speed"), _SUPER),
                usb_id=UsbId(_hex(path / "idVendor"), _hex(path / "idProduct")),
                bcd_device=_hex(path / "bcdDevice"),
                device_class=_hex(path / "bDeviceClass"),
                device_subclass=_hex(path / "bDeviceSubClass"),
                device_protocol=_hex(path / "bDeviceProtocol"),
                configuration=configuration,
                num_configurations=_number(text(path / "bNumConfigurations")),
                num_interfaces=interfaces,
            )
        except (OSError, ValueError):
            return None

    def _path(self, busid: str) -> Path:
        if not _DEVICE.fullmatch(busid):
            raise HostError(f"{busid!r} is not a bus ID of this host")
        return self._bus / "devices" / busid

    def _driver(self, busid: str) -> str:
        try:
            return (self._path(busid) / "driver").readlink().name
        except OSError:
            return ""

    def status(self, busid: str) -> StubStatus | None:
        if not _DEVICE.fullmatch(busid):
            return None
        try:
            return StubStatus(int(text(self._path(busid) / "usbip_status")))
        except OSError:
            return None
        except ValueError:
            return StubStatus.ERROR

    async def bind(self, busid: str) -> None:
        self.check()
        path, driver = self._path(busid), self._driver(busid)
        if driver == STUB:
            return
        if (use := await asyncio.to_thread(self._in_use, path)) is not None:
            raise BindFailed(busid, f"{use}, or take the device out of export")
        table = self._stub / "match_busid"
        try:
            await self._write(busid, table, f"add {busid}")
        except OSError as error:
            raise self._failed(busid, error) from error
        try:
            if driver:
                await self._write(busid, self._bus / "drivers" / driver / "unbind", busid)
            await self._write(busid, self._stub / "bind", busid)
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                cause = f"driver {driver or STUB} does not release it; stop the programs that use it, or replug it"
                raise BindFailed(busid, cause, stuck=True) from error
            with contextlib.suppress(OSError):
                await self._write(busid, table, f"del {busid}")
                await self._write(busid, self._bus / "drivers_probe", busid)
            raise self._failed(busid, error) from error

    def _in_use(self, path: Path) -> str | None:
        attributes = read_attributes(path)
        return None if attributes is None else in_use(read_nodes(path, attributes), self._sysfs, self._proc)

    async def unbind(self, busid: str) -> None:
        try:
            await self._write(busid, self._stub / "unbind", busid)
            await self._write(busid, self._stub / "match_busid", f"del {busid}")
            await self._write(busid, self._stub / "rebind", busid)
        except OSError as error:
            raise self._failed(busid, error) from error

    async def export(self, busid: str, fd: int) -> None:
        # A duplicate: the caller of a cancelled export may close fd while the write is still under way.
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        path = self._path(busid) / "usbip_sockfd"
        undo = functools.partial(self._end_late, path)
        try:
            await self._writer.write(path, f"{own}\n", device=busid, finish=functools.partial(os.close, own), undo=undo)
        except OSError as error:
            raise self._failed(busid, error) from error

    def _end_late(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # the connection has ended by itself
            self._blocking_write(path, "-1\n")

    async def end(self, busid: str) -> None:
        path = self._path(busid) / "usbip_sockfd"
        try:
            await self._write(busid, path, "-1\n")
        except OSError as error:
            # EINVAL: no connection has it. The others: it is not bound, or unplugged.
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
                raise self._failed(busid, error) from error

    async def _write(self, busid: str, path: Path, value: str) -> None:
        await self._writer.write(path, value, device=busid)

    def _failed(self, busid: str, error: OSError) -> HostError:
        match error.errno:
            case errno.EACCES | errno.EPERM | errno.EROFS as code:
                return StubNotWritable(error.filename or str(self._stub), os.strerror(code))
            case errno.ENOMEM:  # of match_busid: its table is full
                cure = "select fewer; bus IDs of unplugged devices count until the module is loaded again"
                return BindFailed(busid, f"usbip-host takes at most {MAX_BUS_IDS} bus IDs; {cure}")
            case code:
                cause = f"the kernel refused: {error.strerror or error}; see dmesg"
                return BindFailed(busid, cause, stuck=code == errno.ETIMEDOUT)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._changed.subscribe(callback)

    async def run(self) -> None:
        await self._uevents.run(self._on_uevent)

    def _on_uevent(self, event: Uevent | None) -> None:
        if event is None or (event.fields.get("SUBSYSTEM") == "usb" and not event.concerns_vhci):
            self._changed.fire()


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _configuration(busid: str, names: list[str]) -> tuple[int, int]:
    """Returns the number of the active configuration and how many interfaces it has; 0, 0 without configuration.

    From the names of the interfaces, BUSID:CONFIGURATION.INTERFACE: the kernel's attributes wait for the device's lock.
    """
    interfaces = [name.removeprefix(f"{busid}:").partition(".")[0] for name in names if name.startswith(f"{busid}:")]
    return (_number(interfaces[0]), len(interfaces)) if interfaces else (0, 0)


def _read_strings(path: Path) -> _Strings | None:
    attributes = read_attributes(path)
    try:
        with (path / "descriptors").open("rb") as file:
            raw = file.read(MAX_DESCRIPTORS)[_DEVICE_DESCRIPTOR_BYTES:]
    except OSError:
        return None
    first = raw[: int.from_bytes(raw[2:4], "little")]  # wTotalLength of the first configuration
    return None if attributes is None else _Strings(attributes, parse_interfaces(first))


def _number(digits: str) -> int:
    if not _NUMBER.fullmatch(digits):
        raise ValueError(digits[:80])
    return int(digits)


def _hex(path: Path) -> int:
    value = int(text(path), 16)
    if not 0 <= value <= 0xFFFF:
        raise ValueError(f"{value:x}")
    return value
