"""One API server for all tests here, with rbac/ applied; clients as admin and as the plugin's pod on some node."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver.node_tokens import NodeTokens
from tests.rigs.api_process import ADMIN_TOKEN, Cluster, running_for_tests
from tests.rigs.plugin_rights import admission_works, apply_rbac
from usbip_plugin.kube.client import KubeClient, connect

ACCOUNT_NODE = "account-node"
"""The node that the pod of `account` is on."""
GOODBYE_S = 2.0
"""How long a connection that is being closed may take for it."""
_POLL_S = 0.01


@pytest.fixture(autouse=True)
async def connections_end() -> AsyncIterator[None]:
    """Not before every connection of the test has ended does its loop.

    A request that is cancelled in flight leaves a TLS connection behind that says goodbye first. The client then
    knows nothing of it any more, and its transport would be collected in a later test, with a warning there.
    """
    yield
    loop = asyncio.get_running_loop()

    def open_() -> list[Any]:
        # nothing public knows them
        return [one for one in loop._transports.values() if one._sock is not None]  # type: ignore[attr-defined]

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GOODBYE_S):
            while open_():  # noqa: ASYNC110 - asyncio tells nobody
                await asyncio.sleep(_POLL_S)
    for transport in open_():
        transport.abort()
    await asyncio.sleep(0)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_for_tests(tmp_path_factory.mktemp("cluster")) as made:
        asyncio.run(apply_rbac(made))
        asyncio.run(admission_works(made))
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
