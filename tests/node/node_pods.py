"""Pods on the guest's node, and their containers."""

from __future__ import annotations

import itertools
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.node.node_api import Api, Object, until

NODE = "guest"
NAMESPACE = "default"
IMAGE = os.environ.get("NODE_IMAGE", "")
RUN = Path("/run/node")
EXEC_S = 120.0
NOT_YET = ("no healthy devices present", "unregistered device", "has been stopped", "Available: 0")
"""Messages of a kubelet that has no list of a resource's devices yet, or has just lost its plugin."""
REFUSALS = 2

_numbers = itertools.count()


def pod_of(
    name: str,
    script: str,
    *arguments: str,
    resources: dict[str, str] | None = None,
    restart: str = "Never",
    security: Object | None = None,
) -> Object:
    """Returns a pod whose only container runs a Python script. restart: restartPolicy. security: securityContext."""
    container: Object = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", script, *arguments],
        "resources": {"limits": resources or {}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "containers": [container],
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "securityContext": security or {},
        },
    }


@dataclass(frozen=True)
class Container:
    """A container of a pod that has started at least once."""

    api: Api
    namespace: str
    pod: str
    name: str

    def _pod(self) -> Object:
        pod = self.api.get("Pod", self.namespace, self.pod)
        assert pod is not None, f"no pod {self.pod}"
        return pod

    def status(self) -> Object:
        statuses = self._pod()["status"].get("containerStatuses", ())
        return next((status for status in statuses if status["name"] == self.name), {})

    def id(self) -> str:
        """Returns containerd's ID of the running container."""
        text: str = self.status()["containerID"]
        return text.removeprefix("containerd://")

    def pid(self) -> int:
        """Returns the pid of its first process."""
        line = next(line for line in _ctr("tasks", "ls").splitlines() if line.startswith(self.id()))
        return int(line.split()[1])

    def run(self, *command: str) -> str:
        """Runs a command in the container, with its limits and device cgroup, and returns the output."""
        return _ctr("tasks", "exec", "--exec-id", f"test-{os.getpid()}-{next(_numbers)}", self.id(), *command)

    def log(self) -> str:
        """Returns the log so far, restarts included, without the logs of earlier pods of that name."""
        uid = self._pod()["metadata"]["uid"]
        files = sorted((RUN / "logs").glob(f"{self.namespace}_{self.pod}_{uid}/{self.name}/*.log"))
        lines = (line for file in files for line in file.read_text().splitlines())
        return "\n".join(line.split(" ", 3)[-1] for line in lines)  # "TIME STREAM F text"

    def event_reasons(self) -> set[str]:
        """Returns the reasons of the Events about this pod so far. An Event follows its cause."""
        uid = self._pod()["metadata"]["uid"]
        return {one["reason"] for one in self.api.all("Event", self.namespace) if one["regarding"].get("uid") == uid}

    def until_running(self) -> None:
        def running() -> bool:
            status = self.status()
            ended = status.get("state", {}).get("terminated")
            assert ended is None, f"{self.pod} ended: {ended}; it wrote: {self.log()}"
            pod = self._pod()
            assert pod["status"].get("phase") != "Failed", pod["status"]
            return "running" in status.get("state", {})

        until(running, f"{self.pod} runs")

    def until_restarted(self) -> None:
        """Waits until the kubelet reports a restart. The log has it sooner, while `id` is still the old one."""

        def again() -> bool:
            status = self.status()
            return status.get("restartCount", 0) >= 1 and "running" in status.get("state", {})

        until(again, f"{self.pod} runs again")

    def until_ended(self) -> int:
        """Waits for the end. Returns the exit status."""

        def ended() -> int | None:
            state = self.status().get("state", {}).get("terminated")
            return None if state is None else int(state["exitCode"]) + 1

        return until(ended, f"{self.pod} ends") - 1


def admitted(api: Api, body: Object) -> Container:
    """Creates a pod with a device. Returns its only container once the kubelet has admitted the pod.

    A kubelet refuses pods while it has no list of a replaced plugin, whatever the Node's status says. Then this creates
    the pod again, like a ReplicaSet, up to REFUSALS times. Other refusals and a failed Allocate are errors.
    """
    name = body["metadata"]["name"]
    refusals: dict[str, str] = {}

    def taken() -> bool:
        pod = api.get("Pod", NAMESPACE, name)
        if pod is None:
            api.create(body)
            return False
        if pod["status"].get("reason") == "UnexpectedAdmissionError":
            message = str(pod["status"].get("message"))
            refusals[pod["metadata"]["uid"]] = message
            assert any(text in message for text in NOT_YET), message
            assert len(refusals) <= REFUSALS, list(refusals.values())
            api.delete("Pod", NAMESPACE, name)
            return False
        return bool(pod["status"].get("containerStatuses"))

    until(taken, f"pod {name} is admitted")
    if refusals:
        print(f"pod {name} is admitted after {len(refusals)} refusals: {', '.join(refusals.values())}")
    (container,) = body["spec"]["containers"]
    return Container(api, NAMESPACE, name, container["name"])


def _ctr(*arguments: str) -> str:
    command = ["ctr", "-a", str(RUN / "containerd.sock"), "-n", "k8s.io", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=EXEC_S, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout
