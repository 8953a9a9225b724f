"""/run/vhci_hcd/portN: which remote device stands on a port, in the words of the `usbip` tool, which reads them too."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from usbip_plugin.model import DeviceKey, ServerKey

MAX_RECORD = 1200  # bytes; the tool reads host 1025 + port 32 + busid 32
_MAX_HOST = 1024
_BUSID = re.compile(r"[0-9A-Za-z.:_-]{1,31}")
_FILE = re.compile(r"port(0|[1-9][0-9]{0,5})")
_MAX_PORT = 65535


def format_record(key: DeviceKey) -> str:
    """ "host port busid" and a newline. ValueError for a key that the tool could not read back."""
    text = f"{key.server.host} {key.server.port} {key.busid}\n"
    if parse_record(text) != key:
        raise ValueError(f"{key} cannot be written as a port record")
    return text


def parse_record(text: str) -> DeviceKey | None:
    """None for what is not a record. Only numeric ports are understood; the tool writes the one it was given."""
    if len(text) > MAX_RECORD or len(fields := text.split()) != 3:
        return None
    host, port, busid = fields
    if len(host) > _MAX_HOST or not host.isprintable():
        return None
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= _MAX_PORT) or not _BUSID.fullmatch(busid):
        return None
    return DeviceKey(ServerKey(host, int(port)), busid)


def _without_waiting(path: str, flags: int) -> int:
    """For open(): a pipe in the file's place must not hang the plugin."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


class Records:
    """The directory of port records. Files are small and local: read and written directly."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, port: int) -> DeviceKey | None:
        try:
            with open(self._path(port), errors="replace", opener=_without_waiting) as file:
                return parse_record(file.read(MAX_RECORD + 1))
        except OSError:
            return None

    def write(self, port: int, key: DeviceKey) -> None:
        """OSError if it cannot be written; ValueError as format_record."""
        text = format_record(key)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._path(port).write_text(text)

    def remove(self, port: int, only: DeviceKey | None = None) -> None:
        """Remove the record, or nothing if only is given and the record names another device. Never raises OSError."""
        if only is not None and self.read(port) != only:
            return
        with contextlib.suppress(OSError):
            self._path(port).unlink(missing_ok=True)

    def ports(self) -> tuple[int, ...]:
        """The ports that have a record, whatever is in it, sorted."""
        try:
            names = [path.name for path in self._directory.iterdir()]
        except OSError:
            return ()
        return tuple(sorted(int(found[1]) for name in names if (found := _FILE.fullmatch(name)) is not None))

    def writable(self) -> bool:
        place = self._directory if self._directory.exists() else self._directory.parent
        return os.access(place, os.W_OK | os.X_OK)

    def _path(self, port: int) -> Path:
        return self._directory / f"port{port:d}"
