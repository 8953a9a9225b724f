"""Tokens as a kubelet mounts them: of the plugin's ServiceAccount, bound to a pod of the plugin on a node."""

from __future__ import annotations

from typing import Any

from api_process import ADMIN_TOKEN, Cluster

from usbip_plugin.kube import KubeClient, connect

NAMESPACE = "usbip-system"
ACCOUNT = "usbip-plugin"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class NodeTokens:
    """A token for each node asked for; node names need no Node object."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._known: dict[str, str] = {}

    async def of(self, node: str) -> str:
        """The token of the plugin's pod on this node."""
        if node not in self._known:
            client = await connect(self._cluster.kubeconfig(ADMIN_TOKEN))
            try:
                pod = await client.request("create", _PODS, resource="pods", body=plugin_pod(node))
                reference = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"]}
                self._known[node] = await request_token(client, {"boundObjectRef": reference})
            finally:
                await client.close()
        return self._known[node]

    async def unbound(self) -> str:
        """One that names no node, as kubectl create token makes it."""
        client = await connect(self._cluster.kubeconfig(ADMIN_TOKEN))
        try:
            return await request_token(client, {})
        finally:
            await client.close()


async def request_token(admin: KubeClient, spec: dict[str, Any]) -> str:
    answer = await admin.request(
        "create",
        f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{ACCOUNT}/token",
        resource="serviceaccounts/token",
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
    )
    return str(answer["status"]["token"])


def plugin_pod(node: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "usbip-plugin-", "labels": {"app.kubernetes.io/name": "usbip-plugin"}},
        "spec": {
            "nodeName": node,
            "serviceAccountName": ACCOUNT,
            "containers": [{"name": "plugin", "image": "usbip-plugin"}],
        },
    }
