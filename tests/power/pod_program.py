"""pod_program.py tty|block PATH NAME: a container's process that writes to its device and reads it back, for ever.

tty: a line, which the device echoes. block: a block of a disk, past the page cache.
Prints one JSON object a line: {"round": N} after each round, {"lost": "ENODEV"} when the device failed. Then opens the
device until it is back, as programs do that talk to USB devices. Ends if the disk has a block of another process.

Only for the guest, and without the project's modules: a bare interpreter starts soon in emulation.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import sys
import termios
import time
import tty

BLOCK = 4096
PLACES = 64
"""Blocks that are written in turn."""
PACE_S = 0.2
OPEN_AGAIN_S = 0.1


def say(**what: object) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


class Tty:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            tty.setraw(self._fd, termios.TCSANOW)
        except termios.error as error:
            os.close(self._fd)
            raise OSError(error.args[0], "no terminal") from error
        self._received = b""

    def turn(self, name: str, number: int) -> None:
        line = f"{name} {number}".encode()
        os.write(self._fd, line + b"\n")
        while line not in self._received.split(b"\n")[:-1]:
            select.select([self._fd], [], [])
            data = os.read(self._fd, BLOCK)
            if not data:
                raise OSError(errno.ENODEV, "hung up")
            self._received += data
        self._received = b""

    def close(self) -> None:
        os.close(self._fd)


class Disk:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_SYNC)
        self._block = mmap.mmap(-1, BLOCK)

    def turn(self, name: str, number: int) -> None:
        stamp = f"{name} {number}\n".encode().ljust(BLOCK, b"\0")
        place = number % PLACES * BLOCK
        self._block[:] = stamp
        if os.pwritev(self._fd, [self._block], place) != BLOCK:
            raise OSError(errno.EIO, "short write")
        self._block[:] = bytes(BLOCK)
        if os.preadv(self._fd, [self._block], place) != BLOCK:
            raise OSError(errno.EIO, "short read")
        if self._block[:] != stamp:
            sys.exit(f"the disk has {self._block[:64]!r} instead of {stamp[:64]!r}")

    def close(self) -> None:
        os.close(self._fd)
        self._block.close()


def main(kind: str, path: str, name: str) -> None:
    number = 0
    while True:
        try:
            device = Tty(path) if kind == "tty" else Disk(path)
        except OSError:
            time.sleep(OPEN_AGAIN_S)
            continue
        try:
            while True:
                device.turn(name, number)
                say(round=number)
                number += 1
                time.sleep(PACE_S)
        except OSError as error:
            say(lost=errno.errorcode.get(error.errno or 0, str(error)))
        finally:
            device.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
