"""Tokens as a kubelet mounts them: of a ServiceAccount, bound to a pod of the plugin on a node."""

from __future__ import annotations

from typing import Any

from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from usbip_plugin.kube.client import KubeClient, connect

NAMESPACE = "usbip-system"
ACCOUNT = "usbip-plugin"


class NodeTokens:
    """A token for each node asked for; node names need no Node object."""

    def __init__(self, cluster: Cluster, namespace: str = NAMESPACE, account: str = ACCOUNT) -> None:
        self._cluster, self._namespace, self._account = cluster, namespace, account
        self._known: dict[str, str] = {}

    async def of(self, node: str) -> str:
        """The token of the plugin's pod on this node."""
        if node not in self._known:
            client = await connect(self._cluster.kubeconfig(ADMIN_TOKEN))
            try:
                body = plugin_pod(node, self._account)
                path = f"/api/v1/namespaces/{self._namespace}/pods"
                pod = await client.request("create", path, resource="pods", body=body)
                reference = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"]}
                self._known[node] = await self._request(client, {"boundObjectRef": reference})
            finally:
                await client.close()
        return self._known[node]

    async def unbound(self) -> str:
        """One that names no node, as kubectl create token makes it."""
        client = await connect(self._cluster.kubeconfig(ADMIN_TOKEN))
        try:
            return await self._request(client, {})
        finally:
            await client.close()

    async def _request(self, admin: KubeClient, spec: dict[str, Any]) -> str:
        answer = await admin.request(
            "create",
            f"/api/v1/namespaces/{self._namespace}/serviceaccounts/{self._account}/token",
            resource="serviceaccounts/token",
            body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
        )
        return str(answer["status"]["token"])


def plugin_pod(node: str, account: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "usbip-plugin-", "labels": {"app.kubernetes.io/name": "usbip-plugin"}},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account,
            "containers": [{"name": "plugin", "image": "usbip-plugin"}],
        },
    }
