"""Exported devices of a USB/IP server and their importers: the rules of usbipd and usbip-host, without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from usbip_plugin.clock import Clock
from usbip_plugin.model import Descriptor, UsbId
from usbip_plugin.usbip import wire
from usbip_sim.server.usbdevice import VirtualDevice

_DEVNUMS = 127
SILENT = -1
"""Status in ExportTable.refusals for an IMPORT that is not answered."""


class Importer(Protocol):
    """Connection to the server that may have imported a device. end: ends it from the server's side."""

    def end(self) -> None: ...


@dataclass(slots=True)
class _Export:
    device: VirtualDevice
    configured: bool
    plugged_before: int
    importers: list[Importer] = field(default_factory=list)
    free_at: float = float("-inf")
    reported_id: UsbId | None = None
    real_id: UsbId | None = None


class ExportTable:
    """Table of a server's devices, each of which has at most one importer.

    A device in use is hidden from DEVLIST, and its IMPORT is refused with status 2. IMPORT of an unknown device is
    refused with status 4. After its importer has gone, a device stays hidden and busy for reset_time seconds. A device
    that is plugged in again has another device number.

    exclusive: False exports a device to any number of importers.
    lists_in_use: True lists devices in use, too, as usbipd-win does. usbip-host does not do this.
    violations: a sentence for each import of a device that had an importer; empty while exclusive is True.
    granted, refused: number of imports with status 0, and of all others.
    renumbers: a device has another number after each import. usbip-host does not do this.
    refusals: the status with which each IMPORT of a bus ID is refused, SILENT for no answer. It is listed all the same.
    by_port: a device that is plugged in again has the same number. usbip-host does not do this.
    """

    def __init__(self, devices: Iterable[VirtualDevice], clock: Clock, reset_time: float) -> None:
        self._clock, self._reset_time = clock, reset_time
        self._exports: dict[str, _Export] = {}
        self._plugged: Counter[str] = Counter()
        self.exclusive = True
        self.lists_in_use = False
        self.renumbers = False
        self.by_port = False
        self.refusals: dict[str, int] = {}
        self.violations: list[str] = []
        self.granted = 0
        self.refused = 0
        for device in devices:
            self.plug(device)

    def devlist(self) -> tuple[Descriptor, ...]:
        exports = self._exports.values()
        return tuple(_descriptor(export) for export in exports if self.lists_in_use or self._free(export))

    def import_device(self, busid: str, importer: Importer) -> wire.ImportReply | None:
        """Exports a device to an importer, or refuses to. Returns the reply, None for no answer."""
        if (status := self.refusals.get(busid)) is not None:
            self.refused += 1
            return None if status == SILENT else wire.ImportReply(status, None)
        export = self._exports.get(busid)
        if export is None or (self.exclusive and not self._free(export)):
            self.refused += 1
            return wire.ImportReply(wire.ST_NODEV if export is None else wire.ST_DEV_BUSY, None)
        export.importers.append(importer)
        self.granted += 1
        if len(export.importers) > 1:
            self.violations.append(f"{busid} is exported to {len(export.importers)} importers at once")
        descriptor = replace(_descriptor(export), interfaces=())
        return wire.ImportReply(wire.ST_OK, replace(descriptor, usb_id=export.reported_id or descriptor.usb_id))

    def release(self, importer: Importer) -> None:
        """Releases the importer's device, if it has one, after its connection has ended."""
        for export in self._exports.values():
            if importer in export.importers:
                export.importers.remove(importer)
                export.free_at = self._clock.monotonic() + self._reset_time
                export.plugged_before += int(self.renumbers)

    def devices(self) -> tuple[VirtualDevice, ...]:
        """Returns all devices that are plugged in, in use or not."""
        return tuple(export.device for export in self._exports.values())

    def plugged(self, busid: str) -> bool:
        return busid in self._exports

    def device(self, busid: str) -> tuple[VirtualDevice, UsbId]:
        """Returns a plugged-in device and the id in its device descriptor. Raises KeyError if there is no device."""
        export = self._exports[busid]
        return export.device, export.real_id or export.device.usb_id

    def configure(self, busid: str, configuration: int) -> None:
        """Records the configuration that an importer has set. It stays after the importer has gone."""
        if busid in self._exports:
            self._exports[busid].configured = configuration > 0

    def importers(self, busid: str) -> int:
        export = self._exports.get(busid)
        return len(export.importers) if export else 0

    def is_importer(self, busid: str, importer: Importer) -> bool:
        export = self._exports.get(busid)
        return export is not None and importer in export.importers

    def plug(self, device: VirtualDevice) -> None:
        """Plugs a device in. Raises ValueError if its bus ID is taken."""
        if device.busid in self._exports:
            raise ValueError(f"{device.busid} is already plugged in")
        before = 0 if self.by_port else self._plugged[device.busid]
        self._exports[device.busid] = _Export(device, device.configured, before)
        self._plugged[device.busid] += 1

    def unplug(self, busid: str) -> None:
        """Unplugs a device and ends its importer's connection. Raises KeyError if there is no such device."""
        export = self._exports.pop(busid)
        for importer in tuple(export.importers):
            importer.end()

    def drop(self, busid: str) -> None:
        """Ends the connection of a device's importer; the device stays. Raises KeyError if there is no such device."""
        for importer in tuple(self._exports[busid].importers):
            importer.end()

    def lie(self, busid: str, said: UsbId | None = None, real: UsbId | None = None) -> None:
        """Falsifies a device's id from now on. Raises KeyError if there is no such device.

        said: id in IMPORT replies; None for the true id.
        real: id in the device descriptor; None for the true id.
        """
        export = self._exports[busid]
        export.reported_id, export.real_id = said, real

    def _free(self, export: _Export) -> bool:
        return not export.importers and self._clock.monotonic() >= export.free_at


def _descriptor(export: _Export) -> Descriptor:
    descriptor = export.device.descriptor(export.configured)
    return replace(descriptor, devnum=1 + (descriptor.devnum - 1 + export.plugged_before) % _DEVNUMS)
