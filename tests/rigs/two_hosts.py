"""Two hosts on one cable: network namespaces of this machine, a client in one and a virtual server in the other.

Real TCP, so a cut loses what is under way, and each kernel side keeps its own idea of a connection. Needs root or
unprivileged user namespaces, and the programs unshare, nsenter and ip.

A case is a coroutine function that takes Hosts. It runs in a process of its own, which run_case() starts:

    python -m tests.rigs.two_hosts MODULE FUNCTION      the client's host; starts the other
    python -m tests.rigs.two_hosts                      the server's host
"""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from usbip_plugin.model import Endpoint, ServerKey, UsbId
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

LIMIT_S = 60.0
"""Limits a case, in seconds. Only a hanging case reaches it."""
MODULE = "tests.rigs.two_hosts"
ROOT = Path(__file__).resolve().parents[2]
CLIENT, SERVER = "10.9.0.1", ServerKey("10.9.0.2", 3240)
BUSID = "1-1"
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
"""Hardware addresses. Each host knows the other's: packets that wait for one would arrive after a cut."""
UNSHARE = ("unshare", "--net", "--kill-child", "--fork")
AS_USER = ("--user", "--map-root-user")


def unshare() -> tuple[str, ...] | None:
    """Returns the command that runs another in a network of its own, None if this machine or user has none."""
    if not all(shutil.which(program) for program in ("unshare", "nsenter", "ip")):
        return None
    for command in (UNSHARE, (*UNSHARE, *AS_USER)):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def run_case(case: Callable[[Hosts], Awaitable[None]]) -> None:
    """Runs a case. Raises AssertionError with the output of its processes if it fails."""
    command = [*(unshare() or ()), sys.executable, "-m", MODULE, case.__module__, case.__qualname__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


class Hosts:
    """The client's host, in which the case runs, and the server's."""

    def __init__(self, other: asyncio.subprocess.Process) -> None:
        self._other = other

    async def importers(self) -> list[Endpoint | None]:
        """Returns to which connections the server exports its device."""
        assert self._other.stdin is not None
        self._other.stdin.write(b"\n")
        return [Endpoint.parse(text) for text in json.loads(await self.answer())]

    async def until_importers(self, expected: list[Endpoint]) -> None:
        """Waits until the server exports its device to these connections."""
        async with asyncio.timeout(LIMIT_S):
            while await self.importers() != expected:
                pass

    async def answer(self) -> str:
        assert self._other.stdout is not None
        line = await self._other.stdout.readline()
        assert line, "the server has ended"
        return line.decode()

    async def cut(self) -> None:
        """Cuts the cable: neither host gets an error, and nothing that is sent meanwhile arrives, also not later."""
        await self.there("link", "set", "v1", "down")

    async def mend(self) -> None:
        await self.there("link", "set", "v1", "up")
        await self.there("neigh", "replace", CLIENT, "lladdr", MACS[0], "dev", "v1", "nud", "permanent")

    async def there(self, *arguments: str) -> None:
        await ip("nsenter", "--target", str(self._other.pid), "--net", "ip", *arguments)


async def ip(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0, command


async def _client(case: Callable[[Hosts], Awaitable[None]]) -> None:
    command = ("unshare", "--net", sys.executable, "-m", MODULE)
    pipe = asyncio.subprocess.PIPE
    other = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
    hosts = Hosts(other)
    try:
        async with asyncio.timeout(LIMIT_S):
            await hosts.answer()  # it has its own network
            for line in (
                "link set lo up",
                f"link add v0 address {MACS[0]} type veth peer name v1 address {MACS[1]} netns {other.pid}",
                f"addr add {CLIENT}/24 dev v0",
                "link set v0 up",
                f"neigh replace {SERVER.host} lladdr {MACS[1]} dev v0 nud permanent",
            ):
                await ip("ip", *line.split())
            await hosts.there("link", "set", "lo", "up")
            await hosts.there("addr", "add", f"{SERVER.host}/24", "dev", "v1")
            await hosts.mend()
            await hosts.importers()  # it listens
            await case(hosts)
    finally:
        other.kill()
        await other.wait()


async def _server() -> None:
    print(flush=True)
    loop, lines = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await lines.readline()  # the address is there
    server = VirtualServer([VirtualDevice(BUSID, UsbId(0x0951, 0x1666))], SERVER.host, SERVER.port)
    await server.start()
    while True:
        print(json.dumps([str(peer) for peer in server.peers(BUSID)]), flush=True)
        if not await lines.readline():
            return


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(_client(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])))
    else:
        asyncio.run(_server())
