"""Pods that ask for devices."""

from __future__ import annotations

from typing import Any

from tests.e2e.cluster import DOMAIN, NAMESPACE, PLUGIN_NAMESPACE

WAIT_FOR_TERM = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done"


def pod_spec(image: str, resource: str | None, count: int = 1, *, node: str | None = None) -> dict[str, Any]:
    """A pod that holds count devices of a resource until it is told to end. node: by the scheduler, with a selector."""
    container: dict[str, Any] = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", WAIT_FOR_TERM],
    }
    if resource is not None:
        container["resources"] = {"limits": {f"{DOMAIN}/{resource}": count}}
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 5,
        "containers": [container],
        # a node that a test stops is not waited for
        "tolerations": [],
    }
    if node is not None:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    return spec


def pod(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def usbip_server(name: str, node: str, container: dict[str, Any], **more: object) -> dict[str, Any]:
    """A pod beside the plugin's with a USB/IP server on the network of a node, even of one that is tainted.

    container: without its name. more: of the pod's spec.
    """
    spec = {
        "hostNetwork": True,
        "automountServiceAccountToken": False,
        "nodeSelector": {"kubernetes.io/hostname": node},
        "tolerations": [{"operator": "Exists"}],
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "server", **container}],
        **more,
    }
    metadata = {"name": name, "namespace": PLUGIN_NAMESPACE}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def deployment(
    name: str, spec: dict[str, Any], replicas: int, strategy: dict[str, Any] | None = None
) -> dict[str, Any]:
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "strategy": strategy or {"type": "RollingUpdate"},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
