"""A node name under two boot ids: a node that was rebooted."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.rigs.agents_rig import PATIENCE_S, RESOURCE, agents
from tests.rigs.api_process import Cluster
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LOCK_LABELS, lock_of
from usbip_plugin.model import DeviceKey, Lock

pytestmark = pytest.mark.short


async def lock_on(admin: KubeClient, key: DeviceKey) -> Lock:
    listed = await KubernetesLeases(admin, NAMESPACE).list(LOCK_LABELS)
    return next(lock_of(lease) for lease in listed.items if lease.name == key.id)


async def test_a_rebooted_node_has_its_pods_device_again(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with agents(cluster, tokens) as rig:
        (key,), (a, b) = rig.keys, rig.nodes
        await rig.use(a)
        before = await lock_on(admin, key)
        await a.die()
        began = time.perf_counter()
        agent = a.start()
        async with asyncio.timeout(PATIENCE_S):
            await agent.claims.changed.until(lambda: rig.attached(a, key))
        print(f"\nattached {time.perf_counter() - began:.2f} s after the plugin's start")
        after = await lock_on(admin, key)
        assert (before.holder, after.holder, after.epoch) == (a.name, a.name, before.epoch + 1)
        assert before.boot_id != after.boot_id
        assert (rig.server.table.granted, rig.server.table.refused, rig.server.violations) == (2, 0, [])
        assert b.kubelet.health(b.resource(RESOURCE)) == {key.id: False}
