"""Fixtures for tests on a real API server with rbac/ applied: the server, and clients of an admin and of the plugin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import yaml

from tests.apiserver.node_tokens import NodeTokens, client_with
from tests.apiserver.objects import LEASES, PODS
from tests.rigs.api_process import ADMIN_TOKEN, ROOT, Cluster
from tests.rigs.plugin_rights import cluster_with_rights, collection
from usbip_plugin.kube.client import KubeClient

ACCOUNT_NODE = "account-node"
"""The node of the pod to which the token of `account` is bound."""
CLOSE_S = 2.0
"""Seconds that closing a TLS connection may take."""
_POLL_S = 0.01


@pytest.fixture(autouse=True)
async def connections_end() -> AsyncIterator[None]:
    """Keeps the event loop of a test until every connection of the test has ended.

    A request that is cancelled in flight leaves a TLS connection that is still closing. The client has forgotten the
    connection by then, and its transport would be collected in a later test, with a warning there.
    """
    yield
    loop = asyncio.get_running_loop()

    def open_() -> list[Any]:
        # asyncio has no public list of transports
        return [one for one in loop._transports.values() if one._sock is not None]  # type: ignore[attr-defined]

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            while open_():  # noqa: ASYNC110 - asyncio has no event for it
                await asyncio.sleep(_POLL_S)
    for transport in open_():
        transport.abort()
    await asyncio.sleep(0)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_with_rights(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="session")
def tokens(cluster: Cluster) -> NodeTokens:
    return NodeTokens(cluster)


@pytest.fixture(scope="session")
def account_token(tokens: NodeTokens) -> str:
    return asyncio.run(tokens.of(ACCOUNT_NODE))


@pytest.fixture(autouse=True)
async def left_by_other_tests(request: pytest.FixtureRequest, connections_end: None) -> None:
    """Deletes the Nodes, Leases and pods that other tests have made on the API server of a test.

    A Node that reports a resource changes what the commands say. A lock counts again if its server's port is another
    server's now, and a plugin that watches 500 takes 2 MiB. The plugin's own pods stay: tokens are bound to them.
    """
    if "cluster" not in request.fixturenames:
        return
    body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
    others = {"labelSelector": "app.kubernetes.io/name!=usbip-plugin"}
    async with client_with(request.getfixturevalue("cluster"), ADMIN_TOKEN) as admin:
        await admin.request("delete", PODS, resource="pods", params=others, body=body)
        await admin.request("delete", "/api/v1/nodes", resource="nodes", body=body)
        await admin.request("delete", LEASES, resource="leases", body=body)


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[KubeClient]:
    async with client_with(cluster, ADMIN_TOKEN) as client:
        yield client


@pytest.fixture
async def account(cluster: Cluster, account_token: str) -> AsyncIterator[KubeClient]:
    """Yields a client with exactly the rights that rbac/ gives to the plugin on ACCOUNT_NODE."""
    async with client_with(cluster, account_token) as client:
        yield client


@pytest.fixture
async def may_evict(admin: KubeClient) -> AsyncIterator[None]:
    """Installs deploy/components/evict for the length of a test."""
    text = (ROOT / "deploy/components/evict/rbac.yaml").read_text(encoding="utf-8")
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        await admin.request("create", collection(document), resource=document["kind"], body=document)
    yield
    for document in documents:
        await admin.request("delete", f"{collection(document)}/{document['metadata']['name']}", resource="rbac")
