"""kustomize and Helm install equal objects."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendering import (
    CHART,
    DEPLOY,
    NAMESPACE,
    ROOT,
    VARIANTS,
    Object,
    Objects,
    Tools,
    chart_values,
    find_tool,
    kustomize_directory,
    run,
)
from usbip_plugin import __version__

RBAC = ROOT / "rbac"
K0S_SOCKET = "/var/lib/k0s/kubelet/pod-resources/kubelet.sock"
CHART_LABELS = (
    "helm.sh/chart",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
)


def without_helms_labels(found: Object) -> Object:
    """Returns the object without the labels that only the chart adds. Pods have none of them."""
    result = copy.deepcopy(found)
    labels = result["metadata"].get("labels", {})
    for label in CHART_LABELS:
        labels.pop(label, None)
    if not labels:
        result["metadata"].pop("labels", None)
    return result


def without_namespace(objects: Objects) -> Objects:
    """Returns the objects without the namespace, which Helm makes with --create-namespace."""
    return {key: found for key, found in objects.items() if key[1] != "Namespace"}


def without_hooks(objects: Objects) -> Objects:
    """Returns the objects that Helm installs, without those of its hooks, which are gone after an install."""
    return {
        key: found for key, found in objects.items() if "helm.sh/hook" not in found["metadata"].get("annotations", {})
    }


def assert_same(kustomized: Objects, charted: Objects) -> None:
    expected = without_namespace(kustomized)
    assert kustomized.keys() - expected.keys() == {("v1", "Namespace", "", NAMESPACE)}
    charted = without_hooks(charted)
    assert charted.keys() == expected.keys()
    for key, found in expected.items():
        # as text, for a readable difference
        assert yaml.safe_dump(without_helms_labels(charted[key])) == yaml.safe_dump(found), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_and_kustomize_install_the_same(tools: Tools, variant: str) -> None:
    assert_same(tools.kustomize(kustomize_directory(variant)), tools.chart(*chart_values(variant)))


def test_all_components_together_equal_the_chart(tools: Tools, tmp_path: Path) -> None:
    components = sorted(path.parent for path in DEPLOY.glob("components/*/kustomization.yaml"))
    components.append(DEPLOY / "monitoring")
    # kustomize accepts relative paths only
    own = {
        "resources": [os.path.relpath(DEPLOY / "base", tmp_path)],
        "components": [os.path.relpath(component, tmp_path) for component in components],
        "images": [{"name": "usbip-plugin", "newTag": "e2e"}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    values = [
        argument
        for variant in ("evict", "exporter", "modules", "monitoring", "openshift", "tracing", "kind")
        for argument in chart_values(variant)
    ]
    values += ["--set", f"kubelet.podResourcesSocket={K0S_SOCKET}"]
    assert_same(tools.kustomize(tmp_path), tools.chart(*values))


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the URL of a repository that has what a clone has, and nothing beside it."""
    tree = tmp_path_factory.mktemp("remote")
    for name in run(["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]).stdout.splitlines():
        if name.startswith(("deploy/", "rbac/")) and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    git: list[str | Path] = ["git", "-C", tree, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in ["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "all"], ["tag", "v1"]:
        run([*git, *arguments])
    return f"file://{tree}"


def test_the_base_and_components_need_no_clone(tools: Tools, remote: str, tmp_path: Path) -> None:
    assert tools.kustomize(f"{remote}//deploy?ref=v1") == tools.kustomize(DEPLOY)
    own = {
        "resources": [f"{remote}//deploy?ref=v1"],
        "components": [f"{remote}//deploy/components/load-module?ref=v1", f"{remote}//deploy/monitoring?ref=v1"],
        "images": [{"name": "usbip-plugin", "newTag": __version__}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    assert_same(tools.kustomize(tmp_path), tools.chart("--set", "loadModules.enabled=true,monitoring.enabled=true"))


def test_another_image_reaches_every_container(tools: Tools, tmp_path: Path) -> None:
    for overlay in (path.parent for path in DEPLOY.glob("overlays/*/kustomization.yaml")):
        directory = tmp_path / overlay.name
        directory.mkdir()
        image = {"name": "usbip-plugin", "newName": "registry.example/usb/usbip-plugin", "newTag": "7"}
        own = {"resources": [os.path.relpath(overlay, directory)], "images": [image]}
        (directory / "kustomization.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
        flags = ("--set", "image.repository=registry.example/usb/usbip-plugin", "--set-string", "image.tag=7")
        assert_same(tools.kustomize(directory), tools.chart(*chart_values(overlay.name), *flags))


def test_every_overlay_is_compared() -> None:
    overlays = {path.parent.name for path in DEPLOY.glob("overlays/*/kustomization.yaml")}
    assert overlays == set(VARIANTS) - {"base"}
    assert {path.name.removesuffix("-values.yaml") for path in CHART.glob("ci/*")} == overlays


def test_kustomize_installs_all_of_rbac(tools: Tools) -> None:
    listed = yaml.safe_load((RBAC / "Kustomization").read_text(encoding="utf-8"))["resources"]
    assert listed == sorted(path.name for path in RBAC.glob("*.yaml"))
    installed = tools.kustomize(DEPLOY)
    for path in RBAC.glob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            meta = document["metadata"]
            key = (document["apiVersion"], document["kind"], meta.get("namespace", ""), meta["name"])
            assert installed[key] == document


@pytest.mark.parametrize(
    "original",
    [
        "rbac/40-admission.yaml",
        "deploy/base/config.yaml",
        "deploy/components/exporter/export.yaml",
        "deploy/monitoring/rules.yaml",
        "deploy/monitoring/dashboard.json",
    ],
)
def test_the_charts_copy_equals_the_original(original: str) -> None:
    copied = CHART / "files" / Path(original).name
    same = copied.read_bytes() == (ROOT / original).read_bytes()
    assert same, f"cp {original} {copied.relative_to(ROOT)}"


def test_the_charts_readme_is_fresh(tmp_path: Path) -> None:
    copied = shutil.copytree(CHART, tmp_path / "chart")
    run([find_tool("helm-docs", "release"), "--sort-values-order", "file", "-c", copied])
    same = (copied / "README.md").read_bytes() == (CHART / "README.md").read_bytes()
    assert same, "make chart-readme"


def test_the_charts_readme_describes_every_value() -> None:
    rows = re.findall(r"^\| (\S+) \|.*\| (.*) \|$", (CHART / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    described = {name for name, _ in rows}
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert values.keys() <= {name.split(".")[0].split("[")[0] for name in described}
    assert [name for name, text in rows if not text.strip()] == []


def annotations_of_alerts(tools: Tools, *flags: str) -> dict[str, dict[str, str]]:
    objects = tools.chart("--set", "monitoring.enabled=true", *flags)
    found = objects["monitoring.coreos.com/v1", "PrometheusRule", NAMESPACE, "usbip-plugin"]
    return {rule["alert"]: rule["annotations"] for group in found["spec"]["groups"] for rule in group["rules"]}


def test_alerts_link_to_a_runbook_with_an_address(tools: Tools) -> None:
    linked = annotations_of_alerts(tools, "--set", "monitoring.runbook=https://wiki.example/usbip")
    assert linked["UsbipLockLost"]["runbook_url"] == "https://wiki.example/usbip#usbiplocklost"
    for alert, shown in linked.items():
        assert shown["runbook_url"] == f"https://wiki.example/usbip#{alert.lower()}"
        assert "runbook" not in shown


def test_alerts_without_an_address_name_the_runbook_in_the_repository(tools: Tools) -> None:
    for alert, shown in annotations_of_alerts(tools).items():
        assert "runbook_url" not in shown
        assert shown["runbook"] == f"docs/howto/troubleshooting.md#{alert.lower()}"


def test_the_admission_policy_can_be_left_out(tools: Tools) -> None:
    left = tools.chart("--set", "admissionPolicy.enabled=false")
    assert tools.chart().keys() - left.keys() == {
        ("admissionregistration.k8s.io/v1", kind, "", "usbip-plugin")
        for kind in ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    }


def test_another_namespace_is_used_everywhere(tools: Tools) -> None:
    objects = tools.chart("--set", "loadModules.enabled=true,exporter.enabled=true", namespace="devices")
    assert NAMESPACE not in yaml.safe_dump(list(objects.values()))
    policy = objects["admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "", "usbip-plugin"]
    (condition,) = policy["spec"]["matchConditions"]
    assert "'system:serviceaccount:devices:usbip-plugin'" in condition["expression"]
    binding = objects["rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "", "usbip-plugin"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "usbip-plugin", "namespace": "devices"}]


def test_another_domain_reaches_the_plugin_and_the_policy(tools: Tools) -> None:
    objects = tools.chart("--set", "domain=usb.example.org")
    (container,) = objects["apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin"]["spec"]["template"]["spec"]["containers"]
    assert "--domain=usb.example.org" in container["args"]
    policy = objects["admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "", "usbip-plugin"]
    variables = {variable["name"]: variable["expression"] for variable in policy["spec"]["variables"]}
    assert variables["domain"] == "'usb.example.org/'"


def test_every_object_has_the_projects_version(tools: Tools) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == __version__
    for variant in set(VARIANTS) - {"kind"}:
        daemon = tools.kustomize(kustomize_directory(variant))["apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin"]
        spec = daemon["spec"]["template"]["spec"]
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            assert container["image"] == f"usbip-plugin:{__version__}"


def test_the_modules_of_an_exporter_are_loaded_only_where_there_is_one(tools: Tools) -> None:
    objects = tools.chart("--set", "exporter.enabled=true,loadModules.enabled=true")
    for name, module in ("usbip-plugin", "vhci-hcd"), ("usbip-exporter", "usbip-host"):
        spec = objects["apps/v1", "DaemonSet", NAMESPACE, name]["spec"]["template"]["spec"]
        (loader,) = spec["initContainers"]
        assert loader["command"] == ["chroot", "/host", "modprobe", "-a", module]
        assert loader["image"] == spec["containers"][0]["image"]


def test_the_guides_kustomization_equals_its_helm_command(tools: Tools, tmp_path: Path) -> None:
    guide = (DEPLOY.parent / "docs/howto/install.md").read_text(encoding="utf-8")
    (example,) = [
        block for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "configMapGenerator" in block
    ]
    (command,) = re.findall(
        r"helm install usbip-plugin \S+ -n usbip-system --create-namespace \\\n(.*?)```", guide, re.DOTALL
    )
    config = tmp_path / "config.yaml"
    config.write_text('resources:\n  a:\n    - target: {host: h}\n      selector: {vendor: "0951"}\n', encoding="utf-8")
    text = example.replace("../deploy", os.path.relpath(DEPLOY, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(text, encoding="utf-8")
    flags = shlex.split(command.replace("\\\n", " ").replace("=config.yaml", f"={config}"))
    assert_same(tools.kustomize(tmp_path), tools.chart(*flags))
