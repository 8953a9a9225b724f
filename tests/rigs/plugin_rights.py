"""The shipped rights of the plugin on an API server: applies rbac/ and waits for its admission policy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.rigs.api_process import ADMIN_TOKEN, LOOPBACK, ROOT, Cluster, running_for_tests
from usbip_plugin.errors import KubeConflict, KubeForbidden
from usbip_plugin.kube.client import connect

EFFECT_S = 30.0
"""Limits the wait until a new admission policy is enforced, in seconds."""
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


@contextlib.contextmanager
def cluster_with_rights(directory: Path, address: str = LOOPBACK) -> Iterator[Cluster]:
    """Yields an API server with rbac/ applied, once the admission policy is enforced."""
    with running_for_tests(directory, address) as made:
        asyncio.run(apply_rbac(made))
        asyncio.run(admission_works(made))
        yield made


def shipped() -> list[dict[str, Any]]:
    """Returns every object of rbac/ in the order of the files."""
    files = sorted((ROOT / "rbac").glob("*.yaml"))
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def collection(document: dict[str, Any]) -> str:
    """Returns the path of the collection of an object."""
    return _COLLECTIONS[document["kind"]].format(namespace=document["metadata"].get("namespace"))


async def apply_rbac(cluster: Cluster) -> None:
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


async def admission_works(cluster: Cluster) -> None:
    """Waits until the policy is enforced, some time after its creation."""
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
                await asyncio.sleep(_POLL_S)  # there is no event to wait for
    finally:
        await client.close()
