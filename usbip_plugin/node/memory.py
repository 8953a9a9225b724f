"""Saves memory and time at the start of a process, and releases what only the start needed."""

from __future__ import annotations

import asyncio.sslproto
import contextlib
import ctypes
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path

MAPPINGS = Path("/proc/self/smaps")
TLS_BUFFER_BYTES = 32 << 10
"""Bytes of the receive buffer of one TLS connection: two TLS records. A list of 10 MiB takes 300 more reads, 10 ms."""
_READ_ONLY = frozenset({"r-xp", "r--p"})
_MADV_DONTNEED = 4


def file_ranges(smaps: Iterable[str]) -> list[tuple[int, int]]:
    """Returns (address, bytes) of each mapping of code or constants that is unchanged from its file.

    smaps: the lines of /proc/PID/smaps, see proc(5). Leaves out mappings with anonymous pages, in memory or swapped
    out: a relocation or a debugger wrote to them.
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
    """Drops unchanged pages of code and constants from this process: a third of its memory after a start.

    A page that is used again comes back by a page fault, from the page cache unless memory is short. No content can be
    lost, because file_ranges() leaves out pages that were written to.
    Raises OSError if the kernel refuses; the process works on.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with mappings.open(encoding="utf-8", errors="surrogateescape") as lines:  # line by line: the file has about 1 MB
        ranges = file_ranges(lines)
    for address, size in ranges:
        if madvise(address, size, _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")


def small_tls_buffers() -> None:
    """Reduces the receive buffer of asyncio's TLS connections made from now on from 256 KiB to TLS_BUFFER_BYTES each.

    asyncio does not take the size as an argument. A process has three such connections or more.
    """
    asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pauses garbage collection within the block, for the imports: each start would have several runs of 30 ms.

    Objects made in the block are exempt from garbage collection until trim_after_start().
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def trim_heap() -> None:
    """Gives freed memory back to the system, as after a long list. Takes milliseconds. Only glibc has it."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def trim_after_start() -> None:
    """Releases the memory that only the start needed. To be called once, when the start is over; takes 50 ms.

    Objects that exist then are exempt from garbage collection for good. Raises the OSError of drop_clean_pages(), after
    everything else has been done.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim_heap()  # a megabyte or more after a start with many resources
    drop_clean_pages()
