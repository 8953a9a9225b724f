"""etcd restored from a backup by etcdutl, under two agents: they agree with the API server, and nothing is detached."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens, client_with
from tests.rigs.agents_rig import RESOURCE, Rig, agents
from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from tests.rigs.plugin_rights import cluster_with_rights
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LOCK_LABELS, lock_of
from usbip_plugin.model import DeviceKey, Lock
from usbip_sim.world import SimNode

BUMP = 1_000_000_000
"""What etcd's documentation proposes for Kubernetes: more than the writes since any backup."""
AGREES_S = 30.0
"""Seconds for which two nodes must have exactly the locks of the API server, at the latest, after it is back."""
POLL_S = 0.1


@pytest.fixture
def restored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yields an API server that no other test uses."""
    with cluster_with_rights(tmp_path_factory.mktemp("restored")) as made:
        yield made


async def agreement(cluster: Cluster, rig: Rig) -> dict[str, Lock]:
    """Waits until both nodes have exactly the locks that the API server has, and returns these."""
    async with client_with(cluster, ADMIN_TOKEN) as admin, asyncio.timeout(AGREES_S):
        while True:
            listed = await KubernetesLeases(admin, NAMESPACE).list(LOCK_LABELS)
            stored = {lease.name: lock_of(lease) for lease in listed.items}
            if all(node.agent is not None and dict(node.agent.locks.locks) == stored for node in rig.nodes):
                return stored
            await asyncio.sleep(POLL_S)  # the API server has no event for what nodes know


async def holds_again(cluster: Cluster, rig: Rig, node: SimNode, key: DeviceKey, granted: int) -> None:
    """Checks that the node holds the lock again and has kept the device attached."""
    await rig.until(lambda: rig.holders(key) == [node.name] * 2)
    stored = await agreement(cluster, rig)
    assert stored[key.id].holder == node.name
    await rig.until(lambda: rig.attached(node, key))
    assert rig.server.table.granted == granted, "no import since"
    assert rig.server.violations == []
    assert rig.used_ports() == 1


@pytest.mark.parametrize("bump", [BUMP, 0], ids=["bumped", "plain"])
async def test_a_device_taken_since_the_backup_stays_attached(restored: Cluster, bump: int) -> None:
    async with agents(restored, NodeTokens(restored)) as rig:
        (key,), (a, b) = rig.keys, rig.nodes
        backup = await asyncio.to_thread(restored.backup)
        pod = await rig.use(a)
        await asyncio.to_thread(restored.restore, backup, bump)
        await holds_again(restored, rig, a, key, granted=1)
        assert b.kubelet.health(b.resource(RESOURCE)) == {key.id: False}
        a.end(pod)
        for node in rig.nodes:
            await node.until(RESOURCE, lambda devices: devices == {key.id: True})
        assert (await agreement(restored, rig))[key.id].holder == ""


@pytest.mark.parametrize("bump", [pytest.param(BUMP, marks=pytest.mark.short), 0], ids=["bumped", "plain"])
async def test_a_lock_that_is_its_former_holders_again_comes_back_to_the_node_with_the_device(
    restored: Cluster, bump: int
) -> None:
    async with agents(restored, NodeTokens(restored)) as rig:
        (key,), (a, b) = rig.keys, rig.nodes
        pod = await rig.use(a)
        backup = await asyncio.to_thread(restored.backup)
        a.end(pod)
        for node in rig.nodes:
            await node.until(RESOURCE, lambda devices: devices == {key.id: True})
        await rig.use(b)
        await asyncio.to_thread(restored.restore, backup, bump)
        await holds_again(restored, rig, b, key, granted=2)
