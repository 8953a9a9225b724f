"""A memory cgroup, v1 or v2, for one process."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_numbers = itertools.count()


class MemoryGroup:
    """A memory cgroup, by its directory. memory_group() makes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._second = (directory / "memory.current").exists()

    def limit(self, mib: int) -> None:
        """Limits the memory of the cgroup, page cache included, as the kubelet does for a container."""
        (self.directory / ("memory.max" if self._second else "memory.limit_in_bytes")).write_text(str(mib << 20))

    def kills(self) -> int:
        """Returns how many processes the kernel has killed for want of memory."""
        fields = self._fields("memory.events" if self._second else "memory.oom_control")
        return fields["oom_kill"]

    def anonymous_mib(self) -> float:
        """Returns the memory that cannot be dropped: without page cache."""
        return self._fields("memory.stat")["anon" if self._second else "total_rss"] / 2**20

    def working_set_mib(self) -> float:
        """Returns the working set as the kubelet defines it: usage without inactive page cache."""
        usage = self.directory / ("memory.current" if self._second else "memory.usage_in_bytes")
        inactive = self._fields("memory.stat")["inactive_file" if self._second else "total_inactive_file"]
        return max(0, int(usage.read_text()) - inactive) / 2**20

    def _fields(self, name: str) -> dict[str, int]:
        lines = (self.directory / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup | None]:
    """Yields a new cgroup, None without root rights or a memory controller."""
    base = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    directory = base / f"usbip-test-{os.getpid()}-{next(_numbers)}"
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
