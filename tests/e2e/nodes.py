"""What tests do to nodes: kubelets stopped and started, processes of containers killed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from usbip_plugin.kubelet.registration import identify

LIMIT_S = 60.0
STOP_S = 120.0
LAB = Path(__file__).parents[1] / "lab" / "cluster"

PLUGIN = "usbip_plugin run"
KERNEL = "usbip_plugin simulate kernel"


class Nodes(Protocol):
    """Every call ends within LIMIT_S (API server: STOP_S), with CalledProcessError if it failed."""

    def stop_kubelet(self, node: str) -> None: ...
    def start_kubelet(self, node: str) -> None: ...
    def restart_kubelet(self, node: str) -> None: ...
    def kill(self, node: str, pattern: str) -> None:
        """SIGKILL for the processes of the node's containers whose command line matches; there must be one."""
        ...

    def pids(self, node: str, pattern: str) -> list[int]:
        """The processes of the node's containers whose command line matches."""
        ...

    def run(self, node: str, *command: str) -> str:
        """What the command says in the node's mount and network namespace, where /proc has those pids."""
        ...


def _run(*command: str, limit: float = LIMIT_S) -> str:
    return subprocess.run(command, timeout=limit, check=True, capture_output=True, text=True).stdout


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

    def pids(self, node: str, pattern: str) -> list[int]:
        return [int(pid) for pid in _run("docker", "exec", node, "pgrep", "-f", pattern).split()]

    def run(self, node: str, *command: str) -> str:
        return _run("docker", "exec", node, *command)


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

    def pids(self, node: str, pattern: str) -> list[int]:
        return [int(pid) for pid in self._do("pids", node, pattern).split()]

    def run(self, node: str, *command: str) -> str:
        return self._do("exec", node, *command)

    def stop_api_server(self) -> None:
        """It ends, and nothing listens on its port."""
        _run(str(LAB / "control.sh"), str(self.state), "stop", "apiserver", limit=STOP_S)

    def start_api_server(self) -> None:
        """Returns when it is ready. One that runs is left alone."""
        _run(str(LAB / "control.sh"), str(self.state), "start", "apiserver", limit=STOP_S)

    def plugin_socket(self, node: str, resource: str) -> Path:
        """The socket of the plugin for a resource, as this machine sees it: the newest, as a killed one's stays a
        while."""
        sockets = (self.state / node / "kubelet" / "device-plugins").glob(f"usbip-{resource}*.sock")
        return max((found.modified_ns, path) for path in sockets if (found := identify(path)) is not None)[1]

    def pod_log(self, node: str, namespace: str, pod: str) -> list[str]:
        """What the containers of a pod have said, from the files the node keeps: no API server is asked."""
        files = (self.state / node / "logs").glob(f"{namespace}_{pod}_*/*/*.log")
        return [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]

    def _do(self, verb: str, node: str, *arguments: str) -> str:
        return _run(str(LAB / "node.sh"), str(self.state), verb, node, *arguments)
