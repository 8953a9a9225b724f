"""QEMU's monitor in the guest, which unplugs USB devices and plugs them in at other ports."""

from __future__ import annotations

import json
import os
import select
import time
from pathlib import Path
from typing import Any

from tests.rigs.usbipd import RealUsbipd, eventually

PORTS = Path("/sys/class/virtio-ports")
NAME = "monitor"
ANSWER_S = 10.0
FREE_PORT = "7"
"""An unused port of the converters' controller. usb_devices in run.sh uses ports from 1 upwards."""


class Monitor:
    """A QMP client over a virtio port, for the guest only. The caller must close it."""

    def __init__(self) -> None:
        name = next(port.parent.name for port in PORTS.glob("*/name") if port.read_text().strip() == NAME)
        self._fd = os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK)
        self._received = b""
        self._ids = 0
        self._call("qmp_capabilities")  # fails harmlessly after an earlier test

    def close(self) -> None:
        os.close(self._fd)

    def unplug(self, usbipd: RealUsbipd, number: int, serial: str) -> None:
        """Unplugs serial converter 0 or 1, and waits until the guest's kernel has noticed."""
        self.execute("device_del", id=f"converter{number}")
        eventually(lambda: serial not in usbipd.busids(), f"{serial} is unplugged")

    def plug(self, usbipd: RealUsbipd, number: int, serial: str, port: str = FREE_PORT) -> str:
        """Plugs in serial converter 0 or 1, binds it to usbip-host and returns its bus ID."""
        self.insert(number, serial, port)
        busid = usbipd.busid(serial)
        usbipd.bind(busid)
        return busid

    def insert(self, number: int, serial: str, port: str) -> None:
        """Plugs in serial converter 0 or 1."""
        # QEMU frees the cable a moment after the device is gone
        eventually(lambda: self._plugged(number, serial, port), f"{serial} is plugged in")

    def _plugged(self, number: int, serial: str, port: str) -> bool:
        answer = self._call(
            "device_add",
            driver="usb-serial",
            id=f"converter{number}",
            bus="x0.0",
            port=port,
            chardev=f"cable{number}",
            serial=serial,
            **{"always-plugged": True},
        )
        assert "return" in answer or "is in use" in answer["error"]["desc"], answer
        return "return" in answer

    def execute(self, command: str, **arguments: object) -> None:
        """Sends a command. Raises AssertionError if QEMU refuses it."""
        answer = self._call(command, **arguments)
        assert "return" in answer, answer

    def _call(self, command: str, **arguments: object) -> dict[str, Any]:
        self._ids += 1
        number = f"{os.getpid()}-{self._ids}"
        request = {"execute": command, "id": number, **({"arguments": arguments} if arguments else {})}
        os.write(self._fd, json.dumps(request).encode() + b"\n")
        end = time.monotonic() + ANSWER_S
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                message: dict[str, Any] = json.loads(line)
                if message.get("id") == number:
                    return message
            else:
                ready, _, _ = select.select([self._fd], [], [], max(0.0, end - time.monotonic()))
                assert ready, f"no answer to {command} within {ANSWER_S:g} s"
                self._received += os.read(self._fd, 4096)
