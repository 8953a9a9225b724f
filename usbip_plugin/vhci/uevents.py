"""Kernel uevents over netlink (lib/kobject_uevent.c). They are hints to look again, never the state itself."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.clock import Clock
from usbip_plugin.sync import Bell

log = logging.getLogger(__name__)


NETLINK_KOBJECT_UEVENT = 15
KERNEL_GROUP = 1
MAX_UEVENT = 8192  # bytes; the kernel's own buffer is 2048, plus the header
RECEIVE_BUFFER = 1 << 20  # bytes; a burst of a thousand events
POLL_S = 1.0  # between looks where uevents cannot be had
_BURST = 64  # messages taken in one turn of the event loop


@dataclass(frozen=True, slots=True)
class Uevent:
    """action: add, remove, change, bind, unbind, move, online, offline. devpath: below /sys, begins with /."""

    action: str
    devpath: str
    fields: Mapping[str, str]

    @property
    def concerns_vhci(self) -> bool:
        return "/vhci_hcd." in self.devpath


def parse(message: bytes) -> Uevent | None:
    """A uevent from one netlink message, None for anything else (udevd's own messages, cut or foreign ones)."""
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
    """Where uevents come from."""

    async def run(self, deliver: Callable[[Uevent | None], None]) -> None:
        """Deliver uevents until cancelled. None means that some may be missing: read everything again."""
        ...

    def problem(self) -> str | None:
        """Why there are no uevents here, for people; None if there are."""
        ...


class NetlinkUevents:
    """The kernel's uevents; where the socket is refused, a None every POLL_S seconds instead.

    Needs no capability, and the host's network namespace or one of the initial user namespace.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def run(self, deliver: Callable[[Uevent | None], None]) -> None:
        try:
            sock = _open()
        except OSError as error:
            log.warning(
                "no uevents, polling instead", extra={"cause": error.strerror or str(error), "interval_s": POLL_S}
            )
            await self._poll(deliver)
            return
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()
        with sock:
            loop.add_reader(sock, _receive, sock, deliver, failed)
            try:
                deliver(None)  # what happened before the socket was open
                await failed
            except OSError as error:
                log.warning("uevents ended, polling instead", extra={"cause": error.strerror or str(error)})
            finally:
                loop.remove_reader(sock)
        await self._poll(deliver)

    async def _poll(self, deliver: Callable[[Uevent | None], None]) -> None:
        while True:
            deliver(None)
            await self._clock.sleep(POLL_S)

    def problem(self) -> str | None:
        try:
            _open().close()
        except OSError as error:
            return f"no uevents: {error.strerror or error}; changes are seen by polling every {POLL_S:g} s"
        return None


def _open() -> socket.socket:
    """The netlink socket. Its type has no name in Python's socket module, hence the number."""
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
        # Any process may send to a netlink socket; only the kernel's port id is 0.
        if sender == 0 and (event := parse(message)):
            deliver(event)


SETTLE_S = (0.05, 0.2, 0.75)  # a port becomes null a little after the last uevent of its device
RESYNC_S = 15.0  # a connection that ends before its device had an address has no uevent at all


async def settle(bell: Bell, stirred: asyncio.Event, clock: Clock) -> None:
    """Until cancelled: ring again SETTLE_S after the last time that stirred was set, and every RESYNC_S."""
    waits = [RESYNC_S]
    while True:
        stirred.clear()
        try:
            async with clock.timeout(waits[0]):
                await stirred.wait()
            waits = [*SETTLE_S, RESYNC_S]
        except TimeoutError:
            bell.ring()
            waits = waits[1:] or [RESYNC_S]
