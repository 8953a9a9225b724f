"""The plugin's DaemonSet as shipped, and with changes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import yaml

from tests.node.node_api import Api, Object, until
from tests.node.node_pods import IMAGE, NODE, Container

SYSTEM = "usbip-system"
NAME = "usbip-plugin"
LABEL = f"app.kubernetes.io/name={NAME}"
ADDRESS = "10.0.2.15"  # the node's own; reached from its pods, too
RESOURCE = "usbip.dev/serial"


def manifests(name: str, busid: str, **keys: object) -> list[Object]:
    """Returns the manifests of base, modules or exporter with the guest's image and a configuration of one device.

    keys: more keys of the resource, such as cdi=True. Other keys change the pod template, so the plugin is replaced.
    """
    documents: list[Object] = list(yaml.safe_load_all((Path(os.environ["NODE_STATE"]) / f"{name}.yaml").read_text()))
    resource = {"devices": [{"target": {"host": ADDRESS}, "selector": {"bus_id": busid}}], **keys}
    config = {"resources": {"serial": resource}}
    for document in documents:
        if document["kind"] == "ConfigMap":
            document["data"] = {"config.yaml": yaml.safe_dump(config)}
        if document["kind"] == "DaemonSet":
            template = document["spec"]["template"]
            template["metadata"].setdefault("annotations", {})["test/keys"] = str(sorted(keys.items()))
            spec = template["spec"]
            for container in (*spec["containers"], *spec.get("initContainers", ())):
                container["image"] = IMAGE
    return documents


def daemon_set(documents: list[Object]) -> Object:
    (found,) = [document for document in documents if document["kind"] == "DaemonSet"]
    return found


def check_pod(template: Object, name: str) -> Object:
    """Returns a pod like that of the DaemonSet that runs `usbip-plugin check` once."""
    spec = copy.deepcopy(template["spec"]["template"]["spec"])
    (container,) = spec["containers"]
    container["args"] = ["check"]
    # the running plugin has the port of the host
    for key in ("ports", "startupProbe", "livenessProbe", "readinessProbe"):
        container.pop(key, None)
    spec |= {"restartPolicy": "Never", "nodeName": NODE}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": SYSTEM}, "spec": spec}


class Plugin:
    """The plugin in a cluster with one node. busid: of its device."""

    def __init__(self, api: Api, busid: str) -> None:
        self.api = api
        self.busid = busid

    def install(self, documents: list[Object]) -> None:
        """Applies the manifests, and waits until their plugin is ready and its device is offered."""
        for document in documents:
            self.api.apply(document)
        until(self._rolled_out, "the plugin is ready")
        until(self.offered, "the device is offered")

    def _rolled_out(self) -> bool:
        found = self.api.get("DaemonSet", SYSTEM, NAME)
        assert found is not None
        status = found.get("status", {})
        return (
            status.get("observedGeneration") == found["metadata"]["generation"]
            and status.get("updatedNumberScheduled") == 1
            and status.get("numberAvailable") == 1
            and len(self.api.all("Pod", SYSTEM, LABEL)) == 1
        )

    def offered(self) -> bool:
        node = self.api.get("Node", "", NODE)
        return node is not None and node["status"]["allocatable"].get(RESOURCE) == "1"

    def pod(self) -> Object:
        (pod,) = self.api.all("Pod", SYSTEM, LABEL)
        return pod

    def container(self) -> Container:
        return Container(self.api, SYSTEM, self.pod()["metadata"]["name"], "plugin")

    def restarts(self) -> list[str]:
        """Returns a line for each restarted container: how often, its last state, and the Events of its pod."""
        lines = []
        for pod in self.api.all("Pod", SYSTEM, LABEL):
            name = pod["metadata"]["name"]
            events = [e for e in self.api.all("Event", SYSTEM) if e["regarding"].get("uid") == pod["metadata"]["uid"]]
            for status in pod["status"].get("containerStatuses", ()):
                if status["restartCount"]:
                    times, last = status["restartCount"], status.get("lastState", {}).get("terminated")
                    notes = [f"{event['reason']}: {event.get('note', '')}" for event in events]
                    lines.append(f"{name}/{status['name']} restarted {times} times; ended: {last}; Events: {notes}")
        return lines

    def until_ready(self) -> None:
        """Waits until there is one pod, and it is ready."""
        until(self._rolled_out, "the plugin is ready")

    def holder(self) -> str:
        """Returns the holder of the device's lock, "" without one."""
        for lease in self.api.all("Lease", SYSTEM, "usbip.dev/lease=lock"):
            if lease["metadata"]["annotations"].get("usbip.dev/busid") == self.busid:
                return str(lease["spec"].get("holderIdentity") or "")
        return ""
