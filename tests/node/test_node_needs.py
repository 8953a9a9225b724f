"""Needs of the plugin's container on its node (docs/concepts/security.md): without one, it fails and names the need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.node.node_api import Api, Object, until
from tests.node.node_echo import POD_SCRIPT
from tests.node.node_plugin import RESOURCE, SYSTEM, Plugin, check_pod, daemon_set, manifests
from tests.node.node_pods import NAMESPACE, Container, admitted, pod_of
from tests.rigs.usbipd import RealUsbipd

NOBODY = 65534


def as_nobody(container: Object) -> None:
    container["securityContext"] |= {"runAsUser": NOBODY, "runAsGroup": NOBODY}


def confined(container: Object) -> None:
    del container["securityContext"]["appArmorProfile"]


def read_only(name: str) -> Callable[[Object], None]:
    def change(container: Object) -> None:
        next(mount for mount in container["volumeMounts"] if mount["name"] == name)["readOnly"] = True

    return change


def without(name: str) -> Callable[[Object], None]:
    def change(container: Object) -> None:
        mounts = container["volumeMounts"]
        mounts[:] = [mount for mount in mounts if mount["name"] != name]

    return change


def nothing(container: Object) -> None:
    del container


ATTACH = "cannot write /sys/devices/platform/vhci_hcd.0/attach"
NEEDED: dict[str, tuple[Callable[[Object], None], str]] = {
    "root": (as_nobody, f"{ATTACH}: Permission denied"),
    "platform": (without("platform"), f"{ATTACH}: Read-only file system"),
    "platform-writable": (read_only("platform"), f"{ATTACH}: Read-only file system"),
    "records": (without("vhci-records"), "port records cannot be written; mount /run/vhci_hcd writable"),
    "cdi": (without("cdi"), "/var/run/cdi does not exist"),
    "cdi-writable": (read_only("cdi"), "/var/run/cdi is on a read-only mount"),
    "device-plugins": (without("device-plugins"), "/var/lib/kubelet/device-plugins does not exist"),
    "pod-resources": (without("pod-resources"), "/var/lib/kubelet/pod-resources/kubelet.sock"),
    "apparmor": (confined, f"{ATTACH}: Permission denied"),
}


def run_check(
    api: Api, base: Plugin, name: str, change: Callable[[Object], None], *, token: bool = True
) -> tuple[int, str]:
    """Returns exit status and output of `usbip-plugin check` in a changed copy of the plugin's pod."""
    documents = manifests("base", base.busid, cdi=True)
    api.apply(next(document for document in documents if document["kind"] == "ConfigMap"))
    pod = check_pod(daemon_set(documents), name)
    (container,) = pod["spec"]["containers"]
    change(container)
    pod["spec"]["automountServiceAccountToken"] = token
    api.create(pod)
    try:
        end = Container(api, SYSTEM, name, container["name"])
        return end.until_ended(), end.log()
    finally:
        api.delete("Pod", SYSTEM, name, wait=False)


def test_check_finds_nothing_missing(api: Api, base: Plugin) -> None:
    status, output = run_check(api, base, "check-all", nothing)
    assert status == 0, output


@pytest.mark.parametrize("needed", NEEDED)
def test_check_names_a_missing_part(api: Api, base: Plugin, needed: str) -> None:
    change, cause = NEEDED[needed]
    status, output = run_check(api, base, f"check-{needed}", change)
    assert (status, "FAIL" in output) == (1, True), output
    assert cause in output
    if needed == "apparmor":
        assert Path("/sys/module/apparmor/parameters/enabled").read_text().strip() == "Y"


@pytest.mark.parametrize("change", [without("drivers-probe"), read_only("drivers-probe")], ids=["without", "read-only"])
def test_check_warns_where_no_interface_can_be_withheld(
    api: Api, base: Plugin, change: Callable[[Object], None]
) -> None:
    status, output = run_check(api, base, "check-drivers-probe", change)
    assert status == 0, output
    assert "WARN  vhci_hcd access" in output
    assert "cannot write /sys/bus/usb/drivers_probe: Read-only file system" in output


def test_check_reports_a_missing_token(api: Api, base: Plugin) -> None:
    status, output = run_check(api, base, "check-token", nothing, token=False)
    assert status == 1, output
    assert "FAIL  API server" in output


def test_without_the_hosts_network_a_pod_loses_its_device_with_the_plugins_pod(api: Api, base: Plugin) -> None:
    documents = manifests("base", base.busid)
    spec = daemon_set(documents)["spec"]["template"]["spec"]
    spec["hostNetwork"] = False
    spec["containers"][0]["args"] = ["run", "--listen=0.0.0.0:13240"]
    for name in ("ports", "startupProbe", "livenessProbe", "readinessProbe"):  # of the host's network
        del spec["containers"][0][name]
    base.install(documents)
    try:
        user = admitted(api, pod_of("user", POD_SCRIPT, resources={RESOURCE: "1"}))
        user.until_running()
        until(lambda: "opened" in user.log(), "the pod has opened its tty")
        api.delete("Pod", SYSTEM, base.pod()["metadata"]["name"])
        until(lambda: "hung up" in user.log() or "Error" in user.log(), "the pod has lost its tty")
    finally:
        api.delete("Pod", NAMESPACE, "user")
        # The connection ended with its network namespace, without a packet: the server still has the device in use.
        RealUsbipd().drop(base.busid)
