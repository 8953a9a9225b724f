"""The time that the kernel takes to attach and detach, without the plugin and without an event loop.

Run in the guest: tests/lab/guest/run.sh -u 'cd tests/kernel && PYTHONPATH=../.. python kernel_timing.py [RUNS]'.
Prints one JSON object: for each device, medians in milliseconds counted from the write to attach.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.rigs.usbipd import DEVICES, RealUsbipd, eventually
from usbip_plugin.usbip.wire import encode_import_request

BASE = Path("/sys/devices/platform/vhci_hcd.0")
CHILDREN = {"SERIAL1": "*/*/tty/*/dev", "KEYBOARD": "*/*/hidraw/*/dev", "DISKHS": "*/host*/target*/*/block/*/dev"}
REPLY = 8 + 312
LIMIT_S = 15.0


def main(runs: int) -> None:
    usbipd = RealUsbipd()
    usbipd.load_modules()
    for serial in CHILDREN:
        usbipd.bind(usbipd.busid(serial))
    usbipd.start()
    try:
        json.dump({serial: medians(usbipd, serial, runs) for serial in CHILDREN}, sys.stdout, indent=1)
        print()
    finally:
        usbipd.stop()


def medians(usbipd: RealUsbipd, serial: str, runs: int) -> dict[str, float]:
    taken = [once(usbipd, usbipd.busid(serial), CHILDREN[serial]) for _ in range(runs)]
    return {step: round(statistics.median(one[step] for one in taken), 1) for step in taken[0]}


def once(usbipd: RealUsbipd, busid: str, child: str) -> dict[str, float]:
    """Imports, attaches and detaches a device once, and returns the milliseconds of each step."""
    with socket.create_connection((usbipd.key.host, usbipd.key.port)) as sock:
        sock.sendall(encode_import_request(busid))
        reply = b""
        while len(reply) < REPLY:
            received = sock.recv(REPLY - len(reply))
            if not received:
                raise AssertionError(f"import of {busid} refused: {reply.hex()}")
            reply += received
        busnum, devnum, speed = (int.from_bytes(reply[at : at + 4]) for at in (296, 300, 304))
        start = time.monotonic()
        (BASE / "attach").write_text(f"0 {sock.fileno()} {busnum << 16 | devnum} {speed}")
    steps = {"write returned": since(start)}
    steps["status 006"] = until(start, lambda: row()[2] == "006")
    device = (DEVICES / row()[6]).resolve()
    steps["device node"] = until(start, (device / "dev").exists)
    steps["child node"] = until(start, lambda: any(device.glob(child)))
    start = time.monotonic()
    (BASE / "detach").write_text("0")
    steps["detach returned"] = since(start)
    steps["detach null"] = until(start, lambda: row()[2] == "004")
    steps["detach sysfs gone"] = until(start, lambda: not device.exists())
    eventually(lambda: usbipd.is_free(busid), "free on the server")
    return steps


def row() -> list[str]:
    return (BASE / "status").read_text().splitlines()[1].split()


def since(start: float) -> float:
    return (time.monotonic() - start) * 1000


def until(start: float, check: Callable[[], bool]) -> float:
    while not check():
        if since(start) > LIMIT_S * 1000:
            raise AssertionError(f"not within {LIMIT_S:g} s")
    return since(start)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
