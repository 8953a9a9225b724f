"""kubectl as a process, for apply, exec, drain and logs."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LIMIT_S = 120.0
ANSWERS_S = 60.0
RETRY_S = 0.2


class KubectlFailed(Exception):
    """An exit status other than 0. The text is the error output."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl for one cluster. A call that exceeds its limit raises subprocess.TimeoutExpired."""

    kubeconfig: str

    def __call__(self, *arguments: str, stdin: str | None = None, limit: float = LIMIT_S) -> str:
        """Returns the standard output, or raises KubectlFailed."""
        command = ["kubectl", "--kubeconfig", self.kubeconfig, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=limit, check=False)
        if done.returncode != 0:
            raise KubectlFailed(f"{' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def in_container(self, namespace: str, pod: str, container: str, script: str) -> str:
        """Returns the output of a shell script in a container, once its kubelet answers. Raises KubectlFailed."""
        deadline = time.monotonic() + ANSWERS_S
        while True:
            try:
                return self("exec", "-n", namespace, pod, "-c", container, "--", "sh", "-c", script)
            except KubectlFailed as error:
                # a kubelet that has just started does not listen or know its pods yet, and has no event for it
                if "unable to upgrade connection" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_S)

    def apply(self, objects: list[dict[str, Any]]) -> None:
        self("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def get(self, *arguments: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self("get", "-o", "json", *arguments))
        return answer

    def items(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(*arguments)["items"]
        return found


def render(directory: Path) -> list[dict[str, Any]]:
    """Returns the objects that `kubectl apply -k` would apply."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    return [document for document in yaml.safe_load_all(done.stdout) if document]
