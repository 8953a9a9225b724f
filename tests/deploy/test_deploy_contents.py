"""The manifests agree with the program, and request no more rights than it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.rendering import (
    DEPLOY,
    NAMESPACE,
    VARIANTS,
    Object,
    Tools,
    containers,
    kustomize_directory,
    pod_template,
)
from usbip_plugin.cli.parser import parser
from usbip_plugin.config.export import ExportConfig, parse_export
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.schema import (
    DEFAULT_CDI_DIRECTORY,
    DEFAULT_CONFIG_PATH,
    DEFAULT_EXPORT_CONFIG_PATH,
    DEFAULT_PLUGIN_DIRECTORY,
    DEFAULT_POD_RESOURCES_SOCKET,
    DEFAULT_STATE_DIRECTORY,
    Config,
)
from usbip_plugin.observe.listen import split_addresses
from usbip_plugin.observe.liveness import Verdict
from usbip_plugin.observe.pages import probe_pages
from usbip_plugin.vhci import linux

RECORDS = str(linux.RECORDS)

PLUGIN = ("apps/v1", "DaemonSet", NAMESPACE, "usbip-plugin")
EXPORTER = ("apps/v1", "DaemonSet", NAMESPACE, "usbip-exporter")
EXPORT_YAML = DEPLOY / "components" / "exporter" / "export.yaml"
DRIVERS_PROBE = "/sys/bus/usb/drivers_probe"
"""Not with a simulated kernel: a node without USB does not have it, so the container could not start."""
HOST_PATHS = {
    "usbip-plugin": {
        DEFAULT_PLUGIN_DIRECTORY,
        str(Path(DEFAULT_POD_RESOURCES_SOCKET).parent),
        "/sys/devices/platform",
        DRIVERS_PROBE,
        RECORDS,
        DEFAULT_CDI_DIRECTORY,
    },
    "usbip-exporter": {"/sys/bus/usb", "/sys/devices", DEFAULT_STATE_DIRECTORY},
    "usbip-simulated-kernel": {RECORDS, "/dev"},
    "usbip-server": set(),
    "usbip-plugin-validate": set(),
}
ON_THE_HOST = ("usbip-plugin", "usbip-exporter")
"""Workloads in the host's network, with a token of the API server."""
CAPABILITIES = {
    "plugin": set(),
    "exporter": set(),
    "load-module": {"SYS_CHROOT", "SYS_MODULE"},
    "kernel": {"MKNOD"},
    "server": set(),
    "validate": set(),
}


def plugin(tools: Tools, variant: str = "base") -> Object:
    found: Object = tools.kustomize(kustomize_directory(variant))[PLUGIN]["spec"]["template"]["spec"]
    return found


def plugin_container(tools: Tools, variant: str = "base") -> Object:
    (found,) = plugin(tools, variant)["containers"]
    return dict(found)


@pytest.mark.parametrize("host_ip", ["192.0.2.7", "2001:db8::7"])
def test_the_command_lines_are_valid(
    tools: Tools, host_ip: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = set()
    for where, found in tools.everything():
        for container in containers(found):
            if "command" in container:
                assert container["command"][:-1] == ["chroot", "/host", "modprobe", "-a"], where
                continue
            arguments = [argument.replace("$(HOST_IP)", host_ip) for argument in container["args"]]
            with monkeypatch.context() as environment:
                for variable in container.get("env", ()):
                    environment.setenv(variable["name"], variable.get("value", "").replace("$(HOST_IP)", host_ip))
                try:
                    options = parser().parse_args(arguments)
                except SystemExit:
                    pytest.fail(f"{where}: {arguments}: {capsys.readouterr().err}")
                asked = parser().parse_args(["exported"]).http
            commands.add(options.command)
            if options.command == "run":
                assert_served(container, {"http": options.listen, "probes": options.probes}, host_ip)
            if options.command == "export":
                assert_served(container, {"usbip": options.listen, "http": options.http}, host_ip)
                assert asked == options.http, "what `usbip-plugin exported` asks in this container"
    assert commands == {"run", "simulate", "export", "validate"}


def test_the_plugin_and_the_exporter_run_on_one_node(tools: Tools) -> None:
    """The scheduler takes a host port without an address for all addresses."""
    objects = tools.kustomize(kustomize_directory("exporter"))
    ports = [
        port["hostPort"]
        for found in objects.values()
        if found["kind"] == "DaemonSet"
        for container in containers(found)
        for port in container["ports"]
    ]
    assert len(ports) == len(set(ports)) == 4


def assert_served(container: Object, addresses: dict[str, str], host_ip: str) -> None:
    """Asserts that a container on the host's network names exactly the ports at which it listens."""
    assert {port["name"] for port in container["ports"]} == addresses.keys()
    for port in container["ports"]:
        hosts, numbers = zip(*split_addresses(addresses[port["name"]]), strict=True)
        assert hosts[-1] == port.get("hostIP", host_ip)
        assert {*hosts} <= {"127.0.0.1", host_ip}
        assert {*numbers} == {port["containerPort"]} == {port["hostPort"]}


def test_probes_request_pages_that_are_served(tools: Tools) -> None:
    container = plugin_container(tools)
    pages = probe_pages(alive=lambda: Verdict(ok=True), ready=lambda: Verdict(ok=True))
    probes = {kind: container[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert all(probe["path"] in pages for probe in probes.values())
    assert {(probe["host"], probe["port"]) for probe in probes.values()} == {("127.0.0.1", "probes")}
    assert probes["readinessProbe"]["path"] == "/readyz"
    assert probes["livenessProbe"]["path"] == "/healthz"
    (other,) = exporter(tools)["containers"]
    for kind, probe in probes.items():
        assert other[kind] == {**container[kind], "httpGet": {"path": probe["path"], "port": "http"}}


def test_the_paths_of_the_plugin_are_mounted(tools: Tools) -> None:
    for variant in VARIANTS:
        volumes = {volume["name"]: volume for volume in plugin(tools, variant)["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in plugin_container(tools, variant)["volumeMounts"]}
        config = mounts.pop(str(Path(DEFAULT_CONFIG_PATH).parent))
        assert volumes[config["name"]]["configMap"] == {"name": "usbip-plugin"}
        # a subPath is not updated: no reload, and no new kubelet socket
        assert not any("subPath" in mount for mount in (config, *mounts.values()))
        assert mounts.keys() == HOST_PATHS["usbip-plugin"] - ({DRIVERS_PROBE} if variant == "kind" else set())
        for path, mount in mounts.items():
            # the kubelet and the container runtime use the host's paths
            assert volumes[mount["name"]]["hostPath"]["path"] == path
        read_only = {path for path, mount in mounts.items() if mount.get("readOnly")}
        assert read_only == {str(Path(DEFAULT_POD_RESOURCES_SOCKET).parent)}


def test_node_and_namespace_come_from_the_pod(tools: Tools) -> None:
    env = {
        variable["name"]: variable["valueFrom"]["fieldRef"]["fieldPath"] for variable in plugin_container(tools)["env"]
    }
    assert env == {"NODE_NAME": "spec.nodeName", "POD_NAMESPACE": "metadata.namespace", "HOST_IP": "status.hostIP"}


def test_the_shipped_configuration_is_valid_and_offers_nothing(tools: Tools) -> None:
    text = tools.kustomize(DEPLOY)["v1", "ConfigMap", NAMESPACE, "usbip-plugin"]["data"][Path(DEFAULT_CONFIG_PATH).name]
    assert parse_config(text).config == Config(())


def test_the_example_in_the_shipped_configuration_is_valid() -> None:
    text = (DEPLOY / "base" / "config.yaml").read_text(encoding="utf-8")
    example = re.findall(r"^# (resources:$|  .*$)", text, re.MULTILINE)
    parsed = parse_config("\n".join(example))
    assert [resource.name for resource in parsed.config.resources] == ["storage", "scanner"]
    assert parsed.warnings == ()


def test_the_test_server_has_the_devices_of_its_configuration(tools: Tools) -> None:
    objects = tools.kustomize(kustomize_directory("kind"))
    text = objects["v1", "ConfigMap", NAMESPACE, "usbip-plugin"]["data"][Path(DEFAULT_CONFIG_PATH).name]
    parsed = parse_config(text)
    assert parsed.warnings == ()
    service = objects["v1", "Service", NAMESPACE, "usbip-server"]
    (port,) = service["spec"]["ports"]
    (container,) = containers(objects["apps/v1", "Deployment", NAMESPACE, "usbip-server"])
    for resource in parsed.config.resources:
        (device,) = resource.devices
        assert (device.target.host, device.target.port) == (service["metadata"]["name"], port["port"])
        vendor, product = device.selector.vendor, device.selector.product
        assert isinstance(vendor, int)
        assert isinstance(product, int)
        ids = f"{vendor:04x}:{product:04x}"
        assert sum(f"={ids}" in argument for argument in container["args"]) == 1


def test_the_simulated_kernel_and_the_plugin_use_one_socket(tools: Tools) -> None:
    objects = tools.kustomize(kustomize_directory("kind"))
    (kernel,) = containers(objects["apps/v1", "DaemonSet", NAMESPACE, "usbip-simulated-kernel"])
    socket = "/run/vhci_hcd/simulated.sock"
    assert f"--socket={socket}" in kernel["args"]
    assert f"--simulated-kernel={socket}" in plugin_container(tools, "kind")["args"]
    for variant in set(VARIANTS) - {"kind"}:
        assert not any("simulated" in argument for argument in plugin_container(tools, variant)["args"])


def test_containers_have_no_more_rights_than_needed(tools: Tools) -> None:
    names = set()
    for where, found in tools.everything():
        template = pod_template(found)
        if template is None:
            continue
        assert template["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not template["spec"].keys() & {"hostPID", "hostIPC"}, where
        assert template["spec"].get("hostNetwork", False) is (found["metadata"]["name"] in ON_THE_HOST), where
        for container in containers(found):
            security = dict(container["securityContext"])
            capabilities = security.pop("capabilities")
            assert capabilities["drop"] == ["ALL"], where
            assert set(capabilities.get("add", ())) == CAPABILITIES[container["name"]], where
            profile = security.pop("appArmorProfile", None)
            assert (profile == {"type": "Unconfined"}) is (container["name"] in ("plugin", "exporter")), where
            # no other key: not privileged, no own user or seccomp profile
            assert security == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}, where
            names.add(container["name"])
    assert names == CAPABILITIES.keys()


def test_pods_mount_only_the_host_paths_they_need(tools: Tools) -> None:
    for where, found in tools.everything():
        template = pod_template(found)
        if template is None:
            continue
        paths = {volume["hostPath"]["path"] for volume in template["spec"].get("volumes", ()) if "hostPath" in volume}
        loader = {"/"} if template["spec"].get("initContainers") else set()
        absent = {DRIVERS_PROBE} if " kind:" in where else set()
        assert paths == (HOST_PATHS[found["metadata"]["name"]] | loader) - absent, where
        for container in containers(found):
            mounted = {mount["name"]: mount for mount in container.get("volumeMounts", ())}
            if container["name"] != "load-module":
                assert "host" not in mounted, where
            else:
                assert mounted == {"host": {"name": "host", "mountPath": "/host", "readOnly": True}}, where


def exporter(tools: Tools) -> Object:
    found: Object = tools.kustomize(kustomize_directory("exporter"))[EXPORTER]["spec"]["template"]["spec"]
    return found


def test_an_exporter_runs_only_on_labelled_nodes_whatever_their_taints(tools: Tools) -> None:
    spec = exporter(tools)
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux", "usbip.dev/exporter": "true"}
    assert spec["tolerations"] == [{"operator": "Exists"}]


def test_the_exporter_has_its_configuration_and_its_state_where_it_looks_for_them(tools: Tools) -> None:
    spec = exporter(tools)
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    config = mounts.pop(str(Path(DEFAULT_EXPORT_CONFIG_PATH).parent))
    assert volumes[config["name"]]["configMap"] == {"name": "usbip-exporter"}
    # a subPath is not updated: no reload
    assert "subPath" not in config
    assert mounts.keys() == HOST_PATHS["usbip-exporter"]
    assert {path: volumes[mount["name"]]["hostPath"]["path"] for path, mount in mounts.items()} == {
        path: path for path in mounts
    }
    assert not any(mount.get("readOnly") for mount in mounts.values())


def test_the_exporter_only_reads_the_leases_of_its_namespace(tools: Tools) -> None:
    objects = tools.kustomize(kustomize_directory("exporter"))
    role = objects["rbac.authorization.k8s.io/v1", "Role", NAMESPACE, "usbip-exporter"]
    assert role["rules"] == [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "list", "watch"]}
    ]
    account = {"kind": "ServiceAccount", "name": exporter(tools)["serviceAccountName"], "namespace": NAMESPACE}
    bound = [found["roleRef"]["name"] for found in objects.values() if account in found.get("subjects", ())]
    assert bound == ["usbip-exporter"]


def test_the_exporters_shipped_configuration_is_valid_fenced_and_exports_nothing(tools: Tools) -> None:
    objects = tools.kustomize(kustomize_directory("exporter"))
    text = objects["v1", "ConfigMap", NAMESPACE, "usbip-exporter"]["data"][Path(DEFAULT_EXPORT_CONFIG_PATH).name]
    assert parse_export(text).config == ExportConfig((), fence=True)


def test_the_examples_in_the_exporters_configuration_are_valid() -> None:
    text = EXPORT_YAML.read_text(encoding="utf-8")
    export, config = (
        "\n".join(re.findall(rf"^# ((?:{keys}):.*$|  .*$)", part, re.MULTILINE))
        for keys, part in zip(("export|allow", "resources"), text.split("\n# The plugin's config.yaml"), strict=True)
    )
    parsed = parse_export(export)
    assert (len(parsed.config.export), parsed.warnings) == (2, ())
    assert parsed.config.allow is not None
    assert parse_config(config).warnings == ()
    (device,) = parse_config(config).config.resources[0].devices
    assert device.selector == parsed.config.export[0]


def test_every_container_has_a_memory_limit_and_requests(tools: Tools) -> None:
    for where, found in tools.everything():
        for container in containers(found):
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}, where
            assert container["resources"]["limits"].keys() == {"memory"}, where
    assert plugin_container(tools)["resources"]["limits"] == {"memory": "64Mi"}


def test_the_plugin_runs_on_every_node_and_is_not_preempted(tools: Tools) -> None:
    spec = plugin(tools)
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["serviceAccountName"] == "usbip-plugin"


def test_the_name_of_a_server_is_not_first_one_of_a_service(tools: Tools) -> None:
    spec = plugin(tools)
    assert spec["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert spec["dnsConfig"] == {"options": [{"name": "ndots", "value": "1"}]}


def test_only_plugin_and_exporter_get_a_token(tools: Tools) -> None:
    for where, found in tools.everything():
        template = pod_template(found)
        if template is not None and found["metadata"]["name"] not in ON_THE_HOST:
            assert template["spec"]["automountServiceAccountToken"] is False, where


def test_no_termination_message_is_left_on_a_host(tools: Tools) -> None:
    for where, found in tools.everything():
        for container in containers(found):
            path = Path(container.get("terminationMessagePath", "/dev/termination-log"))
            mounts = {Path(mount["mountPath"]) for mount in container.get("volumeMounts", ())}
            assert not mounts & set(path.parents), where
