"""Pods that request devices, and servers that export them."""

from __future__ import annotations

from typing import Any

from tests.e2e.cluster import DOMAIN, NAMESPACE, PLUGIN_NAMESPACE, ClusterView, Object

WAIT_FOR_TERM = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done"


def pod_spec(image: str, resource: str | None, count: int = 1, *, node: str | None = None) -> dict[str, Any]:
    """Returns the spec of a pod that holds devices until SIGTERM. node: for a node selector."""
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
        # no pod waits for a node that a test stops
        "tolerations": [],
    }
    if node is not None:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    return spec


def pod(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


async def run_pod(cluster: ClusterView, name: str, spec: dict[str, Any]) -> Object:
    await cluster.create("pods", pod(name, spec))
    return await cluster.running(name)


def usbip_server(name: str, node: str, container: dict[str, Any], **more: object) -> dict[str, Any]:
    """Returns a pod in the plugin's namespace with a USB/IP server on a node's network, even if the node is tainted.

    container: without its name. more: fields of the pod's spec.
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
