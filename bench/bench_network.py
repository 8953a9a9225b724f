"""Latency and bandwidth of attached devices over networks of several delays, on the real kernel. For the guest only."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator

from bench.bench_rows import Row, percentile
from tests.kernel.kernel_rig import raw_tty
from tests.rigs.usbipd import DEVICES, RealUsbipd, eventually
from usbip_plugin.clock import SystemClock
from usbip_plugin.model import Attachment, DeviceKey
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.uevents import NetlinkUevents

DISK, SERIAL, LOCAL_END = "DISKHS", "SERIAL1", "SERIAL2"
"""Serial numbers of a disk at high speed, of a serial converter, and of the one at the other end of its cable."""
ROUND_TRIPS_MS = (0, 1, 5, 20)
DISK_BYTES, BLOCK_BYTES = 4 << 20, 1 << 20
"""Bytes that are read and written in all, and in one system call. usb-storage makes commands of 120 KiB of them."""
LIMIT_S = 60.0
"""Limit of one step in seconds: the guest is emulated."""
USBDEVFS_CONTROL = 0xC0185500  # linux/usbdevice_fs.h: _IOWR('U', 0, struct usbdevfs_ctrltransfer), 64 bits
DESCRIPTOR_BYTES = 18


class NoDelay(Exception):
    """This machine cannot delay packets. The text says why."""


async def network(count: int) -> list[Row]:
    """Measures with the devices of a real usbipd at loopback. count: samples of each latency. Raises NoDelay."""
    usbipd = RealUsbipd()
    usbipd.load_modules()
    keys = [DeviceKey(usbipd.key, usbipd.busid(serial)) for serial in (DISK, SERIAL)]
    for key in keys:
        usbipd.bind(key.busid)
    usbipd.start()
    rows = []
    try:
        for round_trip in ROUND_TRIPS_MS:
            with delayed(round_trip):
                async with attached(keys[0]) as disk, attached(keys[1]) as converter:
                    rows += measured(usbipd, round_trip, disk, converter, count)
            for key in keys:
                eventually(lambda busid=key.busid: usbipd.is_free(busid), "free on the server")  # type: ignore[misc]
    finally:
        usbipd.stop()
    return rows


@contextlib.contextmanager
def delayed(round_trip: float) -> Iterator[None]:
    """Delays each packet over loopback by half of the round trip (ms). Raises NoDelay."""
    if not round_trip:
        yield
        return
    if (tool := shutil.which("tc")) is None:
        raise NoDelay("tc of iproute2 is not installed")
    add = [tool, "qdisc", "add", "dev", "lo", "root", "netem", "delay", f"{round_trip / 2}ms", "limit", "100000"]
    done = subprocess.run(add, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoDelay(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run([tool, "qdisc", "del", "dev", "lo", "root"], check=True)


@contextlib.asynccontextmanager
async def attached(key: DeviceKey) -> AsyncIterator[Attachment]:
    """Yields the device, attached with the plugin's own client and driver."""
    clock = SystemClock()
    driver = SysfsVhci(clock, NetlinkUevents(clock))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(driver.run())
        with contextlib.closing(TcpUsbipClient(clock)) as client:
            imported = await client.import_device(key, timeout=LIMIT_S)
        with contextlib.closing(imported):
            port = await driver.attach(key, imported.descriptor, imported.sock.fileno())
        yield await driver.enumerate(key, imported.descriptor, port, timeout=LIMIT_S)
        await driver.detach(port, timeout=LIMIT_S)
        running.cancel()


def measured(usbipd: RealUsbipd, round_trip: float, disk: Attachment, converter: Attachment, count: int) -> list[Row]:
    latencies = {
        "TCP connect": [_timed(lambda: _connect(usbipd)) for _ in range(count)],
        "control transfer": list(_control_transfers(_node(disk, "usb"), count)),
        "serial request and answer": list(_serial_answers(usbipd, _node(converter, "tty"), count)),
    }
    block = _node(disk, "block")
    rates = {"disk read": _rate(block, os.O_RDONLY), "disk write": _rate(block, os.O_WRONLY)}
    about = f"round trip {round_trip:g} ms"
    return [
        *(
            Row(f"{about}: {name}, p50", percentile(times, 50), "ms", samples=count)
            for name, times in latencies.items()
        ),
        *(Row(f"{about}: {name}", rate, "MB/s") for name, rate in rates.items()),
    ]


def _node(attachment: Attachment, kind: str) -> str:
    return next(node.path for node in attachment.nodes if node.kind == kind)


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return (time.monotonic() - began) * 1e3


def _connect(usbipd: RealUsbipd) -> None:
    """Connects, which takes one round trip of the network."""
    socket.create_connection((usbipd.key.host, usbipd.key.port), timeout=LIMIT_S).close()


def _control_transfers(node: str, count: int) -> Iterator[float]:
    """Yields the milliseconds of each GET_DESCRIPTOR of the device, which is read from the device each time."""
    data = ctypes.create_string_buffer(DESCRIPTOR_BYTES)
    get_device = (0x80, 6, 0x0100, 0, DESCRIPTOR_BYTES, int(LIMIT_S * 1000), ctypes.addressof(data))
    request = struct.pack("@BBHHHIP", *get_device)
    fd = os.open(node, os.O_RDWR)
    try:
        for _ in range(count):
            yield _timed(lambda: fcntl.ioctl(fd, USBDEVFS_CONTROL, request))
    finally:
        os.close(fd)


def _serial_answers(usbipd: RealUsbipd, node: str, count: int) -> Iterator[float]:
    """Yields the milliseconds until a byte, which the other end of the cable sends back at once, has returned."""
    tty = DEVICES / usbipd.busid(LOCAL_END)
    eventually(lambda: any(tty.glob("*:*/ttyUSB*")), "a tty at the other end of the cable")
    other_end = f"/dev/{next(tty.glob('*:*/ttyUSB*')).name}"
    with raw_tty(node) as here, raw_tty(other_end) as there:
        for _ in range(count):
            yield _timed(lambda: _ask(here, there))


def _ask(here: int, there: int) -> None:
    os.write(here, b"?")
    os.write(there, _read(there))
    _read(here)


def _read(fd: int) -> bytes:
    ready, _, _ = select.select([fd], [], [], LIMIT_S)
    assert ready, f"no byte within {LIMIT_S:g} s"
    return os.read(fd, 1)


def _rate(node: str, access: int) -> float:
    """Returns the MB/s at which the disk is read or written from its beginning, past the page cache."""
    with mmap.mmap(-1, BLOCK_BYTES) as block:  # a page's alignment, which O_DIRECT needs
        fd = os.open(node, access | os.O_DIRECT)
        try:
            transfer = os.preadv if access == os.O_RDONLY else os.pwritev
            began = time.monotonic()
            for start in range(0, DISK_BYTES, BLOCK_BYTES):
                done = transfer(fd, [block], start)
                assert done == BLOCK_BYTES, done
            return DISK_BYTES / (time.monotonic() - began) / 1e6
        finally:
            os.close(fd)
