"""The far end of the pod's serial converter: its twin on the null-modem cable, which stays in the guest."""

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
"""Program of a container that answers every byte with its upper case, until the device ends."""


@contextlib.contextmanager
def far_end(busid: str) -> Iterator[int]:
    """Yields a file descriptor of the tty of the guest's device with this bus ID."""
    (found,) = Path(f"/sys/bus/usb/devices/{busid}:1.0").glob("ttyUSB*")
    fd = os.open(f"/dev/{found.name}", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield fd
    finally:
        os.close(fd)


def answer(fd: int, text: bytes) -> bytes:
    """Returns the answer to a text: as many bytes, or fewer after ANSWER_S."""
    os.write(fd, text)
    got, end = b"", time.monotonic() + ANSWER_S
    while len(got) < len(text) and (left := end - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            got += os.read(fd, 4096)
    return got
