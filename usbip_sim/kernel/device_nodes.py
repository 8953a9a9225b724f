"""Device nodes for devices that a simulated kernel has: real files, so that a kubelet can give them to a pod."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from usbip_plugin.model import Attachment, DeviceNode

MAJOR, MINOR = 1, 5
"""/dev/zero: it can be opened, read from and written to."""
_MODE = 0o666


def make_device(path: Path) -> None:
    """A character device like /dev/zero. Needs CAP_MKNOD: OSError without."""
    os.mknod(path, stat.S_IFCHR | _MODE, os.makedev(MAJOR, MINOR))
    path.chmod(_MODE)  # whatever the umask is


def is_device(path: Path) -> bool:
    """Is this a node as make_device makes them?"""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(MAJOR, MINOR)


class DeviceNodes:
    """Keeps the nodes below directory, which stands for the node's /dev. journal: lists them, for a successor.

    make and ours: the two functions above, or stand-ins where there is no CAP_MKNOD.
    """

    def __init__(
        self,
        directory: Path,
        journal: Path,
        make: Callable[[Path], None] = make_device,
        ours: Callable[[Path], bool] = is_device,
    ) -> None:
        self._directory, self._journal = directory, journal
        self._make, self._ours = make, ours
        self._paths: dict[str, None] = {}

    def sweep(self) -> None:
        """Remove what a predecessor left: paths of its journal that are such nodes still. Others are left alone."""
        with contextlib.suppress(FileNotFoundError):
            self._paths = dict.fromkeys(self._journal.read_text(encoding="utf-8").splitlines())
        self.keep(())

    def provide(self, attachment: Attachment) -> Attachment:
        """Make its nodes if they are not there; the attachment with the numbers they really have. OSError."""
        missing = [node.path for node in attachment.nodes if node.path not in self._paths]
        if missing:
            self._paths.update(dict.fromkeys(missing))
            self._write()
        for path in missing:
            self._place(path).parent.mkdir(parents=True, exist_ok=True)
            self._make(self._place(path))
        nodes = tuple(dataclasses.replace(node, block=False, major=MAJOR, minor=MINOR) for node in attachment.nodes)
        return dataclasses.replace(attachment, nodes=nodes)

    def make_one_of(self, nodes: Iterable[DeviceNode]) -> DeviceNode:
        """Make the first whose path nobody has: other kernels may share this directory. OSError."""
        for node in nodes:
            place = self._place(node.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if node.path in self._paths:
                continue
            self._paths[node.path] = None
            self._write()
            try:
                self._make(place)
            except FileExistsError:
                del self._paths[node.path]
                self._write()
            except OSError:
                del self._paths[node.path]
                raise
            else:
                return dataclasses.replace(node, block=False, major=MAJOR, minor=MINOR)
        raise FileExistsError(errno.EEXIST, "all paths are taken", str(self._directory))

    def keep(self, paths: Collection[str]) -> None:
        """Remove all nodes but these."""
        gone = [path for path in self._paths if path not in paths]
        for path in gone:
            place = self._place(path)
            if self._ours(place):
                place.unlink(missing_ok=True)
            del self._paths[path]
        if gone:
            self._write()

    def _place(self, path: str) -> Path:
        return self._directory / Path(path).relative_to("/dev")

    def _write(self) -> None:
        new = self._journal.with_suffix(".new")
        new.write_text("".join(f"{path}\n" for path in self._paths), encoding="utf-8")
        new.replace(self._journal)
