"""agent_reader.py tty|disk PATH: a container's process that reads a device until the first error or hang-up.

tty: prints every byte. disk: reads the beginning again and again, past the page cache, and prints the time (seconds,
CLOCK_MONOTONIC) at which each turn began.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import sys
import time
import tty
from collections.abc import AsyncIterator, Callable
from pathlib import Path

LIMIT_S = 120.0  # as PATIENCE_S: the process alone may take half a minute to start
BLOCK = 64 << 10
TURN = 256 << 10
PACE_S = 0.05  # between reads: an emulated processor has other work, too


class Reader:
    """A reader process and the lines it has printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._more = asyncio.Event()

    async def follow(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().strip())
            self._more.set()
        self._more.set()

    async def until(self, condition: Callable[[list[str]], bool]) -> None:
        """Waits until the condition holds for the lines. Raises AssertionError if the process ends before."""
        async with asyncio.timeout(LIMIT_S):
            while not condition(self.lines):
                assert self.process.returncode is None, f"the reader ended with {self.process.returncode}"
                self._more.clear()
                await self._more.wait()

    async def still_reads_disk(self) -> None:
        """Waits for the next turn: then the last one has ended without an error."""
        now = time.monotonic()
        await self.until(lambda lines: bool(lines) and float(lines[-1]) > now)


@contextlib.asynccontextmanager
async def reading(mode: str, path: str) -> AsyncIterator[Reader]:
    """Yields a reader of the device at path. Kills it at the end of the block."""
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, mode, path, stdout=asyncio.subprocess.PIPE)
    reader = Reader(process)
    async with asyncio.TaskGroup() as group:
        group.create_task(reader.follow())
        try:
            await reader.until(bool)
            yield reader
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def read_tty(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    os.write(1, b"open\n")
    while data := os.read(fd, 4096):
        os.write(1, data)
    sys.exit("hung up")


def read_disk(path: Path) -> None:
    os.nice(19)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    block = mmap.mmap(-1, BLOCK)
    while True:
        os.write(1, b"%f\n" % time.monotonic())
        for offset in range(0, TURN, BLOCK):
            if os.preadv(fd, [block], offset) != BLOCK:
                sys.exit("short read")
            time.sleep(PACE_S)


if __name__ == "__main__":
    {"tty": read_tty, "disk": read_disk}[sys.argv[1]](Path(sys.argv[2]))
