"""What the simulation tests share: a small cluster in virtual time, and words for what a test does with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from usbip_plugin.config import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.model import DeviceKey, PodRef, Reason, UsbId
from usbip_plugin.sim.cluster import Cluster, ClusterNode, ClusterSpec
from usbip_plugin.sim.loop import SimClock
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.usbdevice import VirtualDevice

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


def reason(node: ClusterNode, device: DeviceKey) -> Reason | None:
    """Why the node advertises the device as it does."""
    if node.agent is None:
        return None
    known = node.agent.advertiser.health().get(device.id)
    return known.reason if known is not None else None


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


def _all(node: ClusterNode) -> dict[str, bool]:
    return {
        i: healthy
        for name in {*node.kubelet.manager.healthy, *node.kubelet.manager.unhealthy}
        for i, healthy in node.kubelet.health(name).items()
    }
