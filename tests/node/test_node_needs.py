"""What the plugin's container needs of its node: without any one thing it fails and says which. docs/security.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from node_api import Api, Object, until
from node_echo import POD_SCRIPT
from node_plugin import RESOURCE, SYSTEM, Plugin, check_pod, daemon_set, manifests
from node_pods import NAMESPACE, Container, pod_of

NOBODY = 65534


def as_nobody(spec: Object) -> None:
    spec["securityContext"] |= {"runAsUser": NOBODY, "runAsGroup": NOBODY}


def without_token(spec: Object) -> None:
    spec["automountServiceAccountToken"] = False


def confined(spec: Object) -> None:
    del spec["containers"][0]["securityContext"]["appArmorProfile"]


def read_only(name: str) -> Callable[[Object], None]:
    def change(spec: Object) -> None:
        next(mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == name)["readOnly"] = True

    return change


def without(name: str) -> Callable[[Object], None]:
    def change(spec: Object) -> None:
        mounts = spec["containers"][0]["volumeMounts"]
        mounts[:] = [mount for mount in mounts if mount["name"] != name]

    return change


def run_check(api: Api, installation: Plugin, name: str, change: Callable[[Object], None] | None) -> tuple[int, str]:
    """Exit status and output of `usbip-plugin check` in a pod like the plugin's own, but for the change."""
    pod = check_pod(daemon_set(manifests("base", installation.busid)), name)
    if change is not None:
        change(pod["spec"])
    api.create(pod)
    try:
        container = Container(api, SYSTEM, name, "plugin")
        return container.until_ended(), container.log()
    finally:
        api.delete("Pod", SYSTEM, name)


def test_check_finds_nothing_missing(api: Api, plugin: Plugin) -> None:
    status, output = run_check(api, plugin, "check-all", None)
    assert status == 0, output


NEEDED: dict[str, tuple[Callable[[Object], None], str]] = {
    "root": (as_nobody, "cannot write /sys/devices/platform/vhci_hcd.0/attach: Permission denied"),
    "platform": (without("platform"), "cannot write /sys/devices/platform/vhci_hcd.0/attach: Read-only file system"),
    "platform-writable": (
        read_only("platform"),
        "cannot write /sys/devices/platform/vhci_hcd.0/attach: Read-only file system",
    ),
    "records": (without("vhci-records"), "port records cannot be written; mount /run/vhci_hcd writable"),
    "device-plugins": (without("device-plugins"), "/var/lib/kubelet/device-plugins is not there"),
    "pod-resources": (without("pod-resources"), "/var/lib/kubelet/pod-resources/kubelet.sock"),
    "token": (without_token, "API server"),
    "apparmor": (confined, "cannot write /sys/devices/platform/vhci_hcd.0/attach: Permission denied"),
}


@pytest.mark.parametrize("needed", NEEDED)
def test_without_it_check_says_so(api: Api, plugin: Plugin, needed: str) -> None:
    change, cause = NEEDED[needed]
    if needed == "apparmor":
        assert Path("/sys/module/apparmor/parameters/enabled").read_text().strip() == "Y"
    status, output = run_check(api, plugin, f"check-{needed}", change)
    assert status == 1, output
    assert "FAIL" in output
    assert cause in output


def test_without_the_hosts_network_a_pod_loses_its_device_with_the_plugins_pod(api: Api, installation: Plugin) -> None:
    documents = manifests("base", installation.busid)
    spec = daemon_set(documents)["spec"]["template"]["spec"]
    spec["hostNetwork"] = False
    spec["containers"][0]["args"] = ["run", "--listen=0.0.0.0:13240"]
    for port in spec["containers"][0]["ports"]:
        del port["hostPort"]
    installation.install(documents)
    api.create(pod_of("user", POD_SCRIPT, resources={RESOURCE: "1"}))
    user = Container(api, NAMESPACE, "user", "main")
    try:
        user.until_running()
        until(lambda: "opened" in user.log(), "the pod has opened its tty")
        api.delete("Pod", SYSTEM, installation.pod()["metadata"]["name"])
        until(lambda: "hung up" in user.log() or "Error" in user.log(), "the pod has lost its tty")
    finally:
        api.delete("Pod", NAMESPACE, "user")
