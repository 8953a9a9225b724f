"""One API server for all tests here, with rbac/ applied; clients as admin and as the plugin's ServiceAccount."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml
from api_process import ADMIN_TOKEN, ROOT, Cluster, running

from usbip_plugin.errors import KubeConflict
from usbip_plugin.kube import KubeClient, connect

sys.path.insert(0, str(ROOT / "tests" / "contract"))

NAMESPACE = "usbip-system"
ACCOUNT = "usbip-plugin"
_COLLECTIONS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}


async def _apply_rbac(cluster: Cluster) -> None:
    client = await connect(cluster.kubeconfig(ADMIN_TOKEN))
    try:
        for file in sorted((ROOT / "rbac").glob("*.yaml")):
            for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
                path = _COLLECTIONS[document["kind"]].format(namespace=document["metadata"].get("namespace"))
                try:
                    await client.request("create", path, resource=document["kind"], body=document, timeout=30)
                except KubeConflict:
                    continue
    finally:
        await client.close()


async def _service_account_token(cluster: Cluster) -> str:
    client = await connect(cluster.kubeconfig(ADMIN_TOKEN))
    try:
        answer = await client.request(
            "create",
            f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{ACCOUNT}/token",
            resource="serviceaccounts/token",
            body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}},
        )
    finally:
        await client.close()
    return str(answer["status"]["token"])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("cluster")) as made:
        asyncio.run(_apply_rbac(made))
        yield made


@pytest.fixture(scope="session")
def account_token(cluster: Cluster) -> str:
    """A token of the plugin's ServiceAccount, by TokenRequest."""
    return asyncio.run(_service_account_token(cluster))


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[KubeClient]:
    client = await connect(cluster.kubeconfig(ADMIN_TOKEN))
    yield client
    await client.close()


@pytest.fixture
async def account(cluster: Cluster, account_token: str) -> AsyncIterator[KubeClient]:
    """A client with exactly the rights that rbac/ gives."""
    client = await connect(cluster.kubeconfig(account_token))
    yield client
    await client.close()


@pytest.fixture
def mounted(cluster: Cluster, tmp_path: Path) -> Path:
    """A directory like the one a pod finds its ServiceAccount in; the token is still to be written."""
    (tmp_path / "ca.crt").write_bytes(cluster.ca.read_bytes())
    return tmp_path
