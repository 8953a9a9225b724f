"""Messages to systemd about the state of the service (sd_notify(3)): datagrams to the socket in NOTIFY_SOCKET."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"


class ServiceNotifier:
    """Sends messages to the service manager, if one started this process and asked for them.

    environ: the environment of the process.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds = environ.get("WATCHDOG_USEC", "")
        self._watchdog = microseconds.isdecimal() and int(microseconds) > 0

    def send(self, *assignments: str) -> None:
        """Sends one message, such as READY. An error is ignored: the service goes on without its manager."""
        if not self._address:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), self._address)

    def reloading(self) -> None:
        """Announces a reload. READY must follow."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def alive(self) -> None:
        """Resets the watchdog, if the unit has one."""
        if self._watchdog:
            self.send(WATCHDOG)
