"""Control of a test cluster's nodes: kubelets, processes in containers, the API server."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from usbip_plugin.kubelet.registration import identify

LIMIT_S = 60.0
STOP_S = 120.0
LAB = Path(__file__).parents[1] / "lab" / "cluster"

PLUGIN = "usbip_plugin run"
KERNEL = "usbip_plugin simulate kernel"
Action = Literal["stop", "start", "restart"]


class Nodes(Protocol):
    """Control of nodes. Every call ends within LIMIT_S (API server: STOP_S), with CalledProcessError if it failed."""

    def kubelet(self, node: str, action: Action) -> None: ...
    def kill(self, node: str, pattern: str) -> None:
        """Kills the processes of the node's containers whose command line matches. There must be at least one."""
        ...

    def pids(self, node: str, pattern: str) -> list[int]:
        """Returns the processes of the node's containers whose command line matches."""
        ...

    def run(self, node: str, *command: str) -> str:
        """Returns the output of a command in the node's mount and network namespace, where /proc has those pids."""
        ...


def _run(*command: str, limit: float = LIMIT_S) -> str:
    return subprocess.run(command, timeout=limit, check=True, capture_output=True, text=True).stdout


class KindNodes:
    """Nodes of kind, which are containers with systemd."""

    def kubelet(self, node: str, action: Action) -> None:
        self.run(node, "systemctl", action, "kubelet")

    def kill(self, node: str, pattern: str) -> None:
        self.run(node, "pkill", "-KILL", "-f", pattern)

    def pids(self, node: str, pattern: str) -> list[int]:
        return [int(pid) for pid in self.run(node, "pgrep", "-f", pattern).split()]

    def run(self, node: str, *command: str) -> str:
        return _run("docker", "exec", node, *command)


@dataclass(frozen=True)
class LabNodes:
    """Nodes of tests/lab/cluster. state: the directory given to up.sh."""

    state: Path

    def kubelet(self, node: str, action: Action) -> None:
        self._do(f"{action}-kubelet", node)

    def kill(self, node: str, pattern: str) -> None:
        self._do("kill", node, pattern)

    def pids(self, node: str, pattern: str) -> list[int]:
        return [int(pid) for pid in self._do("pids", node, pattern).split()]

    def run(self, node: str, *command: str) -> str:
        return self._do("exec", node, *command)

    def stop_api_server(self) -> None:
        """Stops the API server. Nothing listens on its port afterwards."""
        _run(str(LAB / "control.sh"), str(self.state), "stop", "apiserver", limit=STOP_S)

    def start_api_server(self) -> None:
        """Starts the API server unless it runs, and waits until it is ready."""
        _run(str(LAB / "control.sh"), str(self.state), "start", "apiserver", limit=STOP_S)

    def plugin_socket(self, node: str, resource: str) -> Path:
        """Returns the newest socket of the plugin for a resource: that of a killed plugin stays for a while."""
        sockets = (self.state / node / "kubelet" / "device-plugins").glob(f"usbip-{resource}*.sock")
        return max((found.modified_ns, path) for path in sockets if (found := identify(path)) is not None)[1]

    def pod_log(self, node: str, namespace: str, pod: str) -> list[str]:
        """Returns the log of a pod's containers from the node's files, without the API server."""
        files = (self.state / node / "logs").glob(f"{namespace}_{pod}_*/*/*.log")
        return [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]

    def _do(self, verb: str, node: str, *arguments: str) -> str:
        return _run(str(LAB / "node.sh"), str(self.state), verb, node, *arguments)
