"""guest_server.py: what runs on the USB/IP server of tests/power: usbipd or `usbip-plugin export`, and an observer.

The observer reports each change of what the kernel exports. The tests give orders over the channel. Only for the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import Process
from dataclasses import dataclass
from pathlib import Path

from tests.power.channel import GuestEnd, appended, write
from tests.rigs.usbipd import PORT, STUB, RealUsbipd, eventually

MODULES = ("xhci-pci", "usbip-host")
PERIOD_S = 0.1
"""Seconds between two looks at the kernel. It announces no end of an export."""
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ESTABLISHED = "01"  # TCP_ESTABLISHED in /proc/net/tcp
CONFIG = Path("/run/export.yaml")
START_S = 180.0
"""Seconds until the exporter accepts connections, while other guests boot on a busy machine."""
USED = "2"  # SDEV_ST_USED


@dataclass(frozen=True)
class Exports:
    """What the kernel exports at one moment.

    status: usbip_status by bus ID.
    peers: addresses and ports of the established connections that the kernel has, and no process.
    """

    status: dict[str, str]
    peers: frozenset[str]

    @property
    def in_use(self) -> int:
        return sum(status == USED for status in self.status.values())


def look(pid: int | None) -> Exports:
    """Looks at the kernel. pid: the process that accepts connections."""
    # what the process accepts or closes meanwhile is among its own before or after
    own = _sockets(pid)
    lines = [line for table in TABLES if table.exists() for line in table.read_text().splitlines()[1:]]
    own |= _sockets(pid)
    peers = set()
    for line in lines:
        _, local, remote, state, *rest = line.split()
        inode = rest[5]
        if state == ESTABLISHED and local.endswith(f":{PORT:04X}") and inode != "0" and inode not in own:
            peers.add(_endpoint(remote))
    status = {}
    for device in STUB.glob("[0-9]*-*"):
        with contextlib.suppress(OSError):  # it is being unplugged
            status[device.name] = (device / "usbip_status").read_text().strip()
    return Exports(status, frozenset(peers))


def _sockets(pid: int | None) -> set[str]:
    """Returns the inodes of the sockets of a process and its children: usbipd forks for each connection."""
    processes = [str(pid)]
    with contextlib.suppress(OSError):
        processes += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))  # noqa: PTH115
    return found


def _endpoint(text: str) -> str:
    """Returns "ADDRESS:PORT" for an entry with an IPv4 address, also one within an IPv6 address.

    The kernel writes words of the machine's byte order.
    """
    address, port = text.split(":")
    return ".".join(str(byte) for byte in bytes.fromhex(address[-8:])[::-1]) + f":{int(port, 16)}"


class Server:
    """The handlers of the server."""

    def __init__(self) -> None:
        self._usbipd = RealUsbipd()
        self._exporter: Process | None = None
        self.end = GuestEnd(
            {
                "peers": self.peers,
                "bind": self.bind,
                "start-usbipd": self.start_usbipd,
                "start-exporter": self.start_exporter,
                "stop": self.stop,
                "drop": self.drop,
            }
        )

    def load_modules(self) -> None:
        self._usbipd.load_modules(MODULES)

    @property
    def _pid(self) -> int | None:
        if self._exporter is not None:
            return self._exporter.pid
        return self._usbipd.pid if self._usbipd.running else None

    async def peers(self) -> list[str]:
        """Returns the connections that the kernel has now."""
        return sorted(look(self._pid).peers)

    async def bind(self, serials: list[str]) -> dict[str, str]:
        """Binds devices to usbip-host as soon as the kernel has found them. Returns {serial number: bus ID}."""

        def bind() -> dict[str, str]:
            found = {serial: self._usbipd.busid(serial) for serial in serials}
            for busid in found.values():
                self._usbipd.bind(busid)
            return found

        return await asyncio.to_thread(bind)

    async def start_usbipd(self) -> None:
        """Starts usbipd. Returns when it accepts connections."""
        await asyncio.to_thread(self._usbipd.start)

    async def start_exporter(self, config: str, arguments: list[str], log: str) -> None:
        """Starts the exporter, whose log outlives the guest. Returns when it accepts connections."""
        write(CONFIG, config)
        with appended(log) as output:
            self._exporter = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "usbip_plugin", "export", "--config", str(CONFIG), *arguments),
                stdout=output,
                stderr=output,
            )
        await asyncio.to_thread(eventually, self._usbipd.accepts, "the exporter accepts connections", START_S)

    async def stop(self) -> None:
        """Ends usbipd or the exporter."""
        if self._exporter is not None:
            with contextlib.suppress(ProcessLookupError):
                self._exporter.terminate()
            await self._exporter.wait()
            self._exporter = None
        await asyncio.to_thread(self._usbipd.stop)

    async def drop(self, busid: str) -> None:
        """Ends the import of a device, as a person does who knows how."""
        self._usbipd.drop(busid)

    async def observe(self) -> None:
        """Reports every change of what the kernel exports, and whether it has more connections than devices in use.

        Only a connection that was there in two looks counts: a list may come and go within one.
        """
        before, reported = look(self._pid), None
        while True:
            now = look(self._pid)
            peers = now.peers & before.peers
            report = now.status, sorted(peers), len(peers) > max(now.in_use, before.in_use)
            if report != reported:
                self.end.event("exports", status=report[0], peers=report[1], excessive=report[2])
            before, reported = now, report
            await asyncio.sleep(PERIOD_S)


async def main() -> None:
    server = Server()
    server.load_modules()
    await server.end.open()
    async with asyncio.TaskGroup() as tasks:
        observing = tasks.create_task(server.observe())
        await server.end.serve(tasks)
        observing.cancel()


if __name__ == "__main__":
    asyncio.run(main())
