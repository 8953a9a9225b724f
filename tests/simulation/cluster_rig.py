"""What the simulation tests share: a small cluster in virtual time, and words for what a test does with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from usbip_plugin.attach.containers import ContainerResponse
from usbip_plugin.attach.events import DeviceEvent
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.locks import record
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.model import DeviceKey, Health, PodRef, Reason, UsbId
from usbip_plugin.node.agent import Agent, MetricHooks
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.cluster import Cluster, cluster
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.surroundings import ClusterSpec

STICK = UsbId(0x0951, 0x1666)
DONGLE = UsbId(0x1050, 0x0407)
LOCKS = LockSettings(duration=40.0, import_window=10.0)
SETTLE = 5.0
"""Virtual seconds in which anything that needs no timeout must have happened."""


def server(host: str, *devices: VirtualDevice, keepalive: bool = False) -> VirtualServer:
    clock = SimClock(asyncio.get_running_loop())
    return VirtualServer(devices, host, 3240, clock=clock, listen=False, keepalive=keepalive)


def stick(busid: str, serial: str = "") -> VirtualDevice:
    return VirtualDevice(busid, STICK, serial=serial or f"S-{busid}", configured=True)


def dongle(busid: str, serial: str = "") -> VirtualDevice:
    return VirtualDevice(busid, DONGLE, serial=serial or f"D-{busid}", configured=True)


def resource(name: str, servers: Sequence[VirtualServer], usb_id: UsbId = STICK) -> ResourceConfig:
    selector = Selector(vendor=usb_id.vendor, product=usb_id.product)
    return ResourceConfig(name, tuple(DeviceSelector(s.key, selector) for s in servers))


def by_serial(*servers: VirtualServer, serials: Sequence[str] = ("RED",)) -> ResourceConfig:
    """`stick`: what has one of these serial numbers, at any of the servers."""
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


def health(cluster: Cluster, node: ClusterNode, name: str = "stick") -> dict[str, bool]:
    """{device ID: healthy} as this node's kubelet has it."""
    return node.kubelet.health(cluster.full(name))


def agent(node: ClusterNode) -> Agent:
    """Of a node whose plugin runs."""
    assert node.agent is not None
    return node.agent


def reason(node: ClusterNode, device: DeviceKey) -> Reason | None:
    """Why the node advertises the device as it does; None if it does not, or its plugin does not run."""
    known = _advertised(node, device)
    return known.reason if known is not None else None


def detail(node: ClusterNode, device: DeviceKey) -> str:
    """The same in words."""
    known = _advertised(node, device)
    return known.detail if known is not None else ""


def _advertised(node: ClusterNode, device: DeviceKey) -> Health | None:
    return node.agent.inventory.health().get(device.id) if node.agent is not None else None


async def all_healthy(cluster: Cluster, *devices: DeviceKey, name: str = "stick") -> None:
    """Waits until every node offers all these devices."""
    wanted = {device.id for device in devices}

    def offered() -> bool:
        return all(
            wanted <= {i for i, healthy in health(cluster, node, name).items() if healthy}
            for node in cluster.nodes.values()
        )

    assert await cluster.settle(offered, SETTLE), {n.name: health(cluster, n, name) for n in cluster.nodes.values()}


async def becomes(
    cluster: Cluster, node: ClusterNode, device: DeviceKey, *, healthy: bool, within: float = SETTLE
) -> None:
    """Waits until the node's kubelet has the device so."""
    seen = await cluster.settle(lambda: device.id in _all(node) and _all(node)[device.id] is healthy, within)
    assert seen, f"{node.name}: {device} {reason(node, device)}"


async def admitted(cluster: Cluster, device: DeviceKey) -> ClusterNode:
    """node-a, whose pod p has just got the device that all had offered."""
    await all_healthy(cluster, device)
    node = cluster["node-a"]
    assert await node.admit(pod("p"), "stick") is None
    assert node.attached() == {device}
    return node


async def taken(cluster: Cluster, device: DeviceKey) -> ClusterNode:
    """The same, and its plugin has seen whose it is."""
    node = await admitted(cluster, device)
    await noted(cluster, device, "p")
    return node


async def noted(cluster: Cluster, device: DeviceKey, name: str) -> None:
    """Waits until the lock says which pod has the device."""
    assert await cluster.settle(lambda: cluster.pod_of(device) == pod(name), SETTLE), cluster.pod_of(device)


async def knows_its_pod(cluster: Cluster, node: ClusterNode, device: DeviceKey, name: str = "p") -> None:
    """Waits until the plugin process that runs on the node knows which pod has the device."""
    claims = agent(node).claims.view
    assert await cluster.settle(lambda: device.id in claims and claims[device.id].pod == pod(name), SETTLE)


async def allocate(cluster: Cluster, node: ClusterNode, device: DeviceKey, *, name: str = "stick") -> ContainerResponse:
    """Asked for straight at the plugin, past a kubelet that would know better. PluginError."""
    (answer,) = await agent(node).allocator.allocate_all(cluster.full(name), ((device.id,),))
    return answer


async def killed_after(cluster: Cluster, node: ClusterNode, steps: int) -> None:
    """Waits until the node's plugin is dead, which it is after so many more of its steps."""
    assert node.process is not None
    node.process.after_steps(steps, node.kill)
    assert await cluster.settle(lambda: node.process is None, 60)


def port_of(node: ClusterNode, device: DeviceKey) -> int:
    """Where the device is attached, by the node's port records."""
    (port,) = (p.number for p in node.driver.ports_now() if p.record == device)
    return port


async def freed(cluster: Cluster, *devices: DeviceKey, within: float = SETTLE) -> None:
    """Waits until nobody has these devices by their locks and servers; no node has any attached by then."""

    def free(device: DeviceKey) -> bool:
        return cluster.holder(device) == "" and not cluster.servers[device.server].importers(device.busid)

    assert await cluster.settle(lambda: all(free(device) for device in devices), within), devices
    assert not any(node.attached() for node in cluster.nodes.values())


async def lost_and_back(cluster: Cluster, node: ClusterNode, device: DeviceKey) -> None:
    """The server drops the connection of a device that the node has; it is attached anew."""
    cluster.servers[device.server].drop(device.busid)
    await becomes(cluster, node, device, healthy=False)
    await becomes(cluster, node, device, healthy=True)


def carry(origin: VirtualServer, busid: str, target: VirtualServer, to: str) -> None:
    """A device is pulled out and plugged in elsewhere."""
    device = origin.table.device(busid)[0]
    origin.unplug(busid)
    target.plug(replace(device, busid=to))


def steal(cluster: Cluster, device: DeviceKey) -> None:
    """Another node, which is none of the cluster, writes its name into the device's lock."""
    lease = cluster.backend.leases[device.id]
    cluster.backend.replace(replace(lease, holder="node-z", transitions=lease.transitions + 1))


def release_by_hand(cluster: Cluster, device: DeviceKey) -> None:
    """A person empties the device's lock, as `usbip-plugin release` does."""
    lease = cluster.backend.leases[device.id]
    notes = {**lease.annotations, record.WRITE_ID: record.BY_HAND}
    cluster.backend.replace(replace(lease, holder="", annotations=notes))


def mislead(cluster: Cluster, device: DeviceKey, serial: str) -> None:
    """A wrong serial number on the lock, as if the server had given another device the number of the one before it."""
    lease = cluster.backend.leases[device.id]
    cluster.backend.replace(replace(lease, annotations={**lease.annotations, record.SERIAL: serial}))


def hearing(made: ClusterSpec, told: list[DeviceEvent]) -> ClusterSpec:
    """What people are told of is gathered."""
    return replace(made, observer=lambda _node: MetricHooks(on_notice=told.append))


@contextlib.asynccontextmanager
async def one_stick(
    *,
    nodes: int = 2,
    keepalive: bool = False,
    told: list[DeviceEvent] | None = None,
    change: Callable[[ClusterSpec], ClusterSpec] = lambda made: made,
    **keys: object,
) -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey]]:
    """A cluster with a server, and its one stick, which every node offers.

    told: as hearing. change: of anything else. keys: of the resource.
    """
    lab = server("lab", stick("1-1"), keepalive=keepalive)
    made = change(spec([lab], replace(resource("stick", [lab]), **keys), nodes=nodes))  # type: ignore[arg-type]
    async with cluster(made if told is None else hearing(made, told)) as c:
        device = key(lab, "1-1")
        await all_healthy(c, device)
        yield c, lab, device


@contextlib.asynccontextmanager
async def two_sticks(
    *, nodes: int = 2, **keys: object
) -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey, DeviceKey]]:
    """The same with two sticks of one kind."""
    lab = server("lab", stick("1-1"), stick("1-2"))
    async with cluster(spec([lab], replace(resource("stick", [lab]), **keys), nodes=nodes)) as c:  # type: ignore[arg-type]
        one, two = key(lab, "1-1"), key(lab, "1-2")
        await all_healthy(c, one, two)
        yield c, lab, one, two


def _all(node: ClusterNode) -> dict[str, bool]:
    return {
        i: healthy
        for name in {*node.kubelet.manager.healthy, *node.kubelet.manager.unhealthy}
        for i, healthy in node.kubelet.health(name).items()
    }
