"""The chart's hook that checks the configuration before an install or upgrade."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.deploy.rendering import CHART, NAMESPACE, ROOT, Object, Tools
from usbip_plugin.cli.main import main
from usbip_plugin.cli.parser import Exit

NAME = "usbip-plugin-validate"
EXPORTER = ("--set", "exporter.enabled=true")


def job(tools: Tools, *flags: str) -> Object:
    found: Object = tools.chart(*flags)["batch/v1", "Job", NAMESPACE, NAME]
    return found


def status(tools: Tools, tmp_path: Path, *flags: str) -> int:
    """Carries out the Job's command with its ConfigMap in a directory of the test, and returns the exit status."""
    (container,) = job(tools, *flags)["spec"]["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    directory = tmp_path / "mounted"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, text in tools.chart(*flags)["v1", "ConfigMap", NAMESPACE, NAME]["data"].items():
        (directory / name).write_text(text, encoding="utf-8")
    return main([argument.replace(mount["mountPath"], str(directory)) for argument in container["args"]])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), Exit.DONE),
        (("--set", "config=resources: {}"), Exit.DONE),
        (("--set", "config=resources: {a: b}"), Exit.USAGE),
        (("--set-json", 'config={"resources": {"a": [{"target": {}}]}}'), Exit.USAGE),
        (("--set-json", 'config={"resources": {}}'), Exit.DONE),
        ((*EXPORTER,), Exit.DONE),
        ((*EXPORTER, "--set", "exporter.config=export: [nothing]"), Exit.USAGE),
        (("--set", "exporter.config=export: nothing"), Exit.DONE),
    ],
)
def test_the_job_fails_if_a_configuration_is_not_valid(
    tools: Tools, tmp_path: Path, flags: tuple[str, ...], expected: Exit
) -> None:
    assert status(tools, tmp_path, *flags) == expected


def test_the_job_checks_configmaps_of_ones_own(tools: Tools) -> None:
    flags = ("--set", "existingConfigMap=sticks,exporter.existingConfigMap=exports")
    (volume,) = job(tools, *EXPORTER, *flags)["spec"]["template"]["spec"]["volumes"]
    sources = [source["configMap"] for source in volume["projected"]["sources"]]
    assert [(source["name"], source["items"][0]["path"]) for source in sources] == [
        ("sticks", "config.yaml"),
        ("exports", "export.yaml"),
    ]


def test_openshift_chooses_the_user_of_the_job(tools: Tools) -> None:
    pod = job(tools, "--set", "openshift.enabled=true")["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_the_job_allows_the_extras_that_the_plugin_allows(tools: Tools, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    entry = "{target: {host: h}, selector: {all: true}, extras: [{hostPath: /dev/kvm}]}"
    values.write_text(f"config: |\n  resources: {{a: [{entry}]}}\n", encoding="utf-8")
    flags = ("--values", str(values))
    assert status(tools, tmp_path, *flags) == Exit.USAGE
    allowed = ("--set", "extraArgs={--log-level=debug,--allow-extras=/dev/kvm}")
    assert status(tools, tmp_path, *flags, *allowed) == Exit.DONE


def test_the_hook_runs_before_every_install_and_upgrade_with_its_configmap_first(tools: Tools) -> None:
    objects = tools.chart()
    made, config = job(tools), objects["v1", "ConfigMap", NAMESPACE, NAME]
    for found in (made, config):
        annotations = found["metadata"]["annotations"]
        assert set(annotations["helm.sh/hook"].split(",")) == {"pre-install", "pre-upgrade"}
        assert "before-hook-creation" in annotations["helm.sh/hook-delete-policy"]
    assert int(config["metadata"]["annotations"]["helm.sh/hook-weight"]) < 0
    assert made["spec"]["backoffLimit"] == 0
    assert made["spec"]["activeDeadlineSeconds"] > 0


def test_the_jobs_pod_has_no_rights_and_nothing_of_the_node(tools: Tools) -> None:
    pod = job(tools, *EXPORTER)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    (volume,) = pod["volumes"]
    assert [set(source) for source in volume["projected"]["sources"]] == [{"configMap"}, {"configMap"}]
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_check_can_be_left_out(tools: Tools) -> None:
    left_out = tools.chart("--set", "validateBeforeUpgrade=false")
    assert {key[3] for key in tools.chart().keys() - left_out.keys()} == {NAME}


def test_the_job_uses_the_plugins_image_and_pull_secrets(tools: Tools) -> None:
    flags = ("--set", "image.repository=registry.example/usbip-plugin,imagePullSecrets[0].name=secret")
    objects = tools.chart(*flags)
    plugin = objects["apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin"]["spec"]["template"]["spec"]
    pod = job(tools, *flags)["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == plugin["containers"][0]["image"]
    assert pod["imagePullSecrets"] == plugin["imagePullSecrets"]


def test_the_chart_has_the_schemas_of_both_files() -> None:
    for name in ("config", "export"):
        file = f"{name}.schema.json"
        assert (CHART / "files" / file).read_bytes() == (ROOT / "docs/reference" / file).read_bytes()
