"""A memory cgroup, version 1 or 2, which counts memory as for a container."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A memory cgroup, by its directory. memory_group() makes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._second = (directory / "memory.current").exists()

    def working_set_mib(self) -> float:
        """Returns the working set as the kubelet defines it: usage without inactive page cache."""
        usage = self.directory / ("memory.current" if self._second else "memory.usage_in_bytes")
        inactive = "inactive_file" if self._second else "total_inactive_file"
        fields = dict(line.split() for line in (self.directory / "memory.stat").read_text().splitlines())
        return max(0, int(usage.read_text()) - int(fields[inactive])) / 2**20


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup | None]:
    """Yields a new cgroup, None without root rights or a memory controller."""
    base = ROOT / "memory" if (ROOT / "memory").is_dir() else ROOT
    directory = base / f"usbip-bench-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError:
        yield None
        return
    try:
        usable = any((directory / name).exists() for name in ("memory.current", "memory.usage_in_bytes"))
        yield MemoryGroup(directory) if usable else None
    finally:
        with contextlib.suppress(OSError):  # a process may still be exiting
            directory.rmdir()
