"""Two machines of one node name, each a plugin as a process, on a real API server (R3)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.apiserver.objects import POLL_S, delete_pod, make_pod
from tests.apiserver.plugin_process import BUSID, NODE, PATIENCE_S, RESOURCE, PluginProcess, plugin, usbip_server
from tests.rigs.api_process import Cluster, free_port
from tests.rigs.tasks import background
from usbip_plugin.errors import OTHER_BOOT
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LOCK_LABELS, lock_of
from usbip_plugin.model import DeviceKey, Lock, Reason
from usbip_plugin.sync import Broadcast
from usbip_sim.server.server import VirtualServer

pytestmark = pytest.mark.short

BOOTS = ("boot-1", "boot-2")
ROUNDS, LONG_ROUNDS = 5, 50


@dataclass
class LockHistory:
    """The records of one device's lock, in the order in which the API server stored them."""

    key: DeviceKey
    admin: KubeClient
    records: list[Lock] = field(default_factory=list)
    changed: Broadcast = field(default_factory=Broadcast)

    async def follow(self) -> None:
        store = KubernetesLeases(self.admin, NAMESPACE)
        listed = await store.list(LOCK_LABELS)
        self.records += [lock_of(lease) for lease in listed.items if lease.name == self.key.id]
        async with contextlib.aclosing(store.watch(LOCK_LABELS, listed.resource_version)) as changes:
            async for change in changes:
                if change.lease is not None and change.lease.name == self.key.id:
                    self.records.append(lock_of(change.lease))
                    self.changed.fire()

    async def until(self, condition: Callable[[Lock], bool]) -> Lock:
        """Waits until the newest record meets the condition, and returns it."""
        async with asyncio.timeout(PATIENCE_S):
            await self.changed.until(lambda: bool(self.records) and condition(self.records[-1]))
        return self.records[-1]


@dataclass
class Twins:
    """Two plugins of one node name, a server with one device, and the history of the device's lock."""

    machines: list[PluginProcess]
    server: VirtualServer
    lock: LockHistory
    stack: contextlib.AsyncExitStack
    kubeconfig: str

    async def start(self, boot_id: str) -> PluginProcess:
        """Starts a machine of this node name."""
        running = plugin(self.kubeconfig, free_port(), simulated=True, server=self.server, boot_id=boot_id)
        self.machines.append(await self.stack.enter_async_context(running))
        return self.machines[-1]

    def held_by(self, boot_id: str) -> Callable[[Lock], bool]:
        """Returns the condition that the lock has port and pod of this machine, the last writes of an Allocate."""
        return lambda lock: (lock.holder, lock.boot_id) == (NODE, boot_id) and None not in (lock.port, lock.pod)


@pytest.fixture
async def twins(cluster: Cluster, tokens: NodeTokens, admin: KubeClient) -> AsyncIterator[Twins]:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(usbip_server())
        lock = LockHistory(DeviceKey(server.key, BUSID), admin)
        await stack.enter_async_context(background(lock.follow()))
        yield Twins([], server, lock, stack, cluster.kubeconfig(await tokens.of(NODE)))


async def denied(machine: PluginProcess) -> None:
    """Waits until the plugin has tried to take the lock, and another machine had it."""
    async with asyncio.timeout(PATIENCE_S):
        while not re.search(r'lock_acquire_seconds_count{result="held"} [1-9]', (await machine.get("/metrics"))[1]):  # noqa: ASYNC110 - another process
            await asyncio.sleep(POLL_S)


async def attached(machine: PluginProcess) -> bool:
    (row,) = json.loads((await machine.get("/api/devices"))[1])["devices"]
    return bool(row["reason_code"] == Reason.ATTACHED.code)


@pytest.mark.parametrize("forgotten", [False, True], ids=["pod known", "pod forgotten"])
async def test_a_device_stays_with_its_machine_when_another_one_of_the_nodes_name_starts(
    twins: Twins, admin: KubeClient, forgotten: bool
) -> None:
    """The API server may have forgotten the pod: it is deleted with the Node object, which is made anew."""
    first = await twins.start(BOOTS[0])
    await first.offered()
    pod = await first.admit(admin)
    held = await twins.lock.until(twins.held_by(BOOTS[0]))
    connections = twins.server.peers(BUSID)
    if forgotten:
        await delete_pod(admin, pod)

    second = await twins.start(BOOTS[1])
    async with asyncio.timeout(PATIENCE_S):
        await second.kubelet.wait_for(RESOURCE, lambda devices: devices == {second.device.id: False})
    if not forgotten:
        await denied(second)  # it tries to attach the device for the pod that it would have after a reboot
        assert twins.lock.records[-1] == held
        await delete_pod(admin, pod)
    # The server does not list the device, so that nobody can take the lock that the second machine leaves. The first
    # one takes it again, which shows the second one that there is a first one.
    await second.line('"device released"')
    again = await twins.lock.until(lambda lock: lock.epoch > held.epoch and twins.held_by(BOOTS[0])(lock))
    await second.line('"another machine has this node\'s name"')
    assert OTHER_BOOT in await second.allocate_past_the_kubelet()
    assert [await attached(machine) for machine in twins.machines] == [True, False]
    assert second.kubelet.health(RESOURCE) == {second.device.id: False}
    assert twins.server.peers(BUSID) == connections
    assert (twins.server.table.granted, twins.server.table.refused) == (1, 0)
    assert (again, again.epoch) == (twins.lock.records[-1], held.epoch + 1), "the lock is left once only"
    assert {record.boot_id for record in twins.lock.records} == {BOOTS[0]}

    first.kubelet.end(pod)
    await twins.lock.until(lambda lock: not lock.holder)
    await second.offered()
    await second.admit(admin)
    assert (await twins.lock.until(twins.held_by(BOOTS[1]))).epoch == again.epoch + 1
    assert twins.server.violations == []


async def test_one_of_two_machines_of_a_name_wins_each_device(twins: Twins, admin: KubeClient, long_form: bool) -> None:
    for boot_id in BOOTS:
        await twins.start(boot_id)
    for number in range(LONG_ROUNDS if long_form else ROUNDS):
        for machine in twins.machines:
            await machine.offered()
        pods = [await make_pod(admin, NODE, limits={RESOURCE: "1"}) for _ in BOOTS]
        errors = await asyncio.gather(*(m.allocate(p) for m, p in zip(twins.machines, pods, strict=True)))
        assert errors.count("") == 1, f"round {number}: {errors}"
        assert twins.server.importers(BUSID) == 1
        winner = errors.index("")
        await twins.lock.until(twins.held_by(BOOTS[winner]))
        assert [await attached(machine) for machine in twins.machines] == [index == winner for index in range(2)]
        twins.machines[winner].kubelet.end(pods[winner])
        for pod in pods:
            await delete_pod(admin, pod)
        await twins.lock.until(lambda lock: not lock.holder)
    assert twins.server.violations == []
