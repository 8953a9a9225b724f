"""A real API server accepts all rendered objects: no unknown field, no wrong value."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.rendering import (
    DEPLOY,
    NAMESPACE,
    VARIANTS,
    Object,
    Tools,
    chart_values,
    find_crd,
    kustomize_directory,
    pod_template,
    run,
)
from usbip_plugin.cli.parser import parser

APPLY_S = 120.0
Kubectl = Callable[..., str]


@pytest.fixture(scope="session")
def kubectl(tools: Tools, kubeconfig: Path) -> Kubectl:
    def call(*arguments: str | Path, objects: list[Object] | None = None) -> str:
        stdin = None if objects is None else json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        command = [tools.kubectl, f"--kubeconfig={kubeconfig}", *arguments]
        return run(command, stdin=stdin, timeout=APPLY_S).stdout

    return call


@pytest.fixture(scope="session")
def foreign_kinds(kubectl: Kubectl) -> None:
    """Installs the kinds of the Prometheus operator and OpenShift with their schemas."""
    for name, group in (
        ("podmonitors", "monitoring.coreos.com"),
        ("prometheusrules", "monitoring.coreos.com"),
        ("securitycontextconstraints", "security.openshift.io"),
    ):
        kubectl("apply", "--server-side", "-f", find_crd(name))
        kubectl("wait", "--for=condition=Established", f"crd/{name}.{group}", f"--timeout={APPLY_S:g}s")


@pytest.fixture(scope="session")
def installed(kubectl: Kubectl) -> str:
    """Runs the command of the documents and returns its output."""
    output = kubectl("apply", "-k", DEPLOY)
    # without a controller manager
    kubectl("create", "serviceaccount", "default", "--namespace", NAMESPACE)
    return output


def test_one_command_installs(installed: str, tools: Tools, kubectl: Kubectl) -> None:
    assert len(installed.splitlines()) == len(tools.kustomize(DEPLOY))
    assert all(line.endswith(" created") for line in installed.splitlines())
    again = kubectl("apply", "-k", DEPLOY).splitlines()
    assert len(again) == len(installed.splitlines())
    assert [line for line in again if not line.endswith(" unchanged")] == [], "the API server changes no field"


@pytest.mark.usefixtures("installed", "foreign_kinds")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_server_accepts_every_object(tools: Tools, kubectl: Kubectl, variant: str) -> None:
    for objects in (tools.kustomize(kustomize_directory(variant)), tools.chart(*chart_values(variant))):
        answers = kubectl("apply", "--dry-run=server", "-f", "-", objects=list(objects.values())).splitlines()
        assert len(answers) == len(objects)
        assert all(answer.endswith("(server dry run)") for answer in answers)


@pytest.mark.usefixtures("installed", "foreign_kinds")
def test_the_api_server_accepts_what_a_site_may_want(tools: Tools, kubectl: Kubectl) -> None:
    objects = tools.chart("--values", str(Path(__file__).with_name("site-values.yaml")))
    kubectl("apply", "--dry-run=server", "-f", "-", objects=list(objects.values()))
    kubectl("apply", "-f", "-", objects=[found for found in objects.values() if found["kind"] == "ServiceAccount"])
    template = objects["apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin"]["spec"]["template"]
    # the class itself is not installed
    spec = {key: value for key, value in template["spec"].items() if key != "runtimeClassName"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": NAMESPACE}, "spec": spec}
    made = json.loads(kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", objects=[pod]))
    assert made["spec"]["hostAliases"] == [{"ip": "192.0.2.1", "hostnames": ["lab-pi.home"]}]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_server_accepts_their_pods(tools: Tools, kubectl: Kubectl, variant: str) -> None:
    """Priority classes, ServiceAccounts and Pod Security are checked for pods only."""
    specs = {}
    objects = tools.kustomize(kustomize_directory(variant)).values()
    kubectl("apply", "-f", "-", objects=[found for found in objects if found["kind"] == "ServiceAccount"])
    for found in objects:
        template = pod_template(found)
        if template is not None:
            meta = {**template["metadata"], "name": found["metadata"]["name"], "namespace": NAMESPACE}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
            made = json.loads(kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", objects=[pod]))
            specs[meta["name"]] = made["spec"]
    assert all(specs[name]["priority"] == 2_000_001_000 for name in specs if name in ("usbip-plugin", "usbip-exporter"))
    assert "usbip-plugin" in specs


@pytest.mark.usefixtures("installed")
def test_the_namespace_admits_host_paths_whatever_the_clusters_default(kubectl: Kubectl) -> None:
    namespace = json.loads(kubectl("get", "namespace", NAMESPACE, "-o", "json"))
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


def test_pod_security_restricted_admits_the_pods_of_hooks(tools: Tools, kubectl: Kubectl) -> None:
    name = "restricted"
    kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    kubectl("create", "serviceaccount", "default", "--namespace", name)
    objects = tools.chart("--set", "exporter.enabled=true", namespace=name)
    hooks = [found for found in objects.values() if "helm.sh/hook" in found["metadata"].get("annotations", {})]
    specs = {
        found["metadata"]["name"]: (pod_template(found) or found)["spec"]
        for found in hooks
        if found["kind"] in ("Job", "Pod")
    }
    assert specs.keys() == {"usbip-plugin-validate", "usbip-plugin-test"}
    for hook, spec in specs.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": hook, "namespace": name}, "spec": spec}
        kubectl("create", "--dry-run=server", "-f", "-", objects=[pod])
    privileged = {**pod, "spec": {**pod["spec"], "hostNetwork": True}}
    with pytest.raises(AssertionError, match=r"violates PodSecurity.*host namespaces"):
        kubectl("create", "--dry-run=server", "-f", "-", objects=[privileged])


@pytest.mark.usefixtures("installed", "foreign_kinds")
def test_the_api_server_rejects_an_unknown_field(tools: Tools, kubectl: Kubectl) -> None:
    objects = tools.kustomize(kustomize_directory("monitoring"))
    daemon_set = copy.deepcopy(objects["apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin"])
    daemon_set["spec"]["template"]["spec"]["hostNetwrok"] = True
    rule = copy.deepcopy(objects["monitoring.coreos.com/v1", "PrometheusRule", NAMESPACE, "usbip-plugin"])
    rule["spec"]["groups"][0]["rules"][0]["expression"] = "1"
    overlay = tools.kustomize(kustomize_directory("openshift"))
    constraints = {
        **overlay["security.openshift.io/v1", "SecurityContextConstraints", "", "usbip-plugin"],
        "allowHostNetwrok": True,
    }
    for found, field in (daemon_set, "hostNetwrok"), (rule, "expression"), (constraints, "allowHostNetwrok"):
        with pytest.raises(AssertionError, match=rf"unknown field.*{field}"):
            kubectl("apply", "--dry-run=server", "-f", "-", objects=[found])


@pytest.mark.usefixtures("installed")
def test_the_documented_pod_for_a_command_is_valid(kubectl: Kubectl) -> None:
    document = (DEPLOY.parent / "docs/reference/cli.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"kubectl (-n usbip-system run .*?)  *#", document.replace("\\\n", " "))
    words = [word for word in shlex.split(command) if word not in ("--rm", "-i")]
    at = words.index("--")
    pod = json.loads(kubectl(*words[:at], "--dry-run=server", "--output=json", *words[at:]))
    assert pod["spec"]["serviceAccountName"] == "usbip-plugin"
    (container,) = pod["spec"]["containers"]
    assert parser().parse_args(container["args"]).command == "devices"
