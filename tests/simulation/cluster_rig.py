"""A small cluster in virtual time for the tests of the simulation, and what they do with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from usbip_plugin.attach.containers import ContainerResponse
from usbip_plugin.attach.events import DeviceEvent
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.locks import record
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.protocol import released_by_person
from usbip_plugin.model import Attachment, DeviceKey, Health, PodRef, Reason, UsbId
from usbip_plugin.node.agent import Agent, MetricHooks
from usbip_sim.server.server import RESET_TIME, VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual import cluster as simulated
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.surroundings import ClusterSpec

STICK = UsbId(0x0951, 0x1666)
DONGLE = UsbId(0x1050, 0x0407)
FLASHED = UsbId(0x0951, 0x16AA)
"""USB ID of a stick after its firmware was loaded."""
LOCKS = LockSettings(duration=40.0, import_window=10.0)
SETTLE = 5.0
"""Virtual seconds in which everything happens that waits for no timeout."""


def server(
    host: str, *devices: VirtualDevice, keepalive: bool = False, reset_time: float = RESET_TIME
) -> VirtualServer:
    clock = SimClock(asyncio.get_running_loop())
    return VirtualServer(devices, host, 3240, clock=clock, listen=False, keepalive=keepalive, reset_time=reset_time)


def stick(busid: str, serial: str = "") -> VirtualDevice:
    return VirtualDevice(busid, STICK, serial=serial or f"S-{busid}", configured=True)


def dongle(busid: str, serial: str = "") -> VirtualDevice:
    return VirtualDevice(busid, DONGLE, serial=serial or f"D-{busid}", configured=True)


def resource(name: str, servers: Sequence[VirtualServer], usb_id: UsbId = STICK, **keys: object) -> ResourceConfig:
    """Returns a resource of all devices of one kind. keys: other fields of ResourceConfig."""
    selector = Selector(vendor=usb_id.vendor, product=usb_id.product)
    return ResourceConfig(name, tuple(DeviceSelector(s.key, selector) for s in servers), **keys)  # type: ignore[arg-type]


def by_serial(*servers: VirtualServer, serials: Sequence[str] = ("RED",)) -> ResourceConfig:
    """Returns the resource `stick` of the devices that have one of these serial numbers, on any of the servers."""
    selectors = (DeviceSelector(each.key, Selector(serial=serial)) for each in servers for serial in serials)
    return ResourceConfig("stick", tuple(selectors))


def spec(servers: Sequence[VirtualServer], *resources: ResourceConfig, nodes: int = 2, seed: int = 0) -> ClusterSpec:
    return ClusterSpec(
        names=[f"node-{chr(ord('a') + i)}" for i in range(nodes)],
        servers=servers,
        config=Config(resources or (resource("stick", servers),)),
        seed=seed,
        lock_settings=LOCKS,
    )


def key(of: VirtualServer, busid: str) -> DeviceKey:
    return DeviceKey(of.key, busid)


def pod(name: str) -> PodRef:
    return PodRef("default", name, f"uid-of-{name}")


def agent(node: ClusterNode) -> Agent:
    """Returns the agent of a node whose plugin runs."""
    assert node.agent is not None
    return node.agent


def reason(node: ClusterNode, device: DeviceKey) -> Reason | None:
    """Returns why the node advertises the device as it does, None if it does not or its plugin does not run."""
    known = _advertised(node, device)
    return known.reason if known is not None else None


def detail(node: ClusterNode, device: DeviceKey) -> str:
    """Returns the text of the reason for which the node advertises the device as it does."""
    known = _advertised(node, device)
    return known.detail if known is not None else ""


def _advertised(node: ClusterNode, device: DeviceKey) -> Health | None:
    return node.agent.inventory.health().get(device.id) if node.agent is not None else None


def port_of(node: ClusterNode, device: DeviceKey) -> int:
    """Returns the port to which the device is attached, by the node's port records."""
    (port,) = (p.number for p in node.driver.ports_now() if p.record == device)
    return port


def attachment_of(node: ClusterNode, device: DeviceKey) -> Attachment:
    """Returns the attachment of a device that the node's kernel has."""
    attachment = node.kernel.attachment(device, port_of(node, device))
    assert attachment is not None
    return attachment


def replug(server: VirtualServer, *devices: VirtualDevice) -> None:
    """Plugs devices in, in place of those that have their bus IDs."""
    for device in devices:
        server.unplug(device.busid)
    for device in devices:
        server.plug(device)


def carry(origin: VirtualServer, busid: str, target: VirtualServer, to: str) -> None:
    """Unplugs a device and plugs it in elsewhere."""
    device = origin.table.device(busid)[0]
    origin.unplug(busid)
    target.plug(replace(device, busid=to))


class Cluster(simulated.Cluster):
    """A simulated cluster with the steps that its tests have in common."""

    def health(self, node: ClusterNode, name: str = "stick") -> dict[str, bool]:
        """Returns {device ID: healthy} as this node's kubelet has it."""
        return node.kubelet.health(self.full(name))

    async def all_healthy(self, *devices: DeviceKey, name: str = "stick") -> None:
        """Waits until every node offers all these devices."""
        ids = {device.id for device in devices}

        def offered() -> bool:
            return all(
                ids <= {i for i, healthy in self.health(node, name).items() if healthy} for node in self.nodes.values()
            )

        assert await self.settle(offered, SETTLE), {n.name: self.health(n, name) for n in self.nodes.values()}

    async def becomes(self, node: ClusterNode, device: DeviceKey, *, healthy: bool, within: float = SETTLE) -> None:
        """Waits until the node's kubelet has the device as healthy, or as unhealthy."""

        def reported() -> bool:
            resources = {*node.kubelet.manager.healthy, *node.kubelet.manager.unhealthy}
            known = {node.kubelet.health(name).get(device.id) for name in resources}
            return known - {None} == {healthy}

        assert await self.settle(reported, within), f"{node.name}: {device} {reason(node, device)}"

    async def admitted(self, device: DeviceKey) -> ClusterNode:
        """Waits until all nodes offer the device, and admits pod p with it on node-a, which is returned."""
        await self.all_healthy(device)
        node = self["node-a"]
        assert await node.admit(pod("p"), "stick") is None
        assert node.attached() == {device}
        return node

    async def taken(self, device: DeviceKey) -> ClusterNode:
        """Admits pod p with the device on node-a, and waits until the lock names the pod. Returns the node."""
        node = await self.admitted(device)
        await self.noted(device, "p")
        return node

    async def noted(self, device: DeviceKey, name: str) -> None:
        """Waits until the lock names the pod that has the device."""
        assert await self.settle(lambda: self.pod_of(device) == pod(name), SETTLE), self.pod_of(device)

    async def knows_its_pod(self, node: ClusterNode, device: DeviceKey, name: str = "p") -> None:
        """Waits until the plugin process that runs on the node knows which pod has the device."""
        claims = agent(node).claims.view
        assert await self.settle(lambda: device.id in claims and claims[device.id].pod == pod(name), SETTLE)

    async def allocate(self, node: ClusterNode, device: DeviceKey, *, name: str = "stick") -> ContainerResponse:
        """Calls the plugin's Allocate without the kubelet, which may refuse the device. Raises PluginError."""
        (answer,) = await agent(node).allocator.allocate_all(self.full(name), ((device.id,),))
        return answer

    async def killed_after(self, node: ClusterNode, steps: int) -> None:
        """Kills the node's plugin after so many more of its steps, and waits until it is dead."""
        assert node.process is not None
        node.process.after_steps(steps, node.kill)
        assert await self.settle(lambda: node.process is None, 120)

    async def freed(self, *devices: DeviceKey, within: float = SETTLE) -> None:
        """Waits until nobody holds or imports these devices. No node may have any device attached then."""

        def free(device: DeviceKey) -> bool:
            return self.holder(device) == "" and not self.servers[device.server].importers(device.busid)

        assert await self.settle(lambda: all(free(device) for device in devices), within), devices
        assert not any(node.attached() for node in self.nodes.values())

    async def lost_and_back(self, node: ClusterNode, device: DeviceKey) -> None:
        """Drops the server's connection of a device that the node has, and waits for its re-attach."""
        self.servers[device.server].drop(device.busid)
        await self.becomes(node, device, healthy=False)
        await self.becomes(node, device, healthy=True)

    def has_note(self, device: DeviceKey, note: str) -> bool:
        """Returns whether the device's lock has an annotation."""
        return self.note(device, note) is not None

    def steal(self, device: DeviceKey) -> None:
        """Writes the name of a node outside of the cluster into the device's lock."""
        lease = self.backend.leases[device.id]
        self.backend.replace(replace(lease, holder="node-z", transitions=lease.transitions + 1))

    def let_go(self, device: DeviceKey) -> None:
        """Empties the device's lock as its holder outside of the cluster does."""
        lease = self.backend.leases[device.id]
        self.backend.replace(replace(lease, holder=""))

    def note(self, device: DeviceKey, name: str) -> str | None:
        """Returns an annotation of the device's lock, None if it is not there."""
        lease = self.backend.leases.get(device.id)
        return lease.annotations.get(name) if lease is not None else None

    def release_by_hand(self, device: DeviceKey) -> None:
        """Empties the device's lock as `usbip-plugin release` does."""
        lease = self.backend.leases[device.id]
        self.backend.replace(released_by_person(lease, datetime(2026, 1, 1, tzinfo=UTC)).lease)

    def mislead(self, device: DeviceKey, serial: str) -> None:
        """Writes a wrong serial number on the lock, as when a server reuses the device number of another device."""
        lease = self.backend.leases[device.id]
        self.backend.replace(replace(lease, annotations={**lease.annotations, record.SERIAL: serial}))


def cluster(made: ClusterSpec) -> contextlib.AbstractAsyncContextManager[Cluster]:
    """Runs a cluster within the block."""
    return simulated.running(Cluster(made))


def hearing(made: ClusterSpec, notices: list[DeviceEvent]) -> ClusterSpec:
    """Returns a spec whose agents add their DeviceEvents to a list."""
    return replace(made, observer=lambda _node: MetricHooks(on_notice=notices.append))


@contextlib.asynccontextmanager
async def offered(
    *devices: VirtualDevice,
    nodes: int = 2,
    keepalive: bool = False,
    serials: Sequence[str] = (),
    notices: list[DeviceEvent] | None = None,
    change: Callable[[ClusterSpec], ClusterSpec] = lambda made: made,
    **keys: object,
) -> AsyncIterator[tuple[Cluster, VirtualServer, list[DeviceKey]]]:
    """Runs a cluster with one server, whose devices every node offers as the resource `stick`.

    serials: the resource selects these serial numbers only.
    notices: see hearing().
    change: of any other part of the spec.
    keys: fields of the resource.
    """
    lab = server("lab", *devices, keepalive=keepalive)
    of = by_serial(lab, serials=serials) if serials else resource("stick", [lab], STICK, **keys)
    made = change(spec([lab], of, nodes=nodes))
    async with cluster(made if notices is None else hearing(made, notices)) as c:
        await c.all_healthy(*(key(lab, d.busid) for d in devices if not serials or d.serial in serials))
        yield c, lab, [key(lab, device.busid) for device in devices]


@contextlib.asynccontextmanager
async def one_stick(**options: Any) -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey]]:
    """Runs offered() with one stick."""
    async with offered(stick("1-1"), **options) as (c, lab, (device,)):
        yield c, lab, device


@contextlib.asynccontextmanager
async def two_sticks(**options: Any) -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey, DeviceKey]]:
    """Runs offered() with two sticks."""
    async with offered(stick("1-1"), stick("1-2"), **options) as (c, lab, (one, two)):
        yield c, lab, one, two
