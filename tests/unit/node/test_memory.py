"""Memory that only the start needs is released after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from usbip_plugin.node import memory

ANONYMOUS = "Size: 16 kB\nRss: 16 kB\nAnonymous: {} kB\nSwap: {} kB\nVmFlags: rd ex mr\n"
UNTOUCHED, WRITTEN, SWAPPED = ANONYMOUS.format(0, 0), ANONYMOUS.format(8, 0), ANONYMOUS.format(0, 8)
SMAPS = f"""\
5581e0a00000-5581e0a01000 r--p 00000000 00:2e 51 /usr/bin/python3.13
{UNTOUCHED}5581e0a01000-5581e0a05000 r-xp 00001000 00:2e 51 /usr/bin/python3.13
{UNTOUCHED}7f2b4c000000-7f2b4c021000 rw-p 00000000 00:00 0
{WRITTEN}7f2b50000000-7f2b50400000 r-xp 00200000 00:2e 77 /opt/with space/lib.so (deleted)
{UNTOUCHED}7f2b51000000-7f2b51001000 r-xp 00000000 00:00 0 [vdso]
{UNTOUCHED}7f2b52000000-7f2b52001000 rwxp 00000000 00:00 0
{UNTOUCHED}7f2b53000000-7f2b53001000 rwxp 00000000 00:2e 78 /opt/rewritten.so
{UNTOUCHED}7f2b54000000-7f2b54001000 r-xp 00000000 00:2e 79 /opt/relocated.so
{WRITTEN}7f2b55000000-7f2b55001000 r--p 00000000 00:2e 79 /opt/relocated.so
{WRITTEN}7f2b56000000-7f2b56001000 r--p 00000000 00:2e 79 /opt/swapped.so
{SWAPPED}7f2b57000000-7f2b57001000 rw-p 00000000 00:2e 79 /opt/data.so
{UNTOUCHED}"""
SETTLED = """
import grpc
from usbip_plugin.node.memory import trim_after_start

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

before = resident()
trim_after_start()
after = resident()
import asyncio
from usbip_plugin.kubelet import deviceplugin_pb2 as pb

async def used():
    server = grpc.aio.server()
    await server.start()
    await server.stop(None)

asyncio.run(used())
print(before, after, pb.Device(ID="usable still").SerializeToString().decode())
"""
HOLES = """
from usbip_plugin.node.memory import trim_after_start

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

many = [bytes(2000) for _ in range(20000)]
last = many[-1]
del many
before = resident()
trim_after_start()
print(before - resident())
"""
TLS = """
import asyncio, ssl, tracemalloc
from usbip_plugin.node.memory import small_tls_buffers

async def kept():
    tracemalloc.start()
    loop = asyncio.get_running_loop()
    made = asyncio.sslproto.SSLProtocol(loop, asyncio.Protocol(), context, None, server_hostname="localhost")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made.get_buffer(-1)) > 16384
    return size

context = ssl.create_default_context()
print(asyncio.run(kept()))
small_tls_buffers()
print(asyncio.run(kept()))
"""
GARBAGE = """
import gc, weakref
from usbip_plugin.node.memory import trim_after_start, gc_paused

class Ring:
    def __init__(self):
        self.ring = self

with gc_paused():
    gone = weakref.ref(Ring())
    print(gc.isenabled())
print(gc.isenabled())
gc.collect()
print(gone() is not None)
trim_after_start()
print(gone() is not None)
"""


def test_only_pages_that_are_unchanged_from_their_file_are_dropped() -> None:
    found = [(0x5581E0A00000, 0x1000), (0x5581E0A01000, 0x4000), (0x7F2B50000000, 0x400000)]
    assert memory.file_ranges(SMAPS.splitlines()) == found
    assert memory.file_ranges([]) == []


def python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_code_and_constants_leave_the_memory_and_still_work() -> None:
    before, after, *rest = python(SETTLED)
    assert int(after) < int(before) / 2
    assert " ".join(rest).endswith("usable still")


def test_free_memory_between_used_blocks_is_returned() -> None:
    (freed,) = python(HOLES)
    assert int(freed) > 20000


def test_a_tls_connection_keeps_small_buffers() -> None:
    before, after = map(int, python(TLS))
    assert after < 64 << 10
    assert before > 256 << 10, "asyncio has become smaller: is small_tls_buffers() still needed?"


def test_a_failed_madvise_is_an_error(tmp_path: Path) -> None:
    nowhere = tmp_path / "smaps"
    nowhere.write_text(f"1000-2000 r-xp 00000000 00:2e 51 /nothing/is/mapped/there\n{UNTOUCHED}")
    with pytest.raises(OSError, match="madvise"):
        memory.drop_clean_pages(nowhere)


def test_garbage_of_the_start_is_collected_after_it() -> None:
    assert python(GARBAGE) == ["False", "True", "True", "False"]
