"""The counts in the Node's status: not written before a kubelet has the list, and then without another change."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import cast

from opentelemetry.trace import NoOpTracer

from tests.rigs.tasks import background
from tests.rigs.vocabulary import KEY
from tests.unit.kubelet.idle_backend import IdleBackend
from usbip_plugin.context import NodeContext
from usbip_plugin.inventory.evaluate import Evaluation, Lists
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.inventory.snapshot import Snapshot
from usbip_plugin.kube.node_status import NodeStatusPublisher
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, DeviceStates
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import Advertised, Health, Lock, NodeIdentity, Reason
from usbip_sim.virtual.loop import SimClock, virtual

STORAGE = "usbip.dev/storage"
LISTS = {"storage": (Advertised(KEY.id, KEY, Health(Reason.FREE)),)}


class Offers:
    """The inventory of a node that offers LISTS from its first evaluation on. Nobody takes a device."""

    def __init__(self) -> None:
        self.advertised: Lists = {}
        self._subscribers: list[Callable[[Evaluation], None]] = []

    def subscribe(self, callback: Callable[[Evaluation], None]) -> None:
        self._subscribers.append(callback)

    def subscribe_taken(self, _callback: object) -> None:
        pass

    def evaluate(self) -> None:
        before, self.advertised = self.advertised, LISTS
        for callback in self._subscribers:
            callback(Evaluation(before, LISTS, cast("Snapshot", None)))


class NoLocks:
    """The locks of a node that sees none."""

    def __init__(self) -> None:
        self.locks: dict[str, Lock] = {}


class Node:
    """A KubeletPublisher, and the patches of the Node's status in order."""

    def __init__(self) -> None:
        clock = SimClock(asyncio.get_running_loop())
        self.patches: list[Mapping[str, int]] = []
        self.status = NodeStatusPublisher(self.write, clock, random.Random(1))
        self.publisher = KubeletPublisher(
            NodeContext(NodeIdentity("node-a", "boot-1"), clock, random.Random(1), NoOpTracer()),
            inventory=cast("Inventory", Offers()),
            locks=cast("LockManager", NoLocks()),
            node_status=self.status,
            on_advertised=lambda _resource, _devices: None,
            on_withdrawn=lambda _seconds: None,
        )

    async def write(self, counts: Mapping[str, int]) -> None:
        self.patches.append(counts)

    def offer(self) -> DevicePluginServer:
        """Returns a server with a complete list and without a kubelet."""
        server = DevicePluginServer(STORAGE, IdleBackend())
        self.publisher.attach(server)
        self.publisher.begin()
        return server


class Kubelet:
    """A kubelet that takes no list before `reading` is set."""

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.lists: list[DeviceStates] = []

    async def receive(self, state: DeviceStates) -> None:
        await self.reading.wait()
        self.lists.append(state)


@virtual
async def test_the_node_status_has_the_kubelets_counts_as_soon_as_the_kubelet_has_its_first_list() -> None:
    """Holds without another change, after a start and after a restart of the kubelet."""
    node = Node()
    server = node.offer()
    async with background(node.status.run()):
        for starts in range(1, 3):
            kubelet = Kubelet()
            async with background(server.follow(kubelet.receive)):
                await asyncio.sleep(1)
                assert len(node.patches) == starts - 1, "the kubelet would refuse the pods that the scheduler sends"
                kubelet.reading.set()
                await asyncio.sleep(1)
                assert len(kubelet.lists) == 1
                assert node.patches == [{STORAGE: 1}] * starts
            node.publisher.kubelet_gone(STORAGE)


@virtual
async def test_a_server_that_was_replaced_changes_no_node_status() -> None:
    node = Node()
    former, kubelet = node.offer(), Kubelet()
    node.publisher.attach(DevicePluginServer(STORAGE, IdleBackend()))
    kubelet.reading.set()
    async with background(node.status.run()), background(former.follow(kubelet.receive)):
        await asyncio.sleep(1)
        assert (len(kubelet.lists), node.patches) == (1, [])
