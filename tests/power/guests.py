"""A guest of the lab: boots on the bridge, can lose its power or be frozen, and answers over a channel."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.power.bridge import PREFIX
from tests.power.channel import MAX_LINE, Channel
from usbip_plugin.sync import Broadcast

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "lab" / "guest" / "run.sh"
MEMORY_MB = 640
LIFE_S = 4 * 3600
"""Seconds after which a guest is ended, whatever happens."""
BOOT_S = 180.0
"""Seconds until the guest's process answers, on a busy machine."""
CALL_S = 200.0
"""Seconds for a call. The guest is emulated."""
EMULATED_S = 4.0
"""Seconds that emulation may add to a limit that holds on real machines."""
PATIENCE_S = 120.0
"""Seconds for an event that must come."""


class Guest:
    """One guest, which may boot several times.

    name: its host name, and that of its tap device.
    module: the Python module that it runs.
    directory: for sockets. logs: a directory that it shares with the guest; the rest of its disk is gone with it.
    changed: fires at every event, and when the guest has ended.
    """

    def __init__(
        self, name: str, address: str, module: str, directory: Path, logs: Path, tasks: asyncio.TaskGroup
    ) -> None:
        self.name, self.address, self.logs = name, address, logs / name
        self.changed = Broadcast()
        self._module, self._tasks = module, tasks
        self._sockets = {which: directory / f"{name}.{which}" for which in ("control", "qmp")}
        self._pid_file = directory / f"{name}.pid"
        self._process: Process | None = None
        self._channel: Channel | None = None
        self._qmp: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._is_ready = False
        self.listeners: list[asyncio.Server] = []
        self.logs.mkdir(parents=True, exist_ok=True)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def listen(self) -> None:
        """Listens for the emulator, which connects at each boot."""
        for handler, which in ((self._control, "control"), (self._monitor, "qmp")):
            self.listeners.append(await asyncio.start_unix_server(handler, self._sockets[which], limit=MAX_LINE))

    async def close(self) -> None:
        """Ends the guest and stops listening."""
        if self.running:
            await self.cut_power()
        for listener in self.listeners:
            listener.close()

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._channel = Channel(reader, writer, self._event)
        await self._channel.run()

    async def _monitor(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._qmp = reader, writer
        await self._execute("qmp_capabilities")

    def _event(self, message: dict[str, Any]) -> None:
        if message["event"] == "ready":
            self._is_ready = True
        else:
            self.on_event(message)
        self.changed.fire()

    def on_event(self, message: dict[str, Any]) -> None:
        """Handles an event of the guest's process."""

    def devices(self) -> Sequence[str]:
        """Returns more arguments for the emulator. None of them has a space."""
        return ()

    async def boot(self) -> None:
        """Boots the guest, and waits until its process answers. Raises AssertionError if it does not."""
        assert not self.running
        self._is_ready = False
        mac = f"52:54:00:77:00:{int(self.address.rpartition('.')[2]):02x}"
        emulator = [
            *("-pidfile", self._pid_file),
            *("-netdev", f"tap,id=net,ifname={self.name},script=no,downscript=no"),
            *(
                "-device",
                f"virtio-net-pci,netdev=net,romfile=,mac={mac}",
            ),
            *("-chardev", f"socket,id=control,path={self._sockets['control']}"),
            *("-device", "virtserialport,chardev=control,name=control,nr=1"),
            *("-chardev", f"socket,id=qmp,path={self._sockets['qmp']}", "-mon", "chardev=qmp,mode=control"),
            *self.devices(),
        ]
        command = (
            f"ip addr flush dev eth0; ip addr add {self.address}/{PREFIX} dev eth0; ip link set eth0 up; "
            f"hostname {self.name}; exec {sys.executable} -m {self._module}"
        )
        options = ("-r", "-C", "-m", MEMORY_MB, "-t", LIFE_S, "-w", self.logs, "-k", os.environ["POWER_IMAGE"])
        with (self.logs / "guest.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *map(str, (RUN, *options, "-q", " ".join(map(str, emulator)), command)),
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        self._tasks.create_task(self._wait(self._process))
        await self.until(lambda: self._is_ready, "its process answers", BOOT_S)

    async def _wait(self, process: Process) -> None:
        await process.wait()
        if self._qmp is not None:
            self._qmp[1].close()
        self.changed.fire()

    async def until(self, condition: Callable[[], T], what: str, limit: float = PATIENCE_S) -> T:
        """Waits until a condition on events holds, and returns its value. Raises AssertionError after limit seconds."""
        ended = False

        def reached() -> tuple[T] | None:
            nonlocal ended
            value = condition()
            ended = not value and not self.running
            return (value,) if value or ended else None

        try:
            async with asyncio.timeout(limit):
                found = await self.changed.until(reached)
        except TimeoutError:
            raise AssertionError(
                f"{self.name}: not within {limit:g} s: {what}; {self.state()}; logs: {self.logs}"
            ) from None
        assert found is not None
        assert not ended, f"{self.name} has ended before: {what}; logs: {self.logs}"
        return found[0]

    def state(self) -> str:
        """Returns what the guest has told, for messages."""
        return ""

    async def call(self, name: str, **arguments: Any) -> Any:
        """Calls a handler of the guest's process. Raises GuestError if it fails."""
        assert self._channel is not None
        return await self._channel.call(name, CALL_S, **arguments)

    async def cut_power(self) -> float:
        """Ends the emulator with SIGKILL, and returns when (time.monotonic)."""
        assert self._process is not None
        os.kill(int(self._pid_file.read_text()), signal.SIGKILL)
        at = time.monotonic()
        await self._process.wait()
        return at

    def suspend(self) -> float:
        """Stops the emulator with SIGSTOP, and returns when. The guest's clock jumps when it is continued."""
        os.kill(int(self._pid_file.read_text()), signal.SIGSTOP)
        return time.monotonic()

    def resume(self) -> float:
        os.kill(int(self._pid_file.read_text()), signal.SIGCONT)
        return time.monotonic()

    async def freeze(self) -> float:
        """Stops the guest, and returns when. Its clock stands still, so that it notices nothing."""
        await self._execute("stop")
        return time.monotonic()

    async def thaw(self) -> float:
        at = time.monotonic()
        await self._execute("cont")
        return at

    async def _execute(self, command: str) -> None:
        """Sends a command to QEMU's monitor. Raises AssertionError if QEMU refuses it."""
        assert self._qmp is not None
        reader, writer = self._qmp
        writer.write(json.dumps({"execute": command}).encode() + b"\n")
        async with asyncio.timeout(CALL_S):
            while True:
                message = json.loads(await reader.readline())
                assert "error" not in message, message
                if "return" in message:
                    return
