"""The far end of the serial converter that the pod has: its twin, on the same null-modem cable, left to the guest."""

from __future__ import annotations

import contextlib
import os
import select
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path

ANSWER_S = 60.0

POD_SCRIPT = """
import os, tty
path = os.environ["USBIP_SERIAL_0_TTY"]
fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
tty.setraw(fd)
print("opened", path, flush=True)
while data := os.read(fd, 4096):
    os.write(fd, data.upper())
print("hung up", flush=True)
"""
"""A container's process that answers every byte with its upper case, until the device ends."""


@contextlib.contextmanager
def far_end(busid: str) -> Iterator[int]:
    """A file descriptor of the tty of the guest's own device with this busid."""
    (found,) = Path(f"/sys/bus/usb/devices/{busid}:1.0").glob("ttyUSB*")
    fd = os.open(f"/dev/{found.name}", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield fd
    finally:
        os.close(fd)


def answer(fd: int, text: bytes) -> bytes:
    """What comes back for it, as many bytes; fewer if they do not come in time."""
    os.write(fd, text)
    got, end = b"", time.monotonic() + ANSWER_S
    while len(got) < len(text) and (left := end - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            got += os.read(fd, 4096)
    return got
