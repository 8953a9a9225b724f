"""The kubelet's device-plugin directory: one watch for all resources."""

from __future__ import annotations

import logging
import socket
import stat
from pathlib import Path
from typing import NamedTuple

from asyncinotify import Inotify, Mask

from usbip_plugin.clock import Clock
from usbip_plugin.sync import Broadcast

KUBELET_SOCKET = "kubelet.sock"
# Everybody looks at the directory again this often (seconds), should the file system deliver no events for it.
RECHECK_S = 10.0
# The same without inotify (no instances left, or the directory is not there yet).
POLL_S = 1.0
# sun_path holds 108 bytes with the terminating zero.
MAX_SOCKET_PATH_BYTES = 107

log = logging.getLogger(__name__)


class SocketIdentity(NamedTuple):
    """Tells a socket from a later one of the same name. Inode numbers are used again at once, hence the time."""

    device: int
    inode: int
    modified_ns: int


def identify(path: Path) -> SocketIdentity | None:
    """None if there is no socket at path."""
    try:
        found = path.lstat()
    except OSError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        return None
    return SocketIdentity(found.st_dev, found.st_ino, found.st_mtime_ns)


def is_stale(path: Path) -> bool:
    """True for a socket that nobody listens on any more. Does not block."""
    if identify(path) is None:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


class PluginDirectory:
    """`changed` fires whenever a file comes into or leaves the directory, at the latest every RECHECK_S."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.changed = Broadcast()
        self._clock = clock

    @property
    def kubelet_socket(self) -> Path:
        return self.path / KUBELET_SOCKET

    def kubelet(self) -> SocketIdentity | None:
        """The kubelet's registration socket as it is now; another identity is another run of the kubelet."""
        return identify(self.kubelet_socket)

    async def run(self) -> None:
        """Watches until cancelled. Never fails: without inotify it polls, and says so."""
        warned = False
        while True:
            try:
                await self._watch()
            except OSError as error:
                if not warned:
                    log.warning(
                        "cannot watch the kubelet's directory, polling it",
                        extra={"directory": str(self.path), "cause": str(error), "interval_s": POLL_S},
                    )
                    warned = True
                await self._clock.sleep(POLL_S)
            self.changed.fire()

    async def _watch(self) -> None:
        with Inotify() as inotify:
            inotify.add_watch(
                self.path,
                Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.DELETE_SELF | Mask.ONLYDIR,
            )
            # A file may have come before the watch was there.
            self.changed.fire()
            while True:
                try:
                    async with self._clock.timeout(RECHECK_S):
                        event = await inotify.get()
                except TimeoutError:
                    self.changed.fire()
                    continue
                self.changed.fire()
                if event.mask & (Mask.DELETE_SELF | Mask.IGNORED):
                    return
