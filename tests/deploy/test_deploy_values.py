"""Values that the chart rejects, with their errors, and values that no overlay uses."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendering import CHART, NAMESPACE, Object, Tools
from usbip_plugin.cli.parser import parser
from usbip_plugin.config.export import ExportConfig, parse_export
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.schema import DEFAULT_PLUGIN_DIRECTORY

PLUGIN = ("apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin")


def pod_spec(tools: Tools, *arguments: str) -> Object:
    found: Object = tools.chart(*arguments)[PLUGIN]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        (("--set", "imgae.tag=1"), "imgae"),
        (("--set", "image.Tag=1"), "Tag"),
        (("--set-json", "image.tag=1.1"), "/image/tag"),
        (("--set", "image.repository="), "/image/repository"),
        (("--set", "image.pullPolicy=Sometimes"), "/image/pullPolicy"),
        (("--set", "imagePullSecrets={secret}"), "/imagePullSecrets/0"),
        (("--set-json", 'config={"resources": {}}'), "/config"),
        (("--set", "config="), "/config"),
        (("--set", "domain=Usbip.Dev"), "/domain"),
        (("--set", "domain=usbip.dev/storage"), "/domain"),
        (("--set", "port=0"), "/port"),
        (("--set", "port=65536"), "/port"),
        (("--set", "probePort=0"), "/probePort"),
        (("--set-string", "listenOnNode=false"), "/listenOnNode"),
        (("--set-string", "port=13240"), "/port"),
        (("--set", "kubelet.podResourcesSocket=var/lib/kubelet/pod-resources/kubelet.sock"), "/podResourcesSocket"),
        (("--set", "kubelet.podResourcesSocket=/var/lib/k0s/kubelet"), "/podResourcesSocket"),
        (("--set", "kubelet.podResourcesSocket=/var/lib/../pod-resources/kubelet.sock"), "/podResourcesSocket"),
        (("--set", "kubelet.rootDir=/var/lib/k0s/kubelet"), "/kubelet"),
        (("--set", "extraArgs=--log-level=debug"), "/extraArgs"),
        (("--set", "extraArgs={log-level=debug}"), "/extraArgs/0"),
        (("--set", "loadModules=true"), "/loadModules"),
        (("--set-string", "loadModules.enabled=true"), "/loadModules/enabled"),
        (("--set", "admissionPolicy.enable=true"), "/admissionPolicy"),
        (("--set", "tracing.endpoint=collector:4317"), "/tracing/endpoint"),
        (("--set", "tracing.environment.LD_PRELOAD=x"), "LD_PRELOAD"),
        (("--set", "monitoring.enabled=yes"), "/monitoring/enabled"),
        (("--set", "monitoring.interval=15"), "/monitoring/interval"),
        (("--set", "monitoring.runbook=https://wiki.example/a#b"), "/monitoring/runbook"),
        (("--set", "monitoring.runbook=docs/howto/troubleshooting.md"), "/monitoring/runbook"),
        (("--set", "resources.limit.memory=64Mi"), "/resources"),
        (("--set", "tolerations[0].operator=Any"), "/tolerations/0/operator"),
        (("--set", "updateStrategy.type=Recreate"), "/updateStrategy/type"),
        (("--set", "updateStrategy.rollingUpdate.maxUnavailable=many"), "/updateStrategy/rollingUpdate/maxUnavailable"),
        (("--set", "updateStrategy.rollingUpdate.maxSurge=1"), "/updateStrategy/rollingUpdate/maxSurge"),
        (("--set", "appArmor.type=unconfined"), "/appArmor/type"),
        (("--set", "seLinuxOptions.types=spc_t"), "/seLinuxOptions"),
        (("--set", "exporter.enabled=yes"), "/exporter/enabled"),
        (("--set", "exporter.config="), "/exporter/config"),
        (("--set-json", 'exporter.config={"export": []}'), "/exporter/config"),
        (("--set", "exporter.fence=on"), "/exporter/fence"),
        (("--set", "exporter.port=0"), "/exporter/port"),
        (("--set", "exporter.image.repository=a@sha256:b"), "/exporter/image/repository"),
        (("--set", "exporter.image.pullPolicy=Always"), "/exporter/image"),
        (("--set", "exporter.nodeSelector.usb=true"), "/exporter/nodeSelector/usb"),
        (("--set", "exporter.tolerations[0].operator=Any"), "/exporter/tolerations/0/operator"),
        (("--set", "exporter.extraArgs={log-level=debug}"), "/exporter/extraArgs/0"),
        (("--set", "testServer.devices={1-1}"), "/testServer/devices/0"),
        (("--set", "nodeSelector.usb=true"), "/nodeSelector/usb"),
    ],
)
def test_wrong_values_are_rejected_with_their_place(tools: Tools, flags: tuple[str, ...], place: str) -> None:
    done = tools.helm(*flags)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert place in done.stderr


def test_the_schema_has_exactly_the_values() -> None:
    def same(schema: Object, value: object, place: str) -> None:
        known = schema.get("properties")
        if known is None or not isinstance(value, dict):
            return
        assert schema["additionalProperties"] is False, place
        assert value.keys() <= known.keys(), place
        for key in value:
            same(known[key], value[key], f"{place}.{key}")

    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    same(schema, values, "")
    assert schema["properties"].keys() - values.keys() == {"global"}


def test_another_apparmor_profile_or_none(tools: Tools) -> None:
    own = ("--set", "appArmor.type=Localhost", "--set", "appArmor.localhostProfile=usbip-plugin")
    (container,) = pod_spec(tools, *own)["containers"]
    assert container["securityContext"]["appArmorProfile"] == {"type": "Localhost", "localhostProfile": "usbip-plugin"}
    (container,) = pod_spec(tools, "--set", "appArmor=null")["containers"]
    assert "appArmorProfile" not in container["securityContext"]


def test_selinux_options_are_the_pods(tools: Tools) -> None:
    assert pod_spec(tools, "--set", "seLinuxOptions.type=spc_t")["securityContext"]["seLinuxOptions"] == {
        "type": "spc_t"
    }


def test_other_ports_are_used_everywhere(tools: Tools) -> None:
    (container,) = pod_spec(tools, "--set", "port=9999,probePort=9998")["containers"]
    assert container["args"] == ["run", "--listen=127.0.0.1:9999,[$(HOST_IP)]:9999", "--probes=127.0.0.1:9998"]
    assert [(port["name"], port["containerPort"], port["hostPort"]) for port in container["ports"]] == [
        ("http", 9999, 9999),
        ("probes", 9998, 9998),
    ]


def test_the_pages_can_be_taken_off_the_nodes_address(tools: Tools) -> None:
    (container,) = pod_spec(tools, "--set", "listenOnNode=false")["containers"]
    assert container["args"] == ["run", "--listen=127.0.0.1:13240", "--probes=127.0.0.1:13242"]


@pytest.mark.parametrize(
    "root", ["/var/lib/kubelet", "/var/lib/k0s/kubelet", "/var/snap/microk8s/common/var/lib/kubelet"]
)
def test_mount_and_flag_follow_the_kubelets_root_and_the_device_plugin_directory_stays(tools: Tools, root: str) -> None:
    socket = Path(root) / "pod-resources" / "kubelet.sock"
    spec = pod_spec(tools, "--set", f"kubelet.podResourcesSocket={socket}")
    (container,) = spec["containers"]
    assert parser().parse_args(container["args"]).pod_resources_socket == str(socket)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    for places in (mounts, volumes):
        assert places["pod-resources"] == str(socket.parent)
        assert places["device-plugins"] == DEFAULT_PLUGIN_DIRECTORY


def test_more_flags_come_last_and_win(tools: Tools) -> None:
    (container,) = pod_spec(tools, "--set", "extraArgs={--log-level=debug,--listen=}")["containers"]
    assert container["args"][-2:] == ["--log-level=debug", "--listen="]


def test_node_selector_tolerations_and_priority_can_be_changed(tools: Tools) -> None:
    spec = pod_spec(
        tools, "--set-string", "nodeSelector.usb=yes", "--set-json", "tolerations=[]", "--set", "priorityClassName="
    )
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux", "usb": "yes"}
    assert "tolerations" not in spec
    assert "priorityClassName" not in spec


def test_labels_and_annotations_go_to_the_pods(tools: Tools) -> None:
    objects = tools.chart("--set", "podLabels.team=lab", "--set-string", "podAnnotations.example\\.com/scrape=true")
    meta = objects[PLUGIN]["spec"]["template"]["metadata"]
    assert meta["labels"] == {"app.kubernetes.io/name": "usbip-plugin", "team": "lab"}
    assert meta["annotations"]["example.com/scrape"] == "true"
    assert objects[PLUGIN]["spec"]["selector"] == {"matchLabels": {"app.kubernetes.io/name": "usbip-plugin"}}


def test_labels_that_an_operator_selects_by_go_to_its_objects(tools: Tools) -> None:
    objects = tools.chart("--set", "monitoring.enabled=true,monitoring.labels.release=stack,monitoring.interval=1m")
    for kind in ("PodMonitor", "PrometheusRule"):
        found = objects["monitoring.coreos.com/v1", kind, NAMESPACE, "usbip-plugin"]
        assert found["metadata"]["labels"]["release"] == "stack", kind
    (endpoint,) = objects["monitoring.coreos.com/v1", "PodMonitor", NAMESPACE, "usbip-plugin"]["spec"][
        "podMetricsEndpoints"
    ]
    assert endpoint["interval"] == "1m"


def test_the_pod_monitors_find_their_ports(tools: Tools) -> None:
    objects = tools.chart("--set", "monitoring.enabled=true,exporter.enabled=true")
    for name in ("usbip-plugin", "usbip-exporter"):
        template = objects["apps/v1", "DaemonSet", NAMESPACE, name]["spec"]["template"]
        monitor = objects["monitoring.coreos.com/v1", "PodMonitor", NAMESPACE, name]["spec"]
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in template["spec"]["containers"][0]["ports"]}


EXPORTER = ("apps/v1", "DaemonSet", NAMESPACE, "usbip-exporter")
EXPORT = ("--set", "exporter.enabled=true")


def exported(tools: Tools, *flags: str) -> Object:
    found: Object = tools.chart(*EXPORT, *flags)[EXPORTER]["spec"]["template"]["spec"]
    return found


def test_without_the_fence_an_exporter_has_no_rights(tools: Tools) -> None:
    flags = (*EXPORT, "--set", "exporter.fence=false")
    left = tools.chart(*flags)
    fenced = tools.chart(*EXPORT)
    gone = {kind for _, kind, _, name in fenced.keys() - left.keys() if name == "usbip-exporter"}
    assert gone == {"Role", "RoleBinding"}
    assert left[EXPORTER]["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
    for objects, fence in (fenced, True), (left, False):
        text = objects["v1", "ConfigMap", NAMESPACE, "usbip-exporter"]["data"]["export.yaml"]
        assert parse_export(text).config.fence is fence


def test_the_exporters_configuration_is_taken_as_it_is_and_ends_with_the_fence(tools: Tools) -> None:
    for text in 'export:\n- {vendor: "0951"}\n# {{ .Values }}\n', 'export: [{vendor: "0951"}]':
        objects = tools.chart(*EXPORT, "--set-json", f"exporter.config={json.dumps(text)}")
        made = objects["v1", "ConfigMap", NAMESPACE, "usbip-exporter"]["data"]
        assert made == {"export.yaml": text.removesuffix("\n") + "\nfence: true\n"}


def test_a_fence_in_the_exporters_configuration_is_an_error_that_names_the_value(tools: Tools) -> None:
    done = tools.helm(*EXPORT, "--set-json", f"exporter.config={json.dumps('export: []' + chr(10) + 'fence: true')}")
    assert done.returncode != 0
    assert "set exporter.fence instead" in done.stderr


def test_the_exporter_has_the_plugins_image_or_its_own(tools: Tools) -> None:
    images = {
        (): "usbip-plugin:0.1.0",
        ("--set-string", "image.repository=registry.example/usb,image.tag=7"): "registry.example/usb:7",
        ("--set-string", "image.tag=7,exporter.image.repository=other,exporter.image.tag=8"): "other:8",
    }
    for flags, image in images.items():
        (container,) = exported(tools, *flags)["containers"]
        assert container["image"] == image


def test_the_guides_commands_export_a_nodes_stick_and_name_the_node_as_its_server(tools: Tools, tmp_path: Path) -> None:
    guide = (CHART.parents[2] / "docs/howto/share-node-device.md").read_text(encoding="utf-8")
    export, config = (textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL))
    (flags,) = re.findall(r"helm upgrade .*? --create-namespace \\\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "export.yaml").write_text(export, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    given = shlex.split(flags.replace("\\\n", " "))
    objects = tools.chart(*(flag.replace("config=", f"config={tmp_path}/") for flag in given))
    exporters = objects["v1", "ConfigMap", NAMESPACE, "usbip-exporter"]["data"]["export.yaml"]
    plugins = objects["v1", "ConfigMap", NAMESPACE, "usbip-plugin"]["data"]["config.yaml"]
    (device,) = parse_config(plugins).config.resources[0].devices
    assert parse_export(exporters).config == ExportConfig((device.selector,), fence=True)
    (label,) = re.findall(r"kubectl label node NODE (\S+)", guide)
    assert label.split("=") in [list(pair) for pair in exported(tools)["nodeSelector"].items()]


def test_ports_nodes_and_resources_of_the_exporter_can_be_changed(tools: Tools) -> None:
    spec = exported(
        tools,
        "--set",
        "exporter.port=3241,exporter.httpPort=9999,exporter.resources.limits.memory=128Mi,exporter.extraArgs={--log-level=debug}",
        "--set-json",
        "exporter.tolerations=[]",
        "--set-string",
        "exporter.nodeSelector.usb=yes",
    )
    (container,) = spec["containers"]
    assert container["args"] == [
        "export",
        "--listen=[$(HOST_IP)]:3241",
        "--http=[$(HOST_IP)]:9999",
        "--log-level=debug",
    ]
    assert [port["hostPort"] for port in container["ports"]] == [3241, 9999]
    assert container["resources"]["limits"] == {"memory": "128Mi"}
    assert "tolerations" not in spec
    assert spec["nodeSelector"]["usb"] == "yes"


def test_other_variables_of_tracing(tools: Tools) -> None:
    flags = ("--set", "tracing.environment.OTEL_TRACES_SAMPLER_ARG=0.5")
    (container,) = pod_spec(tools, *flags)["containers"]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert env["OTEL_TRACES_SAMPLER_ARG"] == "0.5"
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in env


def test_the_configuration_is_taken_as_it_is(tools: Tools) -> None:
    text = 'resources:\n  a:\n    - selector: {vendor: "0951", product: 0666}\n\n# {{ .Values }}\n'
    objects = tools.chart("--set-json", f"config={json.dumps(text)}")
    assert objects["v1", "ConfigMap", NAMESPACE, "usbip-plugin"]["data"] == {"config.yaml": text}
