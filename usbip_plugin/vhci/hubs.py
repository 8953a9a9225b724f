"""Protection of vhci's root hubs: new devices stay unauthorised while a device of the plugin enumerates.

Without it, a server that lies about a device could make any driver of this node probe it before the plugin has checked
its descriptors. The plugin sets authorized_default of the hub to 0 just before it attaches a device, and restores the
old value once it has authorised the device and found its nodes. It attaches nothing to a hub that it cannot close.
Only a device that a person attaches with the `usbip` tool to the same hub in this window stays unauthorised. The plugin
never changes a hub whose authorized_default is 0 already.

interface_authorized_default of the hub is kept at 0 likewise, but until the device is detached, if an interface of the
device is to stay unauthorised (vhci/interfaces.py): when a pod sets another configuration of its device, this file
decides about the new interfaces (usb_set_configuration in drivers/usb/core/message.c). Until then, no device of the hub
can use interfaces of another configuration.

The kernel writes neither file after it has made the hub (usb_add_hcd in drivers/usb/core/hcd.c); any process of root
may. The record directory keeps the old values, so that the next process restores them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable
from pathlib import Path

from usbip_plugin.vhci.sysfs import Port, root_hub

log = logging.getLogger(__name__)

DEVICES, INTERFACES = "authorized_default", "interface_authorized_default"
"""The files of a root hub that hold whether the kernel authorises new devices, and interfaces, by itself."""
_CLOSED = "0"
_VALUES = frozenset({"-1", "0", "1", "2"})  # the values that these files can have


class HubGuard:
    """A guard that keeps a file of a root hub at 0 while at least one of its ports is held.

    write: writes text to a sysfs file; raises OSError. file: DEVICES or INTERFACES.
    """

    def __init__(self, sysfs: Path, records: Path, write: Callable[[Path, str], None], file: str = DEVICES) -> None:
        self._sysfs = sysfs
        self._records = records
        self._write = write
        self._file = file
        self._held: dict[int, Path] = {}

    def hold(self, port: Port) -> None:
        """Holds the hub of a port. The caller must call this before it attaches or authorises the device.

        Raises OSError if the hub cannot be guarded; then the port is not held, and the caller must not go on.
        """
        hub = root_hub(self._sysfs, port.controller, port.hub)
        if hub is None:
            raise FileNotFoundError(errno.ENOENT, f"vhci_hcd.{port.controller} has no {port.hub} hub")
        file, was_held = hub / self._file, hub in self._held.values()
        try:
            # also of a hub that is held: another process may have opened it
            if (before := _value(file)) != _CLOSED:
                self._marker(hub).parent.mkdir(mode=0o700, exist_ok=True)
                self._marker(hub).write_text(before)
                self._write(file, _CLOSED)
        except OSError:
            if not was_held:
                self._marker_gone(hub)
            raise
        self._held[port.number] = hub

    def ports(self) -> frozenset[int]:
        """Returns the ports that are held."""
        return frozenset(self._held)

    def release(self, port: int) -> None:
        """Releases a port. Restores the hub after its last one. Idempotent."""
        hub = self._held.pop(port, None)
        if hub is not None and hub not in self._held.values():
            self._restore(hub)

    def restore_leftovers(self) -> None:
        """Restores the hubs that an earlier process left closed, and of which no port is held."""
        for marker in self._records.glob(f"{self._file}.usb[0-9]*"):
            name = marker.name.removeprefix(f"{self._file}.")
            if any(hub.name == name for hub in self._held.values()):
                continue
            for hub in (self._sysfs / "devices/platform").glob(f"vhci_hcd.*/{name}"):
                self._restore(hub)

    def _restore(self, hub: Path) -> None:
        if not self._marker(hub).exists():
            return  # it was 0 before the plugin held it
        try:
            self._write(hub / self._file, _value(self._marker(hub)))
        except OSError as error:
            log.warning("authorized_default not restored", extra={"file": str(hub / self._file), "cause": str(error)})
        self._marker_gone(hub)

    def _marker(self, hub: Path) -> Path:
        return self._records / f"{self._file}.{hub.name}"

    def _marker_gone(self, hub: Path) -> None:
        with contextlib.suppress(OSError):
            self._marker(hub).unlink(missing_ok=True)


def _value(file: Path) -> str:
    """Returns the value of a file of a hub. Raises OSError if it cannot be read or is not such a value."""
    text = file.read_text(errors="replace").strip()
    if text not in _VALUES:
        raise OSError(errno.EINVAL, f"{text[:20]!r} is not a valid {file.name}", str(file))
    return text
