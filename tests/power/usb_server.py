"""The USB/IP server of the lab: a guest with a converter and a disk, which usbipd or the exporter exports."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.power.devices import ADDRESSES, DISK, SERIALS, SERVER
from tests.power.guests import PATIENCE_S, Guest
from usbip_plugin.model import DeviceKey

DISK_MB = 8
FIRST_PORT = 1
FREE = "1"
"""usbip_status of a device that can be imported: SDEV_ST_AVAILABLE."""


class ServerKind(enum.Enum):
    """What exports the devices. STOCK: usbipd of Linux, without keepalive. EXPORTER: `usbip-plugin export`, fenced."""

    STOCK = "usbipd"
    EXPORTER = "exporter"


@dataclass(frozen=True)
class Exports:
    """What the server's kernel exported at a moment; see guest_server.py. at: by time.monotonic()."""

    at: float
    status: Mapping[str, str]
    peers: tuple[str, ...]
    excessive: bool

    def nodes(self) -> list[str]:
        """Returns the node of each connection."""
        names = {address: name for name, address in ADDRESSES.items()}
        return sorted(names[peer.rpartition(":")[0]] for peer in self.peers)


class UsbServer(Guest):
    """The USB/IP server. history: all that its kernel exported. first_port: of the controller that has the devices."""

    def __init__(self, directory: Path, logs: Path, tasks: asyncio.TaskGroup) -> None:
        super().__init__("server", ADDRESSES["server"], "tests.power.guest_server", directory, logs, tasks)
        self.history: list[Exports] = []
        self.kind: ServerKind | None = None
        self.first_port = FIRST_PORT
        self._disk = directory / "disk.img"
        self._disk.write_bytes(bytes(DISK_MB << 20))
        self._cable = directory / "cable"

    async def listen(self) -> None:
        await super().listen()
        self.listeners.append(await asyncio.start_unix_server(_echo, self._cable))

    def on_event(self, message: dict[str, Any]) -> None:
        self.history.append(
            Exports(time.monotonic(), message["status"], tuple(message["peers"]), bool(message["excessive"]))
        )

    def devices(self) -> Sequence[str]:
        return (
            *("-device", "qemu-xhci,id=x0,p2=8,p3=0", "-chardev", f"socket,id=cable,path={self._cable}"),
            *("-device", f"usb-serial,bus=x0.0,port={self.first_port},chardev=cable,serial=STICK,always-plugged=on"),
            *("-drive", f"if=none,id=disk,format=raw,file={self._disk}"),
            *("-device", f"usb-storage,bus=x0.0,port={self.first_port + 1},drive=disk,serial=DISK"),
        )

    def key(self, resource: str) -> DeviceKey:
        return DeviceKey(SERVER, f"1-{self.first_port + (resource == DISK)}")

    @property
    def now(self) -> Exports:
        return self.history[-1]

    def state(self) -> str:
        return f"exports: {self.history[-3:]}"

    async def until_free(self, resource: str, limit: float = PATIENCE_S) -> float:
        """Waits until the kernel has the device for export, and nobody uses it. Returns when."""
        busid = self.key(resource).busid
        await self.until(lambda: self.now.status.get(busid) == FREE, f"{busid} is free", limit)
        return time.monotonic()

    async def until_exported_to(self, *nodes: str) -> None:
        """Waits until the kernel has a connection of each of these nodes and no other. Reports come two looks late."""
        await self.until(lambda: self.now.nodes() == sorted(nodes), f"it exports devices to {', '.join(nodes)} only")

    def nodes_since(self, at: float) -> set[str]:
        """Returns the nodes that have been connected since a moment."""
        later = [exports for exports in self.history if exports.at > at]
        return {name for exports in (self.now, *later) for name in exports.nodes()}

    async def boot(self) -> None:
        self.kind = None
        await super().boot()

    async def serve(self, kind: ServerKind, exporter: Mapping[str, Any]) -> None:
        """Exports the devices. exporter: arguments of the call that starts it."""
        if self.kind is kind:
            return
        if self.kind is not None:
            await self.call("stop")
        if kind is ServerKind.STOCK:
            found = await self.call("bind", serials=list(SERIALS.values()))
            assert found == {serial: self.key(resource).busid for resource, serial in SERIALS.items()}
            await self.call("start-usbipd")
        else:
            await self.call("start-exporter", **exporter)
        self.kind = kind


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What the converter is wired to: it sends back every byte."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(4096):
            writer.write(data)
    writer.close()
