"""The exporter's DaemonSet as shipped, with the plugin as its client: on one node, the real kernel at both ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml

from tests.node.node_api import Api, Object, until
from tests.node.node_echo import POD_SCRIPT, answer, far_end
from tests.node.node_plugin import ADDRESS, RESOURCE, SYSTEM, Plugin, manifests
from tests.node.node_pods import NAMESPACE, NODE, Container, admitted, pod_of
from tests.rigs.usbipd import RealUsbipd

NAME = "usbip-exporter"
LABEL = f"app.kubernetes.io/name={NAME}"


@dataclass(frozen=True)
class Exporter:
    """The exporter's pod. busid: of the device that it exports."""

    container: Container
    busid: str

    def exported(self) -> Object:
        """Returns what `usbip-plugin exported` prints in the pod, without arguments that say where the exporter is."""
        found: Object = json.loads(self.container.run("usbip-plugin", "exported", "-o", "json"))
        return found

    def device(self) -> Object:
        (device,) = [device for device in self.exported()["devices"] if device["busid"] == self.busid]
        return dict(device)


@pytest.fixture
def exporter(api: Api, plugin: Plugin, usbipd: RealUsbipd) -> Iterator[Exporter]:
    """Replaces usbipd by the exporter's DaemonSet."""
    documents = [one for one in manifests("exporter", plugin.busid) if one["metadata"]["name"] == NAME]
    for document in documents:
        if document["kind"] == "ConfigMap":
            config = {"export": [{"bus_id": plugin.busid}], "fence": True}
            document["data"] = {"export.yaml": yaml.safe_dump(config)}
    usbipd.stop()
    try:
        for document in documents:
            api.apply(document)
        label = {"usbip.dev/exporter": "true"}
        api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": label}})

        def available() -> bool:
            found = api.get("DaemonSet", SYSTEM, NAME)
            return found is not None and found.get("status", {}).get("numberAvailable") == 1

        until(available, "the exporter is ready")
        (pod,) = api.all("Pod", SYSTEM, LABEL)
        yield Exporter(Container(api, SYSTEM, pod["metadata"]["name"], "exporter"), plugin.busid)
    finally:
        api.delete("DaemonSet", SYSTEM, NAME)
        until(lambda: not api.all("Pod", SYSTEM, LABEL), "the exporter's pod is gone")
        usbipd.bind(plugin.busid)
        usbipd.start()


def test_the_exporters_pod_exports_to_the_holder_of_the_lock_and_says_so(
    api: Api, plugin: Plugin, exporter: Exporter, far_busid: str
) -> None:
    found = exporter.exported()
    assert (found["running"], found["fence"]) == (True, True)
    assert found["listen"] == f"[{ADDRESS}]:3240"
    until(lambda: exporter.exported()["fence_problem"] is None, "the exporter has read the locks")
    assert (exporter.device()["state"], exporter.device()["problem"]) == ("available", None)
    until(plugin.offered, "the plugin offers what the exporter lists")
    try:
        user = admitted(api, pod_of("user", POD_SCRIPT, resources={RESOURCE: "1"}))
        user.until_running()
        until(lambda: "opened" in user.log(), "the pod has opened its tty")
        with far_end(far_busid) as fd:
            assert answer(fd, b"through the fence") == b"THROUGH THE FENCE"
        device = exporter.device()
        assert device["state"] == "in_use"
        assert device["peer"].startswith(f"{ADDRESS}:")
    finally:
        api.delete("Pod", NAMESPACE, "user")
    until(lambda: exporter.device()["state"] == "available", "the device is free after its pod")
