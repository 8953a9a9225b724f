"""API clients with tokens as a kubelet mounts them: of a ServiceAccount, bound to a pod of the plugin on a node."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from usbip_plugin.kube.client import KubeClient, connect

NAMESPACE = "usbip-system"
ACCOUNT = "usbip-plugin"


@contextlib.asynccontextmanager
async def client_with(cluster: Cluster, token: str, server: str | None = None) -> AsyncIterator[KubeClient]:
    """Yields a client with this token. server: another address of the API server."""
    client = await connect(cluster.kubeconfig(token, server))
    try:
        yield client
    finally:
        await client.close()


class NodeTokens:
    """The tokens of the plugin's pods, one for each node. A node name needs no Node object."""

    def __init__(self, cluster: Cluster, namespace: str = NAMESPACE, account: str = ACCOUNT) -> None:
        self._cluster, self._namespace, self._account = cluster, namespace, account
        self._known: dict[str, str] = {}

    async def of(self, node: str) -> str:
        """Returns the token of the plugin's pod on this node."""
        if node not in self._known:
            async with client_with(self._cluster, ADMIN_TOKEN) as admin:
                body = plugin_pod(node, self._account)
                path = f"/api/v1/namespaces/{self._namespace}/pods"
                pod = await admin.request("create", path, resource="pods", body=body)
                reference = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"]}
                self._known[node] = await self._request(admin, {"boundObjectRef": reference})
        return self._known[node]

    async def unbound(self) -> str:
        """Returns a token that names no node, as `kubectl create token` makes it."""
        async with client_with(self._cluster, ADMIN_TOKEN) as admin:
            return await self._request(admin, {})

    @contextlib.asynccontextmanager
    async def client(self, node: str, server: str | None = None) -> AsyncIterator[KubeClient]:
        """Yields the client of the plugin on this node. server: another address of the API server."""
        async with client_with(self._cluster, await self.of(node), server) as client:
            yield client

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
