"""The file that says to whom devices are exported. It outlives the process, as the connections do.

The kernel serves a connection without the exporter, and does not tell whose it is. The file is written before the
kernel gets a connection, so it names each of them, whenever a process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from usbip_plugin.model import Endpoint, valid_busid

FILE = "exported.json"
VERSION = 1
"""The version of the format. A reader ignores keys that it does not know, and reads any version."""
MAX_BYTES = 64 * 1024
"""Bytes read of the file; a device takes 100."""
TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Export:
    """A device that a client has.

    peer: the client's end of the connection; None if another program exported the device.
    since: when the exporter exported it, or found it exported.
    """

    busid: str
    peer: Endpoint | None
    since: datetime


def format_state(exports: Iterable[Export]) -> str:
    rows = {
        export.busid: {"peer": str(export.peer) if export.peer else None, "since": export.since.strftime(TIME)}
        for export in exports
    }
    return json.dumps({"version": VERSION, "exports": rows}, indent=1) + "\n"


def parse_state(text: str) -> Mapping[str, Export]:
    """Returns the exports by bus ID. Leaves out what is not valid."""
    try:
        rows = json.loads(text)["exports"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found: dict[str, Export] = {}
    for busid, row in rows:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            since = datetime.strptime(row["since"], TIME).replace(tzinfo=UTC)
            if valid_busid(busid):
                found[busid] = Export(busid, Endpoint.parse(row["peer"] or ""), since)
    return found


class StateFile:
    """The file in its directory. Methods block, but only briefly: the file is small and in memory (/run)."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE

    def read(self) -> Mapping[str, Export]:
        """Returns the exports by bus ID, none if there is no file that can be read."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, errors="replace") as file:
                return parse_state(file.read(MAX_BYTES))
        except OSError:
            return {}

    def write(self, exports: Iterable[Export]) -> None:
        """Replaces the file atomically. Raises OSError, and then leaves the old file."""
        self._path.parent.mkdir(mode=0o755, exist_ok=True)
        unfinished = self._path.with_suffix(".tmp")
        try:
            unfinished.write_text(format_state(exports))
            unfinished.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
