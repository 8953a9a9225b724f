"""What tests do to nodes: kubelets stopped and started, processes of containers killed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LIMIT_S = 60.0
LAB = Path(__file__).parents[1] / "lab" / "cluster" / "node.sh"

PLUGIN = "usbip_plugin run"
KERNEL = "usbip_plugin simulate kernel"


class Nodes(Protocol):
    """Every call ends within LIMIT_S, with CalledProcessError if it failed."""

    def stop_kubelet(self, node: str) -> None: ...
    def start_kubelet(self, node: str) -> None: ...
    def restart_kubelet(self, node: str) -> None: ...
    def kill(self, node: str, pattern: str) -> None:
        """SIGKILL for the processes of the node's containers whose command line matches; there must be one."""
        ...


def _run(*command: str) -> None:
    subprocess.run(command, timeout=LIMIT_S, check=True, capture_output=True, text=True)


class KindNodes:
    """Nodes that are containers with systemd. See Nodes."""

    def stop_kubelet(self, node: str) -> None:
        _run("docker", "exec", node, "systemctl", "stop", "kubelet")

    def start_kubelet(self, node: str) -> None:
        _run("docker", "exec", node, "systemctl", "start", "kubelet")

    def restart_kubelet(self, node: str) -> None:
        _run("docker", "exec", node, "systemctl", "restart", "kubelet")

    def kill(self, node: str, pattern: str) -> None:
        _run("docker", "exec", node, "pkill", "-KILL", "-f", pattern)


@dataclass(frozen=True)
class LabNodes:
    """Nodes of tests/lab/cluster. See Nodes."""

    state: Path

    def stop_kubelet(self, node: str) -> None:
        self._do("stop-kubelet", node)

    def start_kubelet(self, node: str) -> None:
        self._do("start-kubelet", node)

    def restart_kubelet(self, node: str) -> None:
        self._do("restart-kubelet", node)

    def kill(self, node: str, pattern: str) -> None:
        self._do("kill", node, pattern)

    def _do(self, verb: str, node: str, *arguments: str) -> None:
        _run(str(LAB), str(self.state), verb, node, *arguments)
