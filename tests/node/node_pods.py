"""Pods on the guest's node: what they are made of, and what goes on in their containers."""

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
"""What a kubelet says that has not heard anew of a resource's devices, or whose plugin's connection has just ended."""
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
    """A pod of one container that runs a Python script. restart: its restartPolicy; security: its securityContext."""
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
    """One container of a pod that has been started at least once."""

    api: Api
    namespace: str
    pod: str
    name: str

    def status(self) -> Object:
        pod = self.api.get("Pod", self.namespace, self.pod)
        assert pod is not None, f"no pod {self.pod}"
        statuses = pod["status"].get("containerStatuses", ())
        return next((status for status in statuses if status["name"] == self.name), {})

    def id(self) -> str:
        """containerd's, of the container that runs now."""
        text: str = self.status()["containerID"]
        return text.removeprefix("containerd://")

    def pid(self) -> int:
        """Of its first process."""
        line = next(line for line in _ctr("tasks", "ls").splitlines() if line.startswith(self.id()))
        return int(line.split()[1])

    def run(self, *command: str) -> str:
        """Runs a command in the container, below its limits and device cgroup; the output."""
        return _ctr("tasks", "exec", "--exec-id", f"test-{os.getpid()}-{next(_numbers)}", self.id(), *command)

    def log(self) -> str:
        """What it has written so far, restarts included. Not what a former pod of its name has."""
        pod = self.api.get("Pod", self.namespace, self.pod)
        assert pod is not None, f"no pod {self.pod}"
        uid = pod["metadata"]["uid"]
        files = sorted((RUN / "logs").glob(f"{self.namespace}_{self.pod}_{uid}/{self.name}/*.log"))
        lines = (line for file in files for line in file.read_text().splitlines())
        return "\n".join(line.split(" ", 3)[-1] for line in lines)  # "TIME STREAM F text"

    def told(self) -> set[str]:
        """The reasons of the Events on this very pod so far. A plugin does first and tells then, in the background."""
        pod = self.api.get("Pod", self.namespace, self.pod)
        assert pod is not None, f"no pod {self.pod}"
        events = self.api.all("Event", self.namespace)
        return {event["reason"] for event in events if event["regarding"].get("uid") == pod["metadata"]["uid"]}

    def until_running(self) -> None:
        def running() -> bool:
            status = self.status()
            ended = status.get("state", {}).get("terminated")
            assert ended is None, f"{self.pod} ended: {ended}; it wrote: {self.log()}"
            pod = self.api.get("Pod", self.namespace, self.pod)
            assert pod is not None
            assert pod["status"].get("phase") != "Failed", pod["status"]
            return "running" in status.get("state", {})

        until(running, f"{self.pod} runs")

    def until_restarted(self) -> None:
        """Until its kubelet says that it runs again; the log tells that sooner, while `id` is still the dead one's."""

        def again() -> bool:
            status = self.status()
            return status.get("restartCount", 0) >= 1 and "running" in status.get("state", {})

        until(again, f"{self.pod} runs again")

    def until_ended(self) -> int:
        """Its exit status."""

        def ended() -> int | None:
            state = self.status().get("state", {}).get("terminated")
            return None if state is None else int(state["exitCode"]) + 1

        return until(ended, f"{self.pod} ends") - 1


def admitted(api: Api, body: Object) -> Container:
    """The one container of a pod with a device, once its kubelet has taken the pod.

    A kubelet that does not know the devices of a plugin that has just been replaced refuses it, whatever the Node's
    status says. Such a pod is made again, as a ReplicaSet does, REFUSALS times at most. A pod whose Allocate failed, or
    that is refused for another reason, is an error.
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
