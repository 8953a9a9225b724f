"""Whole agents while one of them cannot reach the API server, and once it can again (rule R7)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial

import pytest

from tests.apiserver.node_tokens import NodeTokens
from tests.apiserver.objects import LEASES
from tests.rigs.agents_rig import PATIENCE_S, RESOURCE, Rig, agents
from tests.rigs.api_process import Cluster
from tests.rigs.tcp_proxy import Proxy, proxy_to
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.record import LeaseChange
from usbip_plugin.model import DeviceKey, PodRef, Reason
from usbip_sim.world import SimNode

pytestmark = pytest.mark.short

USER, OTHER = PodRef("default", "reader"), PodRef("default", "other")
"""Pods that the kubelet lists until they end. Devices without a listed pod are released after 15 s."""


async def _admit(rig: Rig, node: SimNode, pod: PodRef) -> DeviceKey:
    """Admits a pod and returns its device once the lock names the pod: otherwise a release takes 15 s."""

    def noted(key: DeviceKey) -> bool:
        lock = rig.lock(node, key)
        return lock is not None and lock.pod is not None and lock.pod.name == pod.name

    await node.admit(pod, {RESOURCE: 1})
    await rig.until(lambda: any(map(noted, rig.keys)))
    (key,) = filter(noted, rig.keys)
    return key


async def _hold_one(rig: Rig) -> DeviceKey:
    """Returns the device that USER has on the first node, once the second node has withdrawn it."""
    a, b = rig.nodes
    held = await _admit(rig, a, USER)
    await b.until(RESOURCE, lambda devices: devices[held.id] is False)
    return held


def _lose(proxy: Proxy) -> None:
    proxy.refusing = True
    proxy.cut()


async def test_held_devices_stay_and_no_device_is_given_out(cluster: Cluster, tokens: NodeTokens) -> None:
    async with (
        proxy_to(cluster.port) as proxy,
        agents(cluster, tokens, devices=2, through={"a": f"https://127.0.0.1:{proxy.port}"}) as rig,
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
        # the session expires for the other node, and the USB/IP server still refuses a second import
        with rig.clock(b).hurried():
            await rig.clock(b).sleep(LockSettings().duration * 1.5)
        taken = await rig.allocate(b, held)
        assert taken.response is None
        assert f"held by node {a.name}" in taken.error
        assert rig.attached(a, held)
        assert rig.server.importers(held.busid) == 1
        # the other node works on
        assert await _admit(rig, b, OTHER) == free
        proxy.refusing = False
        await rig.until(lambda: rig.holders(free) == [b.name, b.name])
        # reachable again, the first node follows the locks of the other node
        b.end(OTHER)
        await a.until(RESOURCE, lambda devices: devices == {held.id: True, free.id: True})
        assert rig.attached(a, held)
        assert rig.holders(held) == [a.name, a.name]
        assert rig.server.table.granted == 2
        assert rig.server.violations == []


async def test_a_lock_taken_away_during_the_outage_is_noticed_after_it(
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
        async with asyncio.timeout(LockSettings().import_window + PATIENCE_S):  # kept for an import window (R6)
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
    """A pause of watches: begin() ends every watch like a server at its timeout, and the next ones wait for end()."""

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
    """Leases whose watches pause."""

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


async def test_a_watch_of_compacted_history_starts_again_and_misses_nothing(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """After the replacement of a control plane the new API server lacks the events from which watches could resume."""
    caplog.set_level(logging.DEBUG, "usbip_plugin.kube.reflector")
    pause = Pause()

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 (neither a log nor a counter has an event)
                await asyncio.sleep(0.1)

    def lists_again() -> int:
        lines = [record for record in caplog.records if record.getMessage() == "watch too old, listing again"]
        return len([line for line in lines if vars(line)["collection"] == "leases.coordination.k8s.io"])

    async with proxy_to(cluster.port) as proxy:
        through = dict.fromkeys("ab", f"https://127.0.0.1:{proxy.port}")
        store = partial(PausingLeases, pause=pause)
        async with agents(cluster, tokens, devices=2, through=through, store=store) as rig:
            a, b = rig.nodes
            held = await _hold_one(rig)
            (free,) = set(rig.keys) - {held}
            pause.begin()
            await until(lambda: pause.waiting == len(rig.nodes))
            # a write that concerns no lock
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "history-"}}
            path = "/api/v1/namespaces/default/configmaps"
            await admin.request("create", path, resource="configmaps", body=body)
            await asyncio.to_thread(cluster.compact)
            await asyncio.to_thread(cluster.move_api)
            proxy.target = cluster.port
            proxy.cut()
            assert lists_again() == 0
            pause.end()
            await until(lambda: lists_again() == len(rig.nodes))
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
