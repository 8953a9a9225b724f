"""The API client on a real API server: rotated tokens, pages, large objects, broken connections."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from tests.apiserver.objects import LEASES
from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from tests.rigs.tcp_proxy import proxy_to
from usbip_plugin.errors import KubeNotFound, KubeUnauthorized, KubeUnreachable
from usbip_plugin.kube.client import KubeClient, connect

pytestmark = pytest.mark.short

NAMESPACES = "/api/v1/namespaces"
CONFIGMAPS = "/api/v1/namespaces/usbip-system/configmaps"


async def test_a_rotated_token_is_read_again_when_the_old_one_is_refused(
    cluster: Cluster, tmp_path: Path, account_token: str
) -> None:
    (tmp_path / "ca.crt").write_bytes(cluster.ca.read_bytes())
    (tmp_path / "token").write_text("revoked\n")
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}
    client = await connect(environ=environ, service_account=tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        with pytest.raises(KubeUnauthorized):
            await client.list(LEASES, resource="leases.coordination.k8s.io")
        (tmp_path / "token").write_text(account_token + "\n")
        listed = await client.list(LEASES, resource="leases.coordination.k8s.io")
        assert isinstance(listed["items"], list)


async def test_a_list_comes_whole_over_several_pages(admin: KubeClient) -> None:
    whole = (await admin.list(NAMESPACES, resource="namespaces"))["items"]
    paged = [item async for page in admin.pages(NAMESPACES, resource="namespaces", size=1) for item in page["items"]]
    assert len(whole) >= 4
    assert [item["metadata"]["uid"] for item in paged] == [item["metadata"]["uid"] for item in whole]


async def test_a_large_object_arrives_in_a_watch(admin: KubeClient) -> None:
    listed = await admin.list(CONFIGMAPS, resource="configmaps")
    params = {"resourceVersion": listed["metadata"]["resourceVersion"]}
    body = {"metadata": {"generateName": "large-"}, "data": {"x": "y" * 900_000}}
    await admin.request("create", CONFIGMAPS, resource="configmaps", body=body)
    async with contextlib.aclosing(admin.watch(CONFIGMAPS, resource="configmaps", params=params)) as events:
        event = await anext(events)
    assert event["type"] == "ADDED"
    assert len(event["object"]["data"]["x"]) == 900_000


async def test_a_cut_connection_is_unreachable_and_the_next_request_goes_through(cluster: Cluster) -> None:
    async with proxy_to(cluster.port) as proxy:
        client = await connect(cluster.kubeconfig(ADMIN_TOKEN, f"https://127.0.0.1:{proxy.port}"))
        params = {"resourceVersion": (await client.list(NAMESPACES, resource="n"))["metadata"]["resourceVersion"]}
        created = asyncio.Event()

        async def follow() -> None:
            async for event in client.watch(CONFIGMAPS, resource="configmaps", params=params):
                if event["type"] == "ADDED":
                    created.set()

        task = asyncio.create_task(follow())
        await client.request("create", CONFIGMAPS, resource="c", body={"metadata": {"generateName": "seen-"}})
        await created.wait()
        proxy.cut()
        with pytest.raises(KubeUnreachable):
            await task
        with pytest.raises(KubeNotFound):
            await client.request("get", f"{NAMESPACES}/absent", resource="namespaces")
        await client.close()
