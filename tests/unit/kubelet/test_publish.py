"""What the Node is told, and when: never before a kubelet has the list, and then without waiting for a change."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import cast

from opentelemetry.trace import NoOpTracer

from tests.unit.kubelet.idle_backend import IdleBackend
from usbip_plugin.context import NodeContext
from usbip_plugin.inventory.evaluate import Evaluation, Lists
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.inventory.snapshot import Snapshot
from usbip_plugin.kube.node_status import NodeStatusPublisher
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, DeviceStates
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import Advertised, DeviceKey, Health, Lock, NodeIdentity, Reason, ServerKey
from usbip_sim.virtual.loop import SimClock, virtual

STORAGE = "usbip.dev/storage"
STICK = DeviceKey(ServerKey("lab", 3240), "1-1")
LISTS = {"storage": (Advertised(STICK.id, STICK, Health(Reason.FREE)),)}


class Offers:
    """The inventory of a node that offers LISTS from its first evaluation on."""

    def __init__(self) -> None:
        self.advertised: Lists = {}
        self._subscribers: list[Callable[[Evaluation], None]] = []

    def subscribe(self, callback: Callable[[Evaluation], None]) -> None:
        self._subscribers.append(callback)

    def subscribe_taken(self, _callback: object) -> None:
        """Nobody takes a device."""

    def evaluate(self) -> None:
        before, self.advertised = self.advertised, LISTS
        for callback in self._subscribers:
            callback(Evaluation(before, LISTS, cast("Snapshot", None)))


class NoLocks:
    """The locks of a node that sees none."""

    def __init__(self) -> None:
        self.locks: dict[str, Lock] = {}


class Node:
    """A KubeletPublisher with its Node status, and what the Node was told by it, in order."""

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
        """A server whose list is complete, and that no kubelet listens to yet."""
        server = DevicePluginServer(STORAGE, IdleBackend())
        self.publisher.attach(server)
        self.publisher.begin()
        return server


class Kubelet:
    """Takes lists as slowly as it likes: none before `reading` is set."""

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.lists: list[DeviceStates] = []

    async def receive(self, state: DeviceStates) -> None:
        await self.reading.wait()
        self.lists.append(state)


@virtual
async def test_the_node_says_what_a_kubelet_was_told_as_soon_as_it_has_its_first_list() -> None:
    """Also if nothing changes from then on: after a start, or after a restart of the kubelet."""
    node = Node()
    writing = asyncio.create_task(node.status.run())
    server = node.offer()
    for restarts in range(1, 3):
        kubelet = Kubelet()
        listening = asyncio.create_task(server.follow(kubelet.receive))
        await asyncio.sleep(1)
        assert len(node.patches) == restarts - 1, "the kubelet would refuse the pods that the scheduler sends"
        kubelet.reading.set()
        await asyncio.sleep(1)
        assert len(kubelet.lists) == 1
        assert node.patches == [{STORAGE: 1}] * restarts
        listening.cancel()
        node.publisher.kubelet_gone(STORAGE)
    writing.cancel()


@virtual
async def test_a_server_that_was_replaced_does_not_tell_the_node() -> None:
    node = Node()
    writing = asyncio.create_task(node.status.run())
    former, kubelet = node.offer(), Kubelet()
    node.publisher.attach(DevicePluginServer(STORAGE, IdleBackend()))
    listening = asyncio.create_task(former.follow(kubelet.receive))
    kubelet.reading.set()
    await asyncio.sleep(1)
    assert (len(kubelet.lists), node.patches) == (1, [])
    listening.cancel()
    writing.cancel()
