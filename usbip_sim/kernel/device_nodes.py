"""Device nodes for the devices of a simulated kernel: real files, so that a kubelet can give them to a pod."""

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
"""Device numbers of every simulated node: those of /dev/zero, which can be opened, read and written."""
_MODE = 0o666


def make_device(path: Path) -> None:
    """Makes a character device like /dev/zero at path. Raises OSError without CAP_MKNOD."""
    os.mknod(path, stat.S_IFCHR | _MODE, os.makedev(MAJOR, MINOR))
    path.chmod(_MODE)  # regardless of the umask


def is_device(path: Path) -> bool:
    """Returns whether path is a node such as make_device() makes."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(MAJOR, MINOR)


class DeviceNodes:
    """Device nodes of one simulated kernel.

    directory: stands for the node's /dev.
    journal: file that lists the nodes, so that a later process can remove them.
    make, ours: make_device and is_device, or stand-ins where there is no CAP_MKNOD.
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
        """Removes the nodes in the journal of an earlier process. Leaves all other files alone."""
        with contextlib.suppress(FileNotFoundError):
            self._paths = dict.fromkeys(self._journal.read_text(encoding="utf-8").splitlines())
        self.keep(())

    def provide(self, attachment: Attachment) -> Attachment:
        """Makes the attachment's missing nodes, and returns it with the nodes' real device numbers.

        Raises OSError if a node cannot be made.
        """
        for node in attachment.nodes:
            if node.path not in self._paths:
                self._add(node.path)
        nodes = tuple(dataclasses.replace(node, block=False, major=MAJOR, minor=MINOR) for node in attachment.nodes)
        return dataclasses.replace(attachment, nodes=nodes)

    def make_one_of(self, nodes: Iterable[DeviceNode]) -> DeviceNode:
        """Makes the first of the nodes whose path is free, and returns it with its real device numbers.

        A kernel that shares the directory may have taken a path. Raises OSError if no node can be made.
        """
        for node in nodes:
            if node.path in self._paths:
                continue
            try:
                self._add(node.path)
            except OSError as error:
                self._paths.pop(node.path, None)
                self._write()
                if not isinstance(error, FileExistsError):
                    raise
            else:
                return dataclasses.replace(node, block=False, major=MAJOR, minor=MINOR)
        raise FileExistsError(errno.EEXIST, "all paths are taken", str(self._directory))

    def keep(self, paths: Collection[str]) -> None:
        """Removes all nodes but those with the given paths."""
        removed = [path for path in self._paths if path not in paths]
        for path in removed:
            place = self._place(path)
            if self._ours(place):
                place.unlink(missing_ok=True)
            del self._paths[path]
        if removed:
            self._write()

    def _add(self, path: str) -> None:
        self._place(path).parent.mkdir(parents=True, exist_ok=True)
        self._paths[path] = None
        self._write()  # before the node exists, so that a later process removes it
        self._make(self._place(path))

    def _place(self, path: str) -> Path:
        return self._directory / Path(path).relative_to("/dev")

    def _write(self) -> None:
        new = self._journal.with_suffix(".new")
        new.write_text("".join(f"{path}\n" for path in self._paths), encoding="utf-8")
        new.replace(self._journal)
