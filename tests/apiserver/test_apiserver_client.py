"""The API client against the real thing: tokens that change, streams that break, answers that come in pieces."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from tests.rigs.tcp_proxy import proxy_to
from usbip_plugin.errors import ConfigError, KubeNotFound, KubeUnauthorized, KubeUnreachable
from usbip_plugin.kube.client import KubeClient, connect

pytestmark = pytest.mark.short

NAMESPACES = "/api/v1/namespaces"
CONFIGMAPS = "/api/v1/namespaces/usbip-system/configmaps"


def in_cluster(cluster: Cluster) -> dict[str, str]:
    return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}


@contextlib.asynccontextmanager
async def pod_client(cluster: Cluster, mounted: Path) -> AsyncIterator[KubeClient]:
    client = await connect(environ=in_cluster(cluster), service_account=mounted)
    try:
        yield client
    finally:
        await client.close()


async def test_a_rotated_token_is_read_again_when_the_old_one_is_refused(
    cluster: Cluster, mounted: Path, account_token: str
) -> None:
    leases = "/apis/coordination.k8s.io/v1/namespaces/usbip-system/leases"
    (mounted / "token").write_text("revoked\n")
    async with pod_client(cluster, mounted) as client:
        with pytest.raises(KubeUnauthorized):
            await client.list(leases, resource="leases.coordination.k8s.io")
        (mounted / "token").write_text(account_token + "\n")
        listed = await client.list(leases, resource="leases.coordination.k8s.io")
        assert isinstance(listed["items"], list)
        (mounted / "token").write_text("revoked")
        assert await client.list(leases, resource="leases.coordination.k8s.io"), "the token in use is still good"


async def test_a_watch_too_reads_the_token_again(cluster: Cluster, mounted: Path, account_token: str) -> None:
    (mounted / "token").write_text("revoked")
    async with pod_client(cluster, mounted) as client:
        (mounted / "token").write_text(account_token)
        async for _event in client.watch("/api/v1/pods", resource="pods", timeout=1):
            pass


async def test_a_missing_service_account_is_a_configuration_error(cluster: Cluster, mounted: Path) -> None:
    with pytest.raises(ConfigError, match="token"):
        await connect(environ=in_cluster(cluster), service_account=mounted)


async def test_the_servers_certificate_is_verified(cluster: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(await asyncio.to_thread(Path(cluster.kubeconfig(ADMIN_TOKEN)).read_text))
    del config["clusters"][0]["cluster"]["certificate-authority"]
    trusting_nobody = tmp_path / "kubeconfig"
    trusting_nobody.write_text(json.dumps(config))
    client = await connect(str(trusting_nobody))
    with pytest.raises(KubeUnreachable, match="certificate verify failed"):
        await client.request("list", NAMESPACES, resource="namespaces")
    await client.close()


async def test_a_list_comes_whole_over_several_pages(admin: KubeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await admin.list(NAMESPACES, resource="namespaces")
    monkeypatch.setattr("usbip_plugin.kube.client.LIST_PAGE", 1)
    paged = await admin.list(NAMESPACES, resource="namespaces")
    assert len(whole["items"]) >= 4
    assert [item["metadata"]["uid"] for item in paged["items"]] == [item["metadata"]["uid"] for item in whole["items"]]


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


async def test_a_silent_server_is_unreachable_in_time(cluster: Cluster) -> None:
    async with proxy_to(cluster.port) as proxy:
        client = await connect(cluster.kubeconfig(ADMIN_TOKEN, f"https://127.0.0.1:{proxy.port}"))
        await client.list(NAMESPACES, resource="namespaces")
        proxy.flowing.clear()
        with pytest.raises(KubeUnreachable):
            await client.request("list", NAMESPACES, resource="namespaces", timeout=0.2)
        proxy.flowing.set()
        await client.close()


async def test_no_server_is_unreachable(cluster: Cluster) -> None:
    client = await connect(cluster.kubeconfig(ADMIN_TOKEN, "https://127.0.0.1:1"))
    with pytest.raises(KubeUnreachable):
        await client.request("list", NAMESPACES, resource="namespaces")
    await client.close()
