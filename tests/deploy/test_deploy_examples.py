"""A real API server accepts the workloads of examples/, and the chart their configurations."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.deploy.rendering import NAMESPACE, ROOT, Object, Tools, run

EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
APPLY_S = 120.0
USERS = "examples"


@pytest.fixture(scope="session")
def users(tools: Tools, kubeconfig: object) -> list[str]:
    """Returns a kubectl command for a namespace with the Pod Security level "baseline"."""
    command = [str(tools.kubectl), f"--kubeconfig={kubeconfig}"]
    run([*command, "create", "namespace", USERS])
    run([*command, "label", "namespace", USERS, "pod-security.kubernetes.io/enforce=baseline"])
    run([*command, "create", "serviceaccount", "default", "--namespace", USERS])
    return [*command, "--namespace", USERS]


def workload(name: str) -> list[Object]:
    return list(yaml.safe_load_all((EXAMPLES / name / "workload.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", NAMES)
def test_the_api_server_accepts_the_workload(users: list[str], name: str) -> None:
    file = EXAMPLES / name / "workload.yaml"
    done = run([*users, "apply", "--dry-run=server", "--validate=strict", "-f", file], timeout=APPLY_S)
    assert len(done.stdout.splitlines()) == len(workload(name))
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_api_server_accepts_its_pods_with_requests_equal_to_limits(users: list[str], name: str) -> None:
    (found,) = [one for one in workload(name) if "template" in one.get("spec", {})]
    pod = {**found["spec"]["template"], "apiVersion": "v1", "kind": "Pod"}
    pod["metadata"] = {**pod["metadata"], "name": "one"}
    command = [*users, "create", "--dry-run=server", "-o", "json", "-f", "-"]
    made = json.loads(run(command, stdin=json.dumps(pod), timeout=APPLY_S).stdout)
    (resources,) = [one["resources"] for one in made["spec"]["containers"] if one["resources"]]
    assert resources["requests"] == resources["limits"]


@pytest.mark.parametrize("name", NAMES)
def test_the_chart_accepts_the_configuration_as_in_the_overview(tools: Tools, name: str) -> None:
    file = EXAMPLES / name / "config.yaml"
    objects = tools.chart("--set-file", f"config={file}")
    assert objects["v1", "ConfigMap", NAMESPACE, "usbip-plugin"]["data"] == {
        "config.yaml": file.read_text(encoding="utf-8")
    }
