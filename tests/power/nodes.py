"""A node of the lab: a guest with the plugin, a kubelet's double, and pods with programs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.apiserver.node_tokens import NAMESPACE
from tests.power.devices import ADDRESSES, CONFIG, DOMAIN
from tests.power.guests import PATIENCE_S, Guest
from usbip_plugin.model import DeviceKey, PodRef


@dataclass
class Program:
    """What is known of a pod's program.

    last: when its last round ended, by time.monotonic(); None before the first.
    began: when that round began, or earlier. A frozen node may report a round after its thaw that had ended before.
    losses: how often its device failed.
    ended: its exit status.
    """

    rounds: int = 0
    last: float | None = None
    began: float | None = None
    losses: int = 0
    ended: int | None = None


class Node(Guest):
    """A node. health: of each device of each resource, as the kubelet has it."""

    def __init__(self, name: str, directory: Path, logs: Path, tasks: asyncio.TaskGroup) -> None:
        super().__init__(name, ADDRESSES[name], "tests.power.guest_node", directory, logs, tasks)
        self.health: dict[str, dict[str, bool]] = {}
        self.programs: dict[str, Program] = {}
        self.plugin_ended: int | None = None

    def on_event(self, message: dict[str, Any]) -> None:
        if message["event"] == "health":
            self.health = message["health"]
        elif message["event"] == "plugin-ended":
            self.plugin_ended = message["status"]
        else:
            self._program(self.programs.setdefault(message["pod"], Program()), message)

    def _program(self, program: Program, message: dict[str, Any]) -> None:
        if "round" in message:
            program.rounds = message["round"] + 1
            program.began, program.last = program.last, time.monotonic()
        elif "lost" in message:
            program.losses += 1
        else:
            program.ended = message["ended"]

    def health_of(self, resource: str, key: DeviceKey) -> bool | None:
        """Returns whether the device is Healthy for the kubelet; None if it is not in the list."""
        return self.health.get(f"{DOMAIN}/{resource}", {}).get(key.id)

    def state(self) -> str:
        return f"health: {self.health}; programs: {self.programs}; plugin ended: {self.plugin_ended}"

    async def run_plugin(self, kubeconfig: str) -> None:
        self.health, self.programs, self.plugin_ended = {}, {}, None
        arguments = [
            *("--kubeconfig", kubeconfig, "--namespace", NAMESPACE, "--node-name", self.name),
            *("--listen", "127.0.0.1:8080", "--log-level", "debug"),
        ]
        await self.call("start", config=CONFIG, arguments=arguments, log=str(self.logs / "plugin.log"))


@dataclass(frozen=True)
class Pod:
    """A pod with one device and its program. path: of the device node that the program opens."""

    reference: PodRef
    node: Node
    resource: str
    path: str
    program: Program

    async def rounds_after(self, at: float, limit: float = PATIENCE_S) -> float:
        """Waits for a round of its program that began after a moment. Returns the seconds from then until its end."""

        def after() -> float:
            assert self.program.ended is None, f"the program of {self.reference} has ended: {self.program.ended}"
            began, last = self.program.began, self.program.last
            return last - at if began is not None and last is not None and began >= at else 0.0

        return await self.node.until(after, f"{self.reference} uses its {self.resource}", limit)
