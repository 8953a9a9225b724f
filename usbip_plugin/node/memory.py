"""How a process starts and settles: garbage is collected when the start is over, and what only it needed is let go."""

from __future__ import annotations

import asyncio.sslproto
import contextlib
import ctypes
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path

MAPPINGS = Path("/proc/self/smaps")
TLS_BUFFER_BYTES = 32 << 10
"""Two records of TLS. A list of 10 MiB takes 300 reads more, 10 ms."""
_READ_ONLY = frozenset({"r-xp", "r--p"})
_MADV_DONTNEED = 4


def file_ranges(smaps: Iterable[str]) -> list[tuple[int, int]]:
    """(address, bytes) of the code and the constants that are mapped from files and are as they are in them.

    smaps are the lines of /proc/PID/smaps, as proc(5) has it. A mapping with anonymous pages, in memory or swapped out,
    was written to, by a relocation or a debugger: that is not in the file.
    """
    found: list[tuple[int, int]] = []
    mapped: tuple[int, int] | None = None
    for line in smaps:
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            mapped = None
            if len(fields) == 6 and fields[1] in _READ_ONLY and fields[5].startswith("/"):
                first, _, end = fields[0].partition("-")
                mapped = (int(first, 16), int(end, 16) - int(first, 16))
        elif fields[0] in {"Anonymous:", "Swap:"} and fields[1] != "0":
            mapped = None
        elif fields[0] == "VmFlags:" and mapped is not None:
            found.append(mapped)
    return found


def drop_clean_pages(mappings: Path = MAPPINGS) -> None:
    """Unmaps these pages, a third of the memory after a start; those that are used again come back by themselves.

    They stay in the page cache, so it takes a page fault, and no reading unless memory is short. Nothing can be lost:
    see file_ranges. OSError if the kernel does not have it so; all works on.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with mappings.open(encoding="utf-8", errors="surrogateescape") as lines:  # one at a time: all are a megabyte
        ranges = file_ranges(lines)
    for address, size in ranges:
        if madvise(address, size, _MADV_DONTNEED):
            number = ctypes.get_errno()
            raise OSError(number, "madvise")


def trim() -> None:
    """Gives back what the allocator has free between what is in use: of a start with many resources a megabyte or more.

    Only glibc's has it.
    """
    trimming = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trimming is not None:
        trimming(0)


def small_tls_buffers() -> None:
    """asyncio's connections over TLS that are made from now on have 32 KiB each for what comes in, instead of 256.

    asyncio takes no size as an argument. A process has three such connections, for a while after many requests more.
    """
    asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Around the imports: nothing is collected in the block, and what it leaves is not looked at until settle().

    A full collection takes 30 ms after them, and there were several in each start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def trim_after_start() -> None:
    """Once, when the start is over; takes 50 ms. What is there then is never looked at again by a collection.

    OSError as drop_files, after everything else.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim()
    drop_clean_pages()
