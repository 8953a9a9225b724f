"""Whole agents while one of them cannot reach the API server, and when it can again (rule R7)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping

import pytest

from tests.apiserver.node_tokens import NodeTokens
from tests.rigs.agents_rig import PATIENCE_S, RESOURCE, Rig, agents
from tests.rigs.api_process import Cluster
from tests.rigs.tcp_proxy import Proxy, proxy_to
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.record import LeaseChange, LeaseStore
from usbip_plugin.model import DeviceKey, PodRef, Reason
from usbip_sim.world import SimNode

pytestmark = pytest.mark.short

LEASES = "/apis/coordination.k8s.io/v1/namespaces/usbip-system/leases"
USER, OTHER = PodRef("default", "reader"), PodRef("default", "other")
"""Pods that the kubelet lists until they end. What no listed pod has is given back after 15 s."""


async def _admit(rig: Rig, node: SimNode, pod: PodRef) -> DeviceKey:
    """The device that the pod gets there. The plugin has seen the pod use it: otherwise its end shows after 15 s."""

    def noted(key: DeviceKey) -> bool:
        lock = rig.lock(node, key)
        return lock is not None and lock.pod is not None and lock.pod.name == pod.name

    await node.admit(pod, {RESOURCE: 1})
    await rig.until(lambda: any(map(noted, rig.keys)))
    (key,) = filter(noted, rig.keys)
    return key


async def _hold_one(rig: Rig) -> DeviceKey:
    """USER, on the first node, has one of the devices, and the other node knows that."""
    a, b = rig.nodes
    held = await _admit(rig, a, USER)
    await b.until(RESOURCE, lambda devices: devices[held.id] is False)
    return held


def _lose(proxy: Proxy) -> None:
    proxy.refusing = True
    proxy.cut()


async def test_what_is_held_stays_and_nothing_new_is_given(cluster: Cluster, tokens: NodeTokens) -> None:
    async with (
        proxy_to(cluster.port) as proxy,
        agents(
            cluster,
            tokens,
            devices=2,
            through={"a": f"https://127.0.0.1:{proxy.port}"},
        ) as rig,
    ):
        a, b = rig.nodes
        held = await _hold_one(rig)
        (free,) = set(rig.keys) - {held}
        assert a.agent is not None
        _lose(proxy)
        with rig.clock(a).hurried():
            await a.until(RESOURCE, lambda devices: devices == {held.id: True, free.id: False})
        assert a.agent.inventory.health()[free.id].reason is Reason.API_UNREACHABLE
        refused = await rig.allocate(a, free)
        assert refused.response is None
        assert "cannot lock" in refused.error
        # the session runs out for the other node, and the server's own exclusivity keeps the device from being taken
        with rig.clock(b).hurried():
            await rig.clock(b).sleep(LockSettings().duration * 1.5)
        taken = await rig.allocate(b, held)
        assert taken.response is None
        assert f"held by node {a.name}" in taken.error
        assert rig.attached(a, held)
        assert rig.server.importers(held.busid) == 1
        # the other node is not touched by any of this
        assert await _admit(rig, b, OTHER) == free
        proxy.refusing = False
        await rig.until(lambda: rig.holders(free) == [b.name, b.name])
        # back in touch, it follows the other node's locks again
        b.end(OTHER)
        await a.until(RESOURCE, lambda devices: devices == {held.id: True, free.id: True})
        assert rig.attached(a, held)
        assert rig.holders(held) == [a.name, a.name]
        assert rig.server.table.granted == 2
        assert rig.server.violations == []


async def test_a_lock_taken_away_meanwhile_is_found_out_on_return(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient
) -> None:
    async with (
        proxy_to(cluster.port) as proxy,
        agents(cluster, tokens, through={"a": f"https://127.0.0.1:{proxy.port}"}) as rig,
    ):
        a = rig.nodes[0]
        held = await _hold_one(rig)
        _lose(proxy)
        lease = await admin.request("get", f"{LEASES}/{held.id}", resource="leases")
        lease["spec"]["holderIdentity"] = "somebody-else"
        lease["spec"]["leaseTransitions"] += 1
        await admin.request("update", f"{LEASES}/{held.id}", resource="leases", body=lease)
        assert rig.attached(a, held)
        proxy.refusing = False
        await a.until(RESOURCE, lambda devices: devices == {held.id: False})
        async with asyncio.timeout(10):
            await rig.server.until_released(held.busid)
        await rig.until(lambda: rig.holders(held) == ["somebody-else"] * 2)
        assert not rig.attached(a, held)
        assert rig.used_ports() == 0


async def test_a_restart_of_the_api_server_changes_nothing(cluster: Cluster, tokens: NodeTokens) -> None:
    async with agents(cluster, tokens) as rig:
        (held,) = rig.keys
        a, b = rig.nodes
        assert await _hold_one(rig) == held
        await asyncio.to_thread(cluster.restart_api)
        await rig.until(lambda: all(node.agent is not None and node.agent.locks.api.reachable for node in rig.nodes))
        assert rig.attached(a, held)
        assert rig.holders(held) == [a.name, a.name]
        assert rig.server.table.granted == 1
        a.end(USER)
        await b.until(RESOURCE, lambda devices: devices == {held.id: True})
        await rig.until(lambda: rig.holders(held) == ["", ""])


class Pause:
    """begin() ends every watch in order, as a server does when its time is over; the next ones wait for end()."""

    def __init__(self) -> None:
        self.begun, self.over = asyncio.Event(), asyncio.Event()
        self.waiting = 0
        self.end()

    def begin(self) -> None:
        self.over.clear()
        self.begun.set()

    def end(self) -> None:
        self.begun.clear()
        self.over.set()


class PausingLeases(KubernetesLeases):
    """With watches that pause."""

    def __init__(self, client: KubeClient, namespace: str, pause: Pause) -> None:
        super().__init__(client, namespace)
        self._pause = pause

    async def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncGenerator[LeaseChange, None]:
        self._pause.waiting += 1
        await self._pause.over.wait()
        self._pause.waiting -= 1
        paused = asyncio.ensure_future(self._pause.begun.wait())
        async with contextlib.aclosing(super().watch(labels, resource_version)) as changes:
            following = asyncio.ensure_future(anext(changes, None))
            try:
                while await asyncio.wait((following, paused), return_when=asyncio.FIRST_COMPLETED):
                    if not following.done() or (change := following.result()) is None:
                        return
                    yield change
                    following = asyncio.ensure_future(anext(changes, None))
            finally:
                for task in (following, paused):
                    task.cancel()
                await asyncio.gather(following, paused, return_exceptions=True)


async def test_a_watch_that_meets_compacted_history_is_begun_anew_and_nothing_is_missed(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a control plane is replaced: the next API server has no event that the watches could go on from."""
    caplog.set_level(logging.DEBUG, "usbip_plugin.kube.reflector")
    pause = Pause()

    async def until(so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not so():  # noqa: ASYNC110 (neither a log nor a counter has an event)
                await asyncio.sleep(0.1)

    def began_anew() -> int:
        lines = [record for record in caplog.records if record.getMessage() == "watch too old, listing again"]
        return len([line for line in lines if vars(line)["collection"] == "leases.coordination.k8s.io"])

    async with proxy_to(cluster.port) as proxy:
        through = dict.fromkeys("ab", f"https://127.0.0.1:{proxy.port}")

        def store(client: KubeClient, namespace: str) -> LeaseStore:
            return PausingLeases(client, namespace, pause)

        async with agents(cluster, tokens, devices=2, through=through, store=store) as rig:
            a, b = rig.nodes
            held = await _hold_one(rig)
            (free,) = set(rig.keys) - {held}
            pause.begin()
            await until(lambda: pause.waiting == len(rig.nodes))
            # history that no lock is part of
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "history-"}}
            path = "/api/v1/namespaces/default/configmaps"
            await admin.request("create", path, resource="configmaps", body=body)
            await asyncio.to_thread(cluster.compact)
            await asyncio.to_thread(cluster.move_api)
            proxy.target = cluster.port
            proxy.cut()
            assert began_anew() == 0
            pause.end()
            await until(lambda: began_anew() == len(rig.nodes))
            await asyncio.to_thread(cluster.end_old_api)
            assert rig.attached(a, held)
            assert rig.holders(held) == [a.name, a.name]
            assert await _admit(rig, b, OTHER) == free
            await a.until(RESOURCE, lambda devices: devices == {held.id: True, free.id: False})
            a.end(USER)
            b.end(OTHER)
            for node in rig.nodes:
                await node.until(RESOURCE, lambda devices: devices == {held.id: True, free.id: True})
            assert rig.server.table.granted == 2
            assert rig.server.violations == []
