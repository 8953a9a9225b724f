"""Objects that tests create on an API server, and configurations of the plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.model import PodRef, ServerKey

LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
POLL_S = 0.05


async def make_node(admin: KubeClient, name: str) -> None:
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
    await admin.request("create", "/api/v1/nodes", resource="nodes", body=body)


async def make_pod(
    admin: KubeClient,
    node: str | None = None,
    *,
    limits: Mapping[str, str] | None = None,
    namespace: str = NAMESPACE,
    account: str = ACCOUNT,
) -> PodRef:
    """Creates a pod that no kubelet runs. Without a node it stays pending, and an eviction deletes it at once."""
    body: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "user-"},
        "spec": {
            "serviceAccountName": account,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "i", "resources": {"limits": limits or {}}}],
            **({} if node is None else {"nodeName": node}),
        },
    }
    path = f"/api/v1/namespaces/{namespace}/pods"
    made = (await admin.request("create", path, resource="pods", body=body))["metadata"]
    return PodRef(made["namespace"], made["name"], made["uid"])


async def delete_pod(admin: KubeClient, pod: PodRef) -> None:
    body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
    path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"
    await admin.request("delete", path, resource="pods", body=body)


async def allocatable(admin: KubeClient, node: str, resource: str) -> str | None:
    """Returns the count of a resource, named with its domain, in the Node's status; None if it is not there."""
    found = await admin.request("get", f"/api/v1/nodes/{node}", resource="nodes")
    value = found["status"].get("allocatable", {}).get(resource)
    return None if value is None else str(value)


def configuration(**resources: Sequence[tuple[ServerKey, Mapping[str, str]]]) -> str:
    """Returns the text of a configuration file. Each resource has pairs of a server and a selector."""
    return json.dumps(
        {
            "resources": {
                name: [
                    {"target": {"host": server.host, "port": server.port}, "selector": selector}
                    for server, selector in devices
                ]
                for name, devices in resources.items()
            }
        }
    )
