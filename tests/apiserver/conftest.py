"""One API server for all tests here, with rbac/ applied; clients as admin and as the plugin's pod on some node."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_process import ADMIN_TOKEN, ROOT, Cluster, running
from node_tokens import NAMESPACE, NodeTokens

from usbip_plugin.errors import KubeConflict, KubeForbidden
from usbip_plugin.kube import KubeClient, connect

sys.path.insert(0, str(ROOT / "tests" / "contract"))

ACCOUNT_NODE = "account-node"
"""The node that the pod of `account` is on."""
EFFECT_S = 30.0
"""How long a new admission policy may take to be enforced."""
_POLL_S = 0.1
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_COLLECTIONS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Role": _RBAC + "/namespaces/{namespace}/roles",
    "RoleBinding": _RBAC + "/namespaces/{namespace}/rolebindings",
    "ClusterRole": _RBAC + "/clusterroles",
    "ClusterRoleBinding": _RBAC + "/clusterrolebindings",
    "ValidatingAdmissionPolicy": _ADMISSION + "/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": _ADMISSION + "/validatingadmissionpolicybindings",
}


def shipped() -> list[dict[str, Any]]:
    """Every object of rbac/, in the order of its files."""
    files = sorted((ROOT / "rbac").glob("*.yaml"))
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def collection(document: dict[str, Any]) -> str:
    """The path under which an object of that kind is created."""
    return _COLLECTIONS[document["kind"]].format(namespace=document["metadata"].get("namespace"))


async def _apply_rbac(cluster: Cluster) -> None:
    client = await connect(cluster.kubeconfig(ADMIN_TOKEN))
    try:
        for document in shipped():
            try:
                await client.request(
                    "create", collection(document), resource=document["kind"], body=document, timeout=30
                )
            except KubeConflict:
                continue
    finally:
        await client.close()


async def _admission_works(cluster: Cluster) -> None:
    """Returns when the policy refuses what it should, which is some time after it was created."""
    client = await connect(cluster.kubeconfig(await NodeTokens(cluster).unbound()))
    path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
    body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "probe"}}
    try:
        async with asyncio.timeout(EFFECT_S):
            while True:
                try:
                    await client.request("create", path, resource="leases", body=body, params={"dryRun": "All"})
                except KubeForbidden as refusal:
                    if "not bound to a node" in str(refusal):
                        return
                await asyncio.sleep(_POLL_S)  # the API server tells nobody when it begins to enforce a policy
    finally:
        await client.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("cluster")) as made:
        asyncio.run(_apply_rbac(made))
        asyncio.run(_admission_works(made))
        yield made


@pytest.fixture(scope="session")
def tokens(cluster: Cluster) -> NodeTokens:
    """Tokens of the plugin's pods, by node."""
    return NodeTokens(cluster)


@pytest.fixture(scope="session")
def account_token(tokens: NodeTokens) -> str:
    """The token of the plugin's pod on ACCOUNT_NODE."""
    return asyncio.run(tokens.of(ACCOUNT_NODE))


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[KubeClient]:
    client = await connect(cluster.kubeconfig(ADMIN_TOKEN))
    yield client
    await client.close()


@pytest.fixture
async def account(cluster: Cluster, account_token: str) -> AsyncIterator[KubeClient]:
    """A client with exactly the rights that rbac/ gives to the plugin on ACCOUNT_NODE."""
    client = await connect(cluster.kubeconfig(account_token))
    yield client
    await client.close()


@pytest.fixture
def mounted(cluster: Cluster, tmp_path: Path) -> Path:
    """A directory like the one a pod finds its ServiceAccount in; the token is still to be written."""
    (tmp_path / "ca.crt").write_bytes(cluster.ca.read_bytes())
    return tmp_path
