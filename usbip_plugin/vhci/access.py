"""Reading vhci_hcd's status files, and writing to sysfs without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from usbip_plugin.clock import Clock
from usbip_plugin.errors import DriverMissing, DriverNotWritable, VhciError
from usbip_plugin.vhci.hubs import controller_dir
from usbip_plugin.vhci.sysfs import Port, parse_nports, parse_status, status_files

WRITE_S = 5.0  # for one write to sysfs; milliseconds in practice
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def write_sysfs(path: Path, text: str) -> None:
    """One write(2), as sysfs wants it. Blocking; OSError; never creates a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


def refusal(path: Path) -> str | None:
    """What the system says to opening a sysfs file for writing, None if it allows it. Nothing is written.

    Only opening asks AppArmor and SELinux; access(2) does not.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return None


class PortTable:
    """The status files of all controllers. Reads are directly in the loop: sysfs answers from memory.

    Parsing is what costs, and most files have not changed since they were last read: each is parsed once per content.
    """

    def __init__(self, sysfs: Path) -> None:
        self._base = controller_dir(sysfs, 0)
        self._per_controller = 0
        self._parsed: dict[int, tuple[str, tuple[Port, ...]]] = {}

    def _controller(self, number: int) -> tuple[Port, ...]:
        text = (self._base / (f"status.{number}" if number else "status")).read_text()
        known = self._parsed.get(number)
        if known is None or known[0] != text:
            known = self._parsed[number] = (text, parse_status(text, number))
        return known[1]

    def all(self) -> tuple[Port, ...]:
        """Every port, by number. DriverMissing, or VhciError for a status that cannot be understood."""
        try:
            first = self._controller(0)
            nports = parse_nports((self._base / "nports").read_text())
            self._per_controller = len(first)
            found = [port for n in range(len(status_files(nports, len(first)))) for port in self._controller(n)]
            return tuple(sorted(found, key=lambda port: port.number))
        except OSError as error:
            raise DriverMissing(str(self._base)) from error
        except ValueError as error:
            raise VhciError(str(error)) from error

    def one(self, number: int) -> Port:
        """One port, from the status file of its controller. Also VhciError if there is no such port."""
        if not self._per_controller:
            self.all()
        controller = number // self._per_controller if self._per_controller else 0
        try:
            ports = self._controller(controller)
        except OSError as error:
            raise (VhciError(f"no port {number}") if self._base.exists() else DriverMissing(str(self._base))) from error
        except ValueError as error:
            raise VhciError(str(error)) from error
        for port in ports:
            if port.number == number:
                return port
        raise VhciError(f"no port {number}")


class Writer:
    """Writes to sysfs in a thread, bounded by WRITE_S. write: (path, text), blocking, OSError."""

    def __init__(self, clock: Clock, write: Callable[[Path, str], None]) -> None:
        self._clock = clock
        self._write = write

    async def write(
        self,
        path: Path,
        text: str,
        *,
        finish: Callable[[], None] = lambda: None,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """OSError from the write; ETIMEDOUT if it has not returned after WRITE_S.

        A write that has begun cannot be stopped. finish is called in its thread when it has ended in whatever way; undo
        is called in the loop if it succeeds after it was given up (timeout or cancellation). When cancelled, a write
        with an undo is waited for, so that it has been undone.
        """

        def work() -> None:
            try:
                self._write(path, text)
            finally:
                finish()

        def late(ended: asyncio.Future[None]) -> None:
            if ended.exception() is None and undo is not None:
                undo()

        future = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            async with self._clock.timeout(WRITE_S):
                await asyncio.wait([future])
        except TimeoutError:
            future.add_done_callback(late)
            raise OSError(errno.ETIMEDOUT, f"the kernel did not take it within {WRITE_S:g} s", str(path)) from None
        except asyncio.CancelledError:
            future.add_done_callback(late)
            if undo is not None:
                with contextlib.suppress(TimeoutError):
                    async with self._clock.timeout(WRITE_S):
                        await asyncio.wait([future])
            raise
        future.result()


def explain(error: OSError, path: Path, otherwise: VhciError) -> VhciError:
    """The VhciError for a failed write: the same for every file where the reason is permission or a missing driver."""
    if error.errno in _NOT_ALLOWED:
        return DriverNotWritable(str(path), error.strerror or str(error))
    if error.errno == errno.ENOENT and path.name in ("attach", "detach"):
        return DriverMissing(str(path.parent))
    return otherwise
