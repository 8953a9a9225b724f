"""vhci's root hubs: where they are in sysfs, and keeping new devices on them unauthorised while ours enumerate.

A server that lies about a device could otherwise have any driver of this node probe it before its descriptors are
checked. authorized_default is 0 only from just before an attach of ours until its device has appeared, and has its old
value at all other times: devices attached by hand with the `usbip` tool go on working (in that window, about 0.3 s,
one that appears on the same hub stays unauthorised; it is not ours to judge). A hub that says 0 already is left alone,
by whomever it was set. The old value is kept in the record directory, so that a crash in the window heals.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable
from pathlib import Path

from usbip_plugin.vhci.sysfs import Port, root_hub

log = logging.getLogger(__name__)

_MARKER = "authorized_default."
_CLOSED = "0"
_VALUES = frozenset({"-1", "0", "1", "2"})  # what authorized_default may say


class HubGuard:
    """Holds authorized_default at 0 on a hub while at least one port of it is held. write: (file, text), OSError."""

    def __init__(self, sysfs: Path, records: Path, write: Callable[[Path, str], None]) -> None:
        self._sysfs = sysfs
        self._records = records
        self._write = write
        self._held: dict[int, Path] = {}

    def hold(self, port: Port) -> None:
        """Before the attach write. A hub that cannot be guarded is logged: descriptors are checked in any case."""
        hub = root_hub(self._sysfs, port.controller, port.hub)
        if hub is None:
            return
        first = hub not in self._held.values()
        self._held[port.number] = hub
        if not first:
            return
        try:
            before = _value(hub / "authorized_default")
            if before != _CLOSED:
                self._marker(hub).parent.mkdir(mode=0o700, exist_ok=True)
                self._marker(hub).write_text(before)
                self._write(hub / "authorized_default", _CLOSED)
        except OSError as error:
            self._marker_gone(hub)
            log.warning("cannot keep new devices unauthorised", extra={"hub": str(hub), "cause": str(error)})

    def release(self, port: int) -> None:
        """Once the device has appeared, or will not. Idempotent."""
        hub = self._held.pop(port, None)
        if hub is not None and hub not in self._held.values():
            self._restore(hub)

    def restore_leftovers(self) -> None:
        """What a predecessor that crashed has left closed."""
        for marker in self._records.glob(f"{_MARKER}usb[0-9]*"):
            name = marker.name.removeprefix(_MARKER)
            if any(hub.name == name for hub in self._held.values()):
                continue
            for hub in (self._sysfs / "devices/platform").glob(f"vhci_hcd.*/{name}"):
                self._restore(hub)

    def _restore(self, hub: Path) -> None:
        if not self._marker(hub).exists():
            return  # it was closed before us
        try:
            before = _value(self._marker(hub))
            self._write(hub / "authorized_default", before)
        except OSError as error:
            log.warning("cannot restore authorized_default", extra={"hub": str(hub), "cause": str(error)})
        self._marker_gone(hub)

    def _marker(self, hub: Path) -> Path:
        return self._records / (_MARKER + hub.name)

    def _marker_gone(self, hub: Path) -> None:
        with contextlib.suppress(OSError):
            self._marker(hub).unlink(missing_ok=True)


def _value(file: Path) -> str:
    """A value of authorized_default. OSError also for anything else than that."""
    text = file.read_text(errors="replace").strip()
    if text not in _VALUES:
        raise OSError(errno.EINVAL, f"{text[:20]!r} is no value of authorized_default", str(file))
    return text
