"""Kernel uevents over netlink (lib/kobject_uevent.c).

The plugin takes a uevent only as a reason to read sysfs again, never as the state itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, Protocol

from usbip_plugin.clock import Clock
from usbip_plugin.sync import Broadcast, done_within

log = logging.getLogger(__name__)

NETLINK_KOBJECT_UEVENT = 15  # netlink protocol number, from linux/netlink.h; Python has no name for it
KERNEL_GROUP = 1  # multicast group of the kernel's own uevents; udevd sends to another group
MAX_UEVENT = 8192  # bytes of a message; the kernel's own buffer has 2048 plus the header
RECEIVE_BUFFER = 1 << 20  # bytes; holds a burst of a thousand events
POLL_S = 1.0  # seconds between polls where uevents are unavailable
_BURST = 64  # messages received in one turn of the event loop, so that a burst does not block the loop


@dataclass(frozen=True, slots=True)
class Uevent:
    """A kernel uevent. action: such as "add". devpath: below /sys. fields: variables such as SUBSYSTEM and MAJOR."""

    action: str
    devpath: str
    fields: Mapping[str, str]

    @property
    def concerns_vhci(self) -> bool:
        return "/vhci_hcd." in self.devpath


def parse(message: bytes) -> Uevent | None:
    """Returns the uevent in a netlink message, or None for any other message, such as one of udevd."""
    if len(message) > MAX_UEVENT or not message.endswith(b"\0"):
        return None
    head, *rest = message[:-1].split(b"\0")
    action, at, devpath = head.partition(b"@")
    if not at or not action.isalpha() or not devpath.startswith(b"/"):
        return None
    fields: dict[str, str] = {}
    for item in rest:
        name, equals, value = item.partition(b"=")
        if equals and name:
            fields[name.decode("ascii", "replace")] = value.decode("utf-8", "replace")
    return Uevent(action.decode("ascii"), devpath.decode("utf-8", "replace"), fields)


class UeventSource(Protocol):
    """A source of kernel uevents."""

    async def run(self, deliver: Callable[[Uevent | None], None]) -> None:
        """Delivers each uevent, None if some may be missing: read everything again. Runs until cancelled."""

    def problem(self) -> str | None:
        """Returns for people why uevents are unavailable here, or None if they are available."""


class NetlinkUevents:
    """The UeventSource that listens on a netlink socket, or delivers None every `poll` seconds if that is impossible.

    Needs no capability. Needs the host's network namespace or another that belongs to the initial user namespace.
    """

    def __init__(self, clock: Clock, poll: float = POLL_S) -> None:
        self._clock = clock
        self._poll_s = poll

    async def run(self, deliver: Callable[[Uevent | None], None]) -> None:
        try:
            sock = _open()
        except OSError as error:
            extra = {"cause": error.strerror or str(error), "interval_s": self._poll_s}
            log.warning("uevents unavailable, polling instead", extra=extra)
            await self._poll(deliver)
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()
        with sock:
            loop.add_reader(sock, _receive, sock, deliver, failed)
            try:
                deliver(None)  # covers changes from before the socket was open
                await failed
            except OSError as error:
                log.warning("uevents ended, polling instead", extra={"cause": error.strerror or str(error)})
            finally:
                loop.remove_reader(sock)
        await self._poll(deliver)

    async def _poll(self, deliver: Callable[[Uevent | None], None]) -> NoReturn:
        while True:
            deliver(None)
            await self._clock.sleep(self._poll_s)

    def problem(self) -> str | None:
        try:
            _open().close()
        except OSError as error:
            return f"uevents unavailable: {error.strerror or error}; polling every {self._poll_s:g} s instead"
        return None


def _open() -> socket.socket:
    """Returns the bound netlink socket. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT)
    try:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.bind((0, KERNEL_GROUP))
    except OSError:
        sock.close()
        raise
    return sock


def _receive(sock: socket.socket, deliver: Callable[[Uevent | None], None], failed: asyncio.Future[None]) -> None:
    for _ in range(_BURST):
        try:
            message, (sender, _groups) = sock.recvfrom(MAX_UEVENT + 1)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                deliver(None)
                continue
            if not failed.done():
                failed.set_exception(error)
            return
        # Any process may send to a netlink socket. Accept only messages of the kernel, whose port id is 0.
        if sender == 0 and (event := parse(message)):
            deliver(event)


SETTLE_S = (0.05, 0.2, 0.75)
"""Intervals in seconds between re-reads after a uevent.

A port becomes free (NULL) a little after the last uevent of its device.
"""
RESYNC_S = 15.0
"""Seconds between re-reads without uevents: a connection that ends before its device has an address causes none."""


async def settle(changed: Broadcast, received: asyncio.Event, clock: Clock) -> None:
    """Fires `changed` at the intervals SETTLE_S after a uevent, then every RESYNC_S. Runs until cancelled.

    received: set by the caller at each uevent, which starts the intervals anew.
    """
    waits = [RESYNC_S]
    while True:
        received.clear()
        if await done_within(clock, waits[0], received.wait()):
            waits = [*SETTLE_S, RESYNC_S]
        else:
            changed.fire()
            waits = waits[1:] or [RESYNC_S]
