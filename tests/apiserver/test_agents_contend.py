"""Two whole agents that allocate one device at the same moment, on a real API server."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.apiserver.objects import allocatable, make_node
from tests.rigs.agents_rig import RESOURCE, agents
from tests.rigs.api_process import Cluster
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LOCK_LABELS

pytestmark = pytest.mark.short

ROUNDS, LONG_ROUNDS = 50, 1000
PUBLISH_ROUNDS = 10


async def test_one_of_two_allocates_wins_each_round(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, long_form: bool
) -> None:
    rounds = LONG_ROUNDS if long_form else ROUNDS
    wins: Counter[str] = Counter()
    async with agents(cluster, tokens) as rig:
        (key,) = rig.keys
        began = time.perf_counter()
        for number in range(rounds):
            winners, losers = await rig.race(key)
            assert [len(winners), len(losers)] == [1, 1], f"round {number}: {[loser.error for loser in losers]}"
            (winner,), (loser,) = winners, losers
            assert f"held by node {winner.node.name}" in loser.error, f"round {number}: {loser.error}"
            assert rig.server.importers(key.busid) == 1
            assert rig.attached(winner.node, key)
            assert not rig.attached(loser.node, key)
            wins[winner.node.name] += 1
            await rig.end_pod(winner.node, key)
        seconds = time.perf_counter() - began
        print(f"\n{rounds} rounds in {seconds:.1f} s, {rounds / seconds:.1f} per second, wins {dict(wins)}")
        print(f"imports granted {rig.server.table.granted}, refused {rig.server.table.refused}")
        await rig.server.until_released(key.busid)
        assert rig.used_ports() == 0
        assert rig.server.violations == []
        # every import was made by a winner: a loser never reaches the server
        assert (rig.server.table.granted, rig.server.table.refused) == (rounds, 0)
        locks = await KubernetesLeases(admin, NAMESPACE).list(LOCK_LABELS)
        assert [(one.holder, one.transitions) for one in locks.items if one.name == key.id] == [("", rounds)]
        assert sum(wins.values()) == rounds
        assert not any(node.agent.claims.view for node in rig.nodes if node.agent is not None)


async def test_a_denied_allocate_answers_after_its_node_has_published_zero(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with agents(cluster, tokens, node_api=True) as rig:
        (key,) = rig.keys
        for node in rig.nodes:
            await make_node(admin, node.name)
        for number in range(PUBLISH_ROUNDS):
            for node in rig.nodes:
                assert node.agent is not None
                assert node.agent.node_status is not None
                # what was published before the Node existed, and the count after the last release
                assert await node.agent.node_status.publish_now({node.resource(RESOURCE): 1}, 10.0)
                assert await allocatable(admin, node.name, node.resource(RESOURCE)) == "1"
            (winner,), (loser,) = await rig.race(key)
            published = await allocatable(admin, loser.node.name, loser.node.resource(RESOURCE))
            assert published == "0", f"round {number}"
            await rig.end_pod(winner.node, key)
            for node in rig.nodes:
                await node.until(RESOURCE, lambda devices: devices == {key.id: True})
