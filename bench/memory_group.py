"""A memory cgroup of one's own, version 1 or 2: what the kernel counts for a container, and kills it by."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """directory: of the group. Made by memory_group()."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._second = (directory / "memory.current").exists()

    def working_set_mib(self) -> float:
        """As the kubelet has it: usage without the page cache that can go at once."""
        usage = self.directory / ("memory.current" if self._second else "memory.usage_in_bytes")
        inactive = "inactive_file" if self._second else "total_inactive_file"
        fields = dict(line.split() for line in (self.directory / "memory.stat").read_text().splitlines())
        return max(0, int(usage.read_text()) - int(fields[inactive])) / 2**20


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup | None]:
    """None where there is none to be had: no root, or no memory controller."""
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
        with contextlib.suppress(OSError):  # a process may still be on its way out
            directory.rmdir()
