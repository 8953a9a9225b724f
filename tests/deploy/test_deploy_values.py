"""Values that the chart rejects, with their errors, and values that no overlay uses."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendering import (
    CHART,
    NAMESPACE,
    VARIANTS,
    Object,
    Tools,
    by_name,
    chart_values,
    containers,
    pod_template,
)
from usbip_plugin import __version__
from usbip_plugin.cli.parser import parser
from usbip_plugin.config.export import ExportConfig, parse_export
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.schema import DEFAULT_PLUGIN_DIRECTORY

PLUGIN = ("apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin")
DIGEST = f"sha256:{'0123456789abcdef' * 4}"


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
        (("--set", "image.digest=sha256:abc"), "/image/digest"),
        (("--set", "image.repository=a@sha256:b"), "/image/repository"),
        (("--set-json", "config=[]"), "/config"),
        (("--set-json", 'config={"resources": {"a": [{"selector": {"vendor": 951}}]}}'), "/a/0/selector/vendor"),
        (("--set-json", 'config={"resources": {"a": {"devices": [{"selector": {"vendor": 9}}]}}}'), "/selector/vendor"),
        (("--set", "existingConfigMap=My_Config"), "/existingConfigMap"),
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
        (("--set", "extraArgs={--nonsense}"), "/extraArgs/0"),
        (("--set", "extraArgs={--log-level=loud}"), "/extraArgs/0"),
        (("--set", "extraArgs={--domain=example.org}"), "/extraArgs/0"),
        (("--set", "logLevel=loud"), "/logLevel"),
        (("--set", "cdiDirectory=etc/cdi"), "/cdiDirectory"),
        (("--set", "serviceAccount.name=Usb"), "/serviceAccount/name"),
        (("--set", "serviceAccount.rules=a"), "/serviceAccount"),
        (("--set", "openshift=true"), "/openshift"),
        (("--set", "affinity.node=a"), "/affinity"),
        (("--set", "runtimeClassName=A_B"), "/runtimeClassName"),
        (("--set", "dnsPolicy=Host"), "/dnsPolicy"),
        (("--set", "dnsConfig.options[0].name=ndots,dnsConfig.options[0].value=2"), "/dnsConfig/options/0/value"),
        (("--set", "hostAliases[0].ip=192.0.2.1"), "/hostAliases/0"),
        (("--set", "commonLabels.cost=1"), "/commonLabels/cost"),
        (("--set", "extraEnv[0].name=A,extraEnv[0].value=1"), "/extraEnv/0/value"),
        (("--set", "extraEnvFrom[0].secret=a"), "/extraEnvFrom/0"),
        (("--set", "extraVolumes[0].secret.secretName=a"), "/extraVolumes/0"),
        (("--set", "extraVolumeMounts[0].name=a,extraVolumeMounts[0].mountPath=a"), "/extraVolumeMounts/0/mountPath"),
        (("--set", "initContainers[0].name=a"), "/initContainers/0"),
        (("--set", "extraContainers[0].image=a"), "/extraContainers/0"),
        (("--set", "podSecurityContext.runAsUser=1000"), "/podSecurityContext/runAsUser"),
        (("--set", "podSecurityContext.runAsNonRoot=true"), "/podSecurityContext"),
        (("--set", "securityContext.readonlyRootFilesystem=true"), "/securityContext"),
        (("--set", "nameOverride=usb"), "nameOverride"),
        (("--set", "monitoring.podMonitor.enabled=true"), "/monitoring/podMonitor"),
        (("--set", "monitoring.dashboardAnnotations.a=1"), "/monitoring/dashboardAnnotations/a"),
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
        (("--set-json", 'exporter.config={"export": [{"vendor": 951}]}'), "/exporter/config/export/0/vendor"),
        (("--set", "exporter.image.digest=b"), "/exporter/image/digest"),
        (("--set", "exporter.fence=on"), "/exporter/fence"),
        (("--set", "exporter.port=0"), "/exporter/port"),
        (("--set", "exporter.image.repository=a@sha256:b"), "/exporter/image/repository"),
        (("--set", "exporter.image.pullPolicy=Always"), "/exporter/image"),
        (("--set", "exporter.nodeSelector.usb=true"), "/exporter/nodeSelector/usb"),
        (("--set", "exporter.tolerations[0].operator=Any"), "/exporter/tolerations/0/operator"),
        (("--set", "exporter.extraArgs={log-level=debug}"), "/exporter/extraArgs/0"),
        (("--set", "exporter.extraArgs={--probes=}"), "/exporter/extraArgs/0"),
        (("--set", "testServer.devices={1-1}"), "/testServer/devices/0"),
        (("--set", "nodeSelector.usb=true"), "/nodeSelector/usb"),
    ],
)
def test_wrong_values_are_rejected_with_their_place(tools: Tools, flags: tuple[str, ...], place: str) -> None:
    done = tools.helm(*flags)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert place in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--set", "config=resources: ["), "config is not valid YAML"),
        (("--set", "config=resource: {}"), "config has no key resources: add it, or write resources: {} for none"),
        (("--set", "config.resource.a=b"), "config has no key resources: add it, or write resources: {} for none"),
        (("--set", "config=resources: []"), "config: resources must be a mapping; write resources: {} for none"),
        (("--set", "config=kind: ConfigMap"), "config is a ConfigMap: give the text below its data"),
        (("--set", "config=resources: {},existingConfigMap=mine"), "config and existingConfigMap are both set"),
        (("--set", "exporter.enabled=true,exporter.config=export: {}"), "exporter.config: export must be a list"),
        (("--set", "podLabels.app\\.kubernetes\\.io/name=usb"), "podLabels has the label app.kubernetes.io/name"),
        (("--set", "commonLabels.helm\\.sh/chart=usb"), "commonLabels has the label helm.sh/chart"),
        (("--set", "extraEnv[0].name=NODE_NAME,extraEnv[0].value=a"), "extraEnv: the chart itself has NODE_NAME"),
        (("--set", "extraVolumes[0].name=cdi"), "extraVolumes: the chart itself has cdi"),
        (("--set", "initContainers[0].name=plugin,initContainers[0].image=a"), "the chart itself has plugin"),
        (
            ("--set", "tracing.environment.OTEL_A=a,extraEnv[0].name=OTEL_A,extraEnv[0].value=b"),
            "the variable OTEL_A is set twice",
        ),
        (
            ("--set", "tracing.endpoint=http://a:4317,tracing.environment.OTEL_EXPORTER_OTLP_ENDPOINT=http://b:4317"),
            "the variable OTEL_EXPORTER_OTLP_ENDPOINT is set twice",
        ),
        (("--set", "probePort=13240"), "must differ, got 13240, 13240"),
        (("--set", "exporter.enabled=true,port=13241"), "must differ, got 13241, 13242, 3240, 13241"),
        (("--set", "listenOnNode=false,monitoring.enabled=true"), "Prometheus does not reach 127.0.0.1"),
        (("--set", "listenOnNode=false,monitoring.scrapeAnnotations=true"), "Prometheus does not reach 127.0.0.1"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_in_words(tools: Tools, flags: tuple[str, ...], words: str) -> None:
    done = tools.helm(*flags)
    assert done.returncode != 0
    assert words in done.stderr


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
    assert {port["hostIP"] for port in container["ports"]} == {"127.0.0.1"}
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
    flags = (
        "--set",
        "podLabels.team=lab,commonLabels.team=other",
        "--set-string",
        "podAnnotations.example\\.com/a=true",
    )
    objects = tools.chart(*flags)
    meta = objects[PLUGIN]["spec"]["template"]["metadata"]
    assert meta["labels"] == {"app.kubernetes.io/name": "usbip-plugin", "team": "lab"}
    assert meta["annotations"]["example.com/a"] == "true"
    assert objects[PLUGIN]["spec"]["selector"] == {"matchLabels": {"app.kubernetes.io/name": "usbip-plugin"}}


def test_labels_that_an_operator_selects_by_go_to_its_objects(tools: Tools) -> None:
    flags = "monitoring.enabled=true,monitoring.labels.release=stack,monitoring.interval=1m,commonLabels.release=other"
    objects = tools.chart("--set", flags)
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
        ("--set", f"image.digest={DIGEST},exporter.image.repository=other"): f"other@{DIGEST}",
        ("--set-string", f"image.digest={DIGEST},exporter.image.tag=8"): "usbip-plugin:8",
        ("--set-string", f"image.tag=7,exporter.image.digest={DIGEST}"): f"usbip-plugin@{DIGEST}",
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
        "--log-level=debug",
    ]
    assert {"name": "USBIP_EXPORTER_HTTP", "value": "[$(HOST_IP)]:9999"} in container["env"]
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


def test_a_digest_pins_the_image_of_every_container(tools: Tools) -> None:
    flags = ("--set", "loadModules.enabled=true,exporter.enabled=true,simulatedKernel.enabled=true")
    objects = tools.chart(*flags, "--set-string", f"image.digest={DIGEST},image.tag=7")
    images = {container["image"] for found in objects.values() for container in containers(found)}
    assert images == {f"usbip-plugin@{DIGEST}"}


@pytest.mark.parametrize("value", ["affinity", "hostAliases", "dnsConfig", "runtimeClassName", "dnsPolicy"])
def test_fields_of_the_pod_are_taken_as_they_are(tools: Tools, value: str) -> None:
    given: dict[str, object] = {
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
        "hostAliases": [{"ip": "192.0.2.1", "hostnames": ["lab-pi.home"]}],
        "dnsConfig": {"nameservers": ["192.0.2.53"], "options": [{"name": "ndots", "value": "2"}]},
        "runtimeClassName": "crun",
        "dnsPolicy": "Default",
    }
    assert pod_spec(tools, "--set-json", f"{value}={json.dumps(given[value])}")[value] == given[value]


def test_variables_volumes_and_containers_are_added_to_the_charts_own(tools: Tools) -> None:
    secret = {"name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": {"secretKeyRef": {"name": "otlp", "key": "headers"}}}
    given: dict[str, list[Object]] = {
        "extraEnv": [secret],
        "extraEnvFrom": [{"configMapRef": {"name": "proxy"}}],
        "extraVolumes": [{"name": "ca", "secret": {"secretName": "otlp"}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/otlp", "readOnly": True}],
        "initContainers": [{"name": "wait", "image": "busybox"}],
        "extraContainers": [{"name": "kube-rbac-proxy", "image": "kube-rbac-proxy"}],
    }
    plain = pod_spec(tools, "--set", "loadModules.enabled=true")
    flags = [word for key, value in given.items() for word in ("--set-json", f"{key}={json.dumps(value)}")]
    spec = pod_spec(tools, "--set", "loadModules.enabled=true", *flags)
    container, *beside = spec["containers"]
    (own,) = plain["containers"]
    assert container["env"] == own["env"] + given["extraEnv"]
    assert container["envFrom"] == given["extraEnvFrom"]
    assert container["volumeMounts"] == own["volumeMounts"] + given["extraVolumeMounts"]
    assert spec["volumes"] == plain["volumes"] + given["extraVolumes"]
    assert spec["initContainers"] == plain["initContainers"] + given["initContainers"]
    assert beside == given["extraContainers"]


def test_null_leaves_a_value_out(tools: Tools) -> None:
    names = ["commonLabels", "podLabels", "podAnnotations", "monitoring.labels", "tracing.environment", "tolerations"]
    names += ["extraEnv", "extraVolumes", "initContainers", "affinity", "dnsConfig", "podSecurityContext"]
    objects = tools.chart("--set", ",".join(f"{name}=null" for name in names), "--set", "monitoring.enabled=true")
    spec = objects[PLUGIN]["spec"]["template"]["spec"]
    assert not spec.keys() & {"tolerations", "initContainers", "affinity", "dnsConfig"}
    assert spec["securityContext"] == {}


def test_an_init_container_needs_no_module_to_load(tools: Tools) -> None:
    wait = [{"name": "wait", "image": "busybox"}]
    assert pod_spec(tools, "--set-json", f"initContainers={json.dumps(wait)}")["initContainers"] == wait


def test_a_log_level_is_a_flag_of_plugin_and_exporter(tools: Tools) -> None:
    (container,) = pod_spec(tools, "--set", "logLevel=debug")["containers"]
    assert parser().parse_args(container["args"]).log_level == "debug"
    (container,) = exported(tools, "--set", "exporter.logLevel=warn")["containers"]
    assert parser().parse_args(container["args"]).log_level == "warn"


def test_mount_and_flag_follow_the_container_runtimes_directory(tools: Tools) -> None:
    spec = pod_spec(tools, "--set", "cdiDirectory=/etc/cdi")
    (container,) = spec["containers"]
    assert str(parser().parse_args(container["args"]).cdi_directory) == "/etc/cdi"
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["cdi"] == "/etc/cdi"
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "cdi"]
    assert volume["hostPath"]["path"] == "/etc/cdi"


def test_security_contexts_of_plugin_and_exporter_are_changed_key_by_key(tools: Tools) -> None:
    flags = ("--set", "podSecurityContext.fsGroup=7,securityContext.capabilities.add={NET_ADMIN}")
    for spec in pod_spec(tools, *flags), exported(tools, *flags):
        assert spec["securityContext"] == {
            "runAsUser": 0,
            "runAsGroup": 0,
            "fsGroup": 7,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert spec["containers"][0]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            "appArmorProfile": {"type": "Unconfined"},
        }


def test_rights_and_admission_policy_follow_the_service_accounts(tools: Tools) -> None:
    flags = ("--set", "exporter.enabled=true,evict.enabled=true,openshift.enabled=true")
    names = "serviceAccount.name=usb,serviceAccount.annotations.team=lab,exporter.serviceAccount.name=usb-export"
    objects = tools.chart(*flags, "--set", names)
    bound = [subject["name"] for found in objects.values() for subject in found.get("subjects", ())]
    assert sorted(bound) == ["usb", "usb", "usb", "usb-export"]
    accounts = {name: found["metadata"] for (_, kind, _, name), found in objects.items() if kind == "ServiceAccount"}
    assert accounts.keys() == {"usb", "usb-export"}
    assert accounts["usb"]["annotations"] == {"team": "lab"}
    used = {
        found["metadata"]["name"]: found["spec"]["template"]["spec"]["serviceAccountName"]
        for (_, kind, _, _), found in objects.items()
        if kind == "DaemonSet"
    }
    assert used == {"usbip-plugin": "usb", "usbip-exporter": "usb-export"}
    policy = objects["admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "", "usbip-plugin"]
    (condition,) = policy["spec"]["matchConditions"]
    assert condition["expression"].endswith(f"'system:serviceaccount:{NAMESPACE}:usb'")
    constraints = objects["security.openshift.io/v1", "SecurityContextConstraints", "", "usbip-plugin"]
    assert constraints["users"] == [f"system:serviceaccount:{NAMESPACE}:{name}" for name in ("usb", "usb-export")]


def test_service_accounts_of_others_are_not_created(tools: Tools) -> None:
    objects = tools.chart(*EXPORT, "--set", "serviceAccount.create=false,exporter.serviceAccount.create=false")
    assert not [name for _, kind, _, name in objects if kind == "ServiceAccount"]


def test_common_labels_go_to_every_object_and_pod_and_to_no_selector(tools: Tools) -> None:
    flags = "loadModules,exporter,evict,openshift,monitoring,simulatedKernel,testServer".replace(",", ".enabled=true,")
    objects = tools.chart("--set", f"{flags}.enabled=true", "--set", "commonLabels.cost=lab")
    assert objects.keys() == {key for variant in VARIANTS for key in tools.chart(*chart_values(variant))}
    for key, found in objects.items():
        labels = found["metadata"]["labels"]
        assert labels["cost"] == "lab", key
        assert labels["app.kubernetes.io/instance"] == "usbip-plugin", key
        assert labels["app.kubernetes.io/version"] == __version__, key
        template = pod_template(found)
        if template is not None:
            assert template["metadata"]["labels"]["cost"] == "lab", key
            assert "cost" not in found["spec"].get("selector", {}).get("matchLabels", {}), key


def test_pods_can_be_scraped_by_annotations(tools: Tools) -> None:
    flags = ("--set", "monitoring.scrapeAnnotations=true,port=9999")
    meta = tools.chart(*flags)[PLUGIN]["spec"]["template"]["metadata"]
    assert meta["annotations"] == {
        "kubectl.kubernetes.io/default-container": "plugin",
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "9999",
        "prometheus.io/path": "/metrics",
    }


@pytest.mark.parametrize(
    ("value", "kinds"),
    [("podMonitor", ["PodMonitor", "PodMonitor"]), ("rules", ["PrometheusRule"]), ("dashboard", ["ConfigMap"])],
)
def test_each_part_of_the_monitoring_can_be_left_out(tools: Tools, value: str, kinds: list[str]) -> None:
    everything = tools.chart("--set", "monitoring.enabled=true")
    left = tools.chart("--set", f"monitoring.enabled=true,monitoring.{value}=false")
    assert sorted(kind for _, kind, _, _ in everything.keys() - left.keys()) == kinds


def test_the_dashboard_has_its_folder(tools: Tools) -> None:
    objects = tools.chart("--set", "monitoring.enabled=true,monitoring.dashboardAnnotations.grafana_folder=USB")
    meta = objects["v1", "ConfigMap", NAMESPACE, "usbip-plugin-dashboard"]["metadata"]
    assert meta["annotations"] == {"grafana_folder": "USB"}
    assert meta["labels"]["grafana_dashboard"] == "1"


def test_a_configuration_may_be_a_mapping(tools: Tools) -> None:
    config = {"resources": {"a": [{"target": {"host": "h"}, "selector": {"vendor": "0951", "product": "1e10"}}]}}
    export = [{"vendor": "0951"}]
    given = {"config": config, "exporter.config": {"export": export}}
    flags = [word for key, value in given.items() for word in ("--set-json", f"{key}={json.dumps(value)}")]
    done = tools.helm(*EXPORT, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    objects = by_name(done.stdout)
    text = objects["v1", "ConfigMap", NAMESPACE, "usbip-plugin"]["data"]["config.yaml"]
    (device,) = parse_config(text).config.resources[0].devices
    assert (device.selector.vendor, device.selector.product) == (0x951, 0x1E10)
    text = objects["v1", "ConfigMap", NAMESPACE, "usbip-exporter"]["data"]["export.yaml"]
    assert parse_export(text).config == ExportConfig((replace(device.selector, product=None),), fence=True)


def test_a_configmap_of_ones_own_is_mounted_in_place_of_the_charts(tools: Tools) -> None:
    objects = tools.chart(*EXPORT, "--set", "existingConfigMap=sticks,exporter.existingConfigMap=exports")
    assert not [name for _, kind, _, name in objects if kind == "ConfigMap"]
    for key, name in (PLUGIN, "sticks"), (EXPORTER, "exports"):
        volumes = objects[key]["spec"]["template"]["spec"]["volumes"]
        assert [volume["configMap"] for volume in volumes if "configMap" in volume] == [{"name": name}]


def test_openshift_admits_pods_of_plugin_and_exporter(tools: Tools) -> None:
    """The constraints allow what the pods ask for; another SELinux type stays possible."""
    objects = tools.chart("--set", "openshift.enabled=true,exporter.enabled=true,loadModules.enabled=true")
    allowed = objects["security.openshift.io/v1", "SecurityContextConstraints", "", "usbip-plugin"]
    for key in PLUGIN, EXPORTER:
        spec = objects[key]["spec"]["template"]["spec"]
        assert spec["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}
        assert spec["securityContext"]["runAsUser"] == allowed["runAsUser"]["uid"]
        assert f"system:serviceaccount:{NAMESPACE}:{spec['serviceAccountName']}" in allowed["users"]
        kinds = {kind for volume in spec["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= set(allowed["volumes"])
        assert (allowed["allowHostNetwork"], allowed["allowHostPorts"]) == (True, True)
        for container in containers(objects[key]):
            capabilities = container["securityContext"]["capabilities"]
            assert capabilities["drop"] == allowed["requiredDropCapabilities"]
            assert set(capabilities.get("add", ())) <= set(allowed["allowedCapabilities"])
            assert container["securityContext"]["readOnlyRootFilesystem"]
    own = pod_spec(tools, "--set", "openshift.enabled=true,seLinuxOptions.type=usbip_t")
    assert own["securityContext"]["seLinuxOptions"] == {"type": "usbip_t"}


def test_the_configuration_is_taken_as_it_is(tools: Tools) -> None:
    for key in "resources", "Re_sources":
        text = f'{key}:\n  a:\n    - selector: {{vendor: "0951", product: 0666}}\n\n# {{{{ .Values }}}}\n'
        objects = tools.chart("--set-json", f"config={json.dumps(text)}")
        assert objects["v1", "ConfigMap", NAMESPACE, "usbip-plugin"]["data"] == {"config.yaml": text}
