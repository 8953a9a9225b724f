"""guest_node.py: what runs on a node of tests/power: `usbip-plugin run`, a kubelet's double, and pods' programs.

The tests give its orders over the channel. Only for the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import subprocess
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.power.channel import GuestEnd, appended, write
from usbip_plugin.model import PodRef
from usbip_sim.kubelet.kubelet import FakeKubelet

HOME = Path("/run/node")
PLUGINS, POD_RESOURCES = HOME / "device-plugins", HOME / "pod-resources.sock"
PROGRAM = Path(__file__).with_name("pod_program.py")
MODULES = ("vhci-hcd", "usb-storage", "sd_mod", "usbserial", "ftdi_sio")
STATUS = "devices/platform/vhci_hcd.0/status*"
FREE = "004"
HTTP_S = 30.0


class Node:
    """The handlers of a node. resources: those that the kubelet's double reports to the tests."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._plugin: Process | None = None
        self._programs: dict[str, Process] = {}
        self._reported: object = None
        self.end = GuestEnd(
            {
                "start": self.start,
                "admit": self.admit,
                "end": self.end_pod,
                "program": self.program,
                "ports": self.ports,
                "get": self.get,
            }
        )
        PLUGINS.mkdir(parents=True)
        self.kubelet = FakeKubelet(PLUGINS, POD_RESOURCES)
        self.kubelet.changed.subscribe(self._report)

    def _report(self) -> None:
        health = {resource: self.kubelet.health(resource) for resource in self.kubelet.manager.healthy}
        if health != self._reported:
            self._reported = health
            self.end.event("health", health=health)

    async def start(self, config: str, arguments: list[str], log: str) -> int:
        """Starts the plugin, whose log goes to a file that outlives the guest. Returns its pid."""
        file = HOME / "config.yaml"
        write(file, config)
        with appended(log) as output:
            self._plugin = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "usbip_plugin", "run", "--config", str(file)),
                *("--plugin-directory", str(PLUGINS), "--pod-resources-socket", str(POD_RESOURCES)),
                *arguments,
                stdout=output,
                stderr=output,
            )
        self._tasks.create_task(self._wait(self._plugin))
        return self._plugin.pid

    async def _wait(self, plugin: Process) -> None:
        self.end.event("plugin-ended", status=await plugin.wait())

    async def admit(self, pod: Mapping[str, str], limits: Mapping[str, int]) -> dict[str, Any]:
        """Admits a pod. Returns the paths of the device nodes that its container gets, by kind."""
        got = await self.kubelet.admit(PodRef(**pod), dict(limits))
        paths = [device.host_path for allocation in got.values() for device in allocation.devices]
        return {
            "block": [path for path in paths if stat.S_ISBLK(os.stat(path).st_mode)],  # noqa: PTH116
            "tty": [path for path in paths if path.startswith("/dev/tty")],
        }

    async def end_pod(self, pod: Mapping[str, str]) -> None:
        """Ends a pod and its program."""
        reference = PodRef(**pod)
        program = self._programs.pop(reference.name, None)
        if program is not None:
            with contextlib.suppress(ProcessLookupError):
                program.kill()
        self.kubelet.end(reference)

    async def program(self, pod: Mapping[str, str], kind: str, path: str) -> None:
        """Starts the pod's program; see pod_program.py for the events "program"."""
        name = PodRef(**pod).name
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(PROGRAM), kind, path, f"{os.uname().nodename}/{name}"), stdout=PIPE
        )
        self._programs[name] = process
        self._tasks.create_task(self._follow(name, process))

    async def _follow(self, name: str, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self.end.event("program", pod=name, **json.loads(line))
        status = await process.wait()
        if self._programs.get(name) is process:
            self.end.event("program", pod=name, ended=status)

    async def ports(self) -> list[str]:
        """Returns the status rows of all vhci ports in use, as the kernel writes them."""
        return busy_rows()

    async def get(self, url: str) -> str:
        """Returns a page of the plugin."""

        def request() -> str:
            with urllib.request.urlopen(url, timeout=HTTP_S) as answer:
                text: str = answer.read().decode()
                return text

        return await asyncio.to_thread(request)


def busy_rows() -> list[str]:
    lines = [line for file in sorted(Path("/sys").glob(STATUS)) for line in file.read_text().splitlines()]
    return [line for line in lines if line.split()[0] in ("hs", "ss") and line.split()[2] != FREE]


async def main() -> None:
    async with asyncio.TaskGroup() as tasks:
        node = Node(tasks)
        await node.end.open()
        async with node.kubelet:
            await node.end.serve(tasks)


if __name__ == "__main__":
    for module in MODULES:
        subprocess.run(["modprobe", module], check=True)
    asyncio.run(main())
