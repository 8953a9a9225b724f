"""Port records: files /run/vhci_hcd/portN that name the remote device attached to a port.

The first line is the one of the `usbip` tool, which reads and writes these files too. The plugin adds lines:

    10.20.30.40 3240 1-1.4                      host, port and bus ID, all that the tool writes and reads
    65540 312                                   devid and sockfd of the attachment
    version=2 import-from=10.20.30.7:40123      since version 2; unknown words and further lines are ignored

The word usb-id=0951:1666 is the USB ID of the device that was attached. The word unfinished=1 is there while the
interfaces of the device are being authorised one by one.

Each lock under which the device was attached has a line of its own, with uid, epoch, host, port and bus ID. The first
is that of the device as it was allocated; a second one is there if the device has moved to the bus ID of the record:

    held 2d1f5f0a-4c3e-4b52-9d1b-7f0f6c1c9a11 12 10.20.30.40 3240 1-1.3

So the next process knows what the locks said then, also after etcd was restored from an earlier backup.

A plugin of version 1 ignores the second line if a third follows. Then it adopts the device by its lock alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from usbip_plugin.model import DeviceKey, Endpoint, Hold, ServerKey, Tenure, UsbId

RECORD_VERSION = 2
"""Version of the records that the plugin writes."""

MAX_RECORD = 4096  # characters read of a record; the tool reads host 1025 + port 32 + busid 32
MAX_HOLDS = 2  # of a device that has moved
_MAX_HOST = 1024
_OCCUPANT = re.compile(r"([0-9]{1,10}) ([0-9]{1,10})")
_BUSID = re.compile(r"[0-9A-Za-z.:_-]{1,31}")
_UID = re.compile(r"[0-9A-Za-z._-]{1,64}", re.ASCII)
_EPOCH = re.compile(r"[0-9]{1,10}", re.ASCII)
_FILE = re.compile(r"port(0|[1-9][0-9]{0,5})")
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a port record.

    occupant: Port.occupant; None in a record that the `usbip` tool wrote.
    import_from: the node's end of the connection; None in a record of the tool or of version 1.
    unfinished: whether some of the interfaces that the device may have are perhaps not authorised or probed yet.
    usb_id: of the device that was attached; None in a record of the tool or of an earlier plugin.
    holds: the locks under which it was attached, that of the device as it was allocated first; empty likewise.
    """

    key: DeviceKey
    occupant: tuple[int, int] | None = None
    import_from: Endpoint | None = None
    unfinished: bool = False
    usb_id: UsbId | None = None
    holds: tuple[Hold, ...] = ()

    def fits(self, occupant: tuple[int, int] | None) -> bool:
        """Returns whether the record may belong to this attachment. An unknown occupant on either side always fits."""
        return self.occupant is None or occupant is None or self.occupant == occupant


def format_record(record: Record) -> str:
    """Returns the text of a record. Raises ValueError if the tool could not read the key back."""
    key = record.key
    text = f"{key.server.host} {key.server.port} {key.busid}\n"
    if record.occupant is not None:
        text += f"{record.occupant[0]} {record.occupant[1]}\nversion={RECORD_VERSION}"
        text += f" import-from={record.import_from}" if record.import_from is not None else ""
        text += f" usb-id={record.usb_id}" if record.usb_id is not None else ""
        text += " unfinished=1\n" if record.unfinished else "\n"
        for hold in record.holds:
            server = hold.key.server
            text += f"held {hold.tenure.uid} {hold.tenure.epoch} {server.host} {server.port} {hold.key.busid}\n"
    if parse_record(text) != record:
        raise ValueError(f"{key} cannot be written as a port record")
    return text


def parse_record(text: str) -> Record | None:
    """Returns the record in the text, or None if it is not valid or has a service name instead of a TCP port."""
    first, second, third, *more = (*text.split("\n"), "", "")
    key = _key_of(first.split())
    if key is None or len(text) > MAX_RECORD:
        return None
    found = _OCCUPANT.fullmatch(second)
    if found is None:
        return Record(key)
    words = dict(word.partition("=")[::2] for word in third.split())
    return Record(
        key,
        (int(found[1]), int(found[2])),
        Endpoint.parse(words.get("import-from", "")),
        words.get("unfinished") == "1",
        UsbId.parse(words.get("usb-id", "")),
        tuple(hold for line in more if (hold := _hold_of(line.split())) is not None)[:MAX_HOLDS],
    )


def _key_of(fields: Sequence[str]) -> DeviceKey | None:
    """Returns the device for host, port and bus ID, or None if they are not valid."""
    if len(fields) != 3:
        return None
    host, port, busid = fields
    if len(host) > _MAX_HOST or not host.isprintable():
        return None
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= _MAX_PORT) or not _BUSID.fullmatch(busid):
        return None
    return DeviceKey(ServerKey(host, int(port)), busid)


def _hold_of(fields: Sequence[str]) -> Hold | None:
    """Returns the hold in a line "held ...", or None for any other line."""
    if len(fields) != 6 or fields[0] != "held":
        return None
    key = _key_of(fields[3:])
    if key is None or not _UID.fullmatch(fields[1]) or not _EPOCH.fullmatch(fields[2]):
        return None
    return Hold(key, Tenure(fields[1], int(fields[2])))


def local_endpoint(fd: int) -> Endpoint | None:
    """Returns this node's end of a TCP connection, None for a socket of another kind. Raises OSError."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return Endpoint.of(sock.getsockname()) if sock.family in (socket.AF_INET, socket.AF_INET6) else None


def _without_waiting(path: str, flags: int) -> int:
    """An opener for open() with O_NONBLOCK, so that a pipe in place of the file cannot hang the plugin."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


class Records:
    """The directory of port records. Methods block, but only briefly: the files are small and local."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, port: int) -> Record | None:
        try:
            with open(self.path(port), errors="replace", opener=_without_waiting) as file:
                return parse_record(file.read(MAX_RECORD + 1))
        except OSError:
            return None

    def write(self, port: int, record: Record) -> None:
        """Writes the record of a port atomically: on a full disk, the old record or none remains.

        Raises OSError, and ValueError if the `usbip` tool could not read the key back.
        """
        text = format_record(record)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        unfinished = self._directory / f".port{port:d}.tmp"
        try:
            unfinished.write_text(text)
            unfinished.replace(self.path(port))
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise

    def change(self, port: int, key: DeviceKey, **fields: Any) -> None:
        """Changes fields of a port's record, if it is one of a plugin that names key. Raises OSError or ValueError."""
        record = self.read(port)
        if record is not None and record.occupant is not None and record.key == key:
            self.write(port, replace(record, **fields))

    def remove(self, port: int, only: DeviceKey | None = None) -> None:
        """Removes the record of a port. With `only`, keeps a record that names another device. Never raises OSError."""
        if only is not None:
            record = self.read(port)
            if record is None or record.key != only:
                return
        with contextlib.suppress(OSError):
            self.path(port).unlink(missing_ok=True)

    def ports(self) -> tuple[int, ...]:
        """Returns the sorted numbers of the ports that have a record file, whatever it contains."""
        try:
            names = [path.name for path in self._directory.iterdir()]
        except OSError:
            return ()
        return tuple(sorted(int(found[1]) for name in names if (found := _FILE.fullmatch(name)) is not None))

    def writable(self) -> bool:
        directory = self._directory if self._directory.exists() else self._directory.parent
        return os.access(directory, os.W_OK | os.X_OK)

    def path(self, port: int) -> Path:
        return self._directory / f"port{port:d}"
