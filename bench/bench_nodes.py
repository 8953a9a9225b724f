"""Nodes for measurements: production agents with doubles, or on this machine's vhci_hcd and a real usbipd."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.trace import NoOpTracer, Tracer

from tests.rigs.agents_rig import DONGLE, RESOURCE, Nodes
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.kube.client import KubeClient, connect
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import Lease, LeaseStore
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_plugin.vhci.driver import VhciDriver
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.world import Setup, SimNode, running

NAMESPACE = "usbip-system"


class TimedLeases(KubernetesLeases):
    """A lease store that records when its node sends a write that makes it the holder (time.perf_counter())."""

    def __init__(self, client: KubeClient, namespace: str, node: str) -> None:
        super().__init__(client, namespace)
        self._node = node
        self.taking_sent: dict[str, float] = {}

    async def create(self, lease: Lease) -> Lease:
        self._note(lease)
        return await super().create(lease)

    async def replace(self, lease: Lease) -> Lease:
        self._note(lease)
        return await super().replace(lease)

    def _note(self, lease: Lease) -> None:
        if lease.holder == self._node and lease.name not in self.taking_sent:
            self.taking_sent[lease.name] = time.perf_counter()


@dataclass(frozen=True)
class Place:
    """Nodes, servers and devices of a measurement.

    leases: lease store of a node. None for Leases in memory.
    driver: driver of a node. None for the simulated kernel.
    kube: client for the status of a node. None for no Node status.
    pods: the client of kube also watches pods.
    """

    names: tuple[str, ...]
    servers: tuple[ServerKey, ...]
    keys: tuple[DeviceKey, ...]
    leases: Callable[[str], LeaseStore] | None = None
    driver: Callable[[str, SimulatedKernel], VhciDriver] | None = None
    kube: Callable[[str], KubeClient] | None = None
    pods: bool = False
    selector: Selector = Selector(vendor=DONGLE.vendor, product=DONGLE.product)  # noqa: RUF009 - frozen
    allocate_timeout: float = 10.0
    enumeration_delay: float = 0.0
    tracer: Tracer = NoOpTracer()  # noqa: RUF009 - it has no state


@contextlib.asynccontextmanager
async def nodes(place: Place) -> AsyncIterator[Nodes]:
    """Runs all nodes of the place, when every kubelet has every device."""
    selectors = tuple(DeviceSelector(server, place.selector) for server in place.servers)
    setup = Setup(
        config=Config((ResourceConfig(RESOURCE, selectors),), allocate_timeout=place.allocate_timeout),
        clock=SystemClock(),
        make_driver=place.driver,
        make_leases=place.leases,
        make_kube=place.kube,
        make_tracer=lambda _node: place.tracer,
        kube_has_pods=place.pods,
    )
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        world = await stack.enter_async_context(running(directory, place.names, setup))
        found = Nodes(world, place.keys)
        for node in found.nodes:
            node.kernel.enumeration_delay = place.enumeration_delay
        await found.connect(stack)
        yield found


@contextlib.asynccontextmanager
async def connected(kubeconfig: str) -> AsyncIterator[KubeClient]:
    """Connects a client to the API server, and closes it at the end."""
    client = await connect(kubeconfig)
    try:
        yield client
    finally:
        await client.close()


def config_of(number: int, port: int, selector: str = "") -> str:
    """Returns the lines of a configuration for the resource benchNUMBER: all devices of a server, or those selected."""
    return (
        f"  bench{number}:\n    - target: {{host: 127.0.0.1, port: {port}}}\n"
        f'      selector: {{vendor: "{DONGLE.vendor:04x}", product: "{DONGLE.product:04x}"{selector}}}\n'
    )


@contextlib.asynccontextmanager
async def virtual_server(devices: int = 1) -> AsyncIterator[VirtualServer]:
    """Runs a server whose devices are free at once after a detach."""
    server = VirtualServer([VirtualDevice(f"1-{i + 1}", DONGLE, configured=True) for i in range(devices)], reset_time=0)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def keys_of(*servers: VirtualServer) -> tuple[DeviceKey, ...]:
    return tuple(DeviceKey(server.key, "1-1") for server in servers)


async def timed_allocate(found: Nodes, node: SimNode, key: DeviceKey) -> float:
    """Returns the milliseconds of one Allocate as the kubelet sees it. Raises RuntimeError if it fails."""
    began = time.perf_counter()
    answer = await found.allocate(node, key)
    took = time.perf_counter() - began
    if answer.response is None:
        raise RuntimeError(answer.error)
    return took * 1e3


async def allocate_times(found: Nodes, key: DeviceKey, count: int) -> list[float]:
    """Allocates and releases repeatedly. Returns the milliseconds of each Allocate but the first."""
    times = []
    for number in range(count + 1):
        took = await timed_allocate(found, found.nodes[0], key)
        if number:
            times.append(took)
        await found.end_pod(found.nodes[0], key)
    return times
