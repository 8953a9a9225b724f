"""Everything that the nodes of a simulated cluster share: configuration, servers, network and Lease store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry.trace import NoOpTracer, Tracer

from usbip_plugin.config.export import WhenApiIsAway
from usbip_plugin.config.schema import Config
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.protocol import Rules
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import DeviceKey, PodRef, ServerKey
from usbip_plugin.node.agent import MetricHooks
from usbip_plugin.vhci.driver import VhciDriver
from usbip_sim.leases import FINE, Fate, MemoryBackend, Operation
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.network import Network

FaultPlan = Callable[[str, Operation], Fate]
"""Function of a node name and an operation on the API server that returns the operation's fate."""


@dataclass(slots=True)
class ClusterSpec:
    """Specification of a simulated cluster.

    rates: seconds of each node's clock for each second of the loop; 1.0 where not given.
    offsets: start of each node's monotonic clock, in seconds; 1000.0 where not given.
    latency: returns the seconds that a packet takes one way; called for each packet.
    fleet: number of nodes that an agent counts in the cluster; 0 for those in names.
    exporters: by the servers that are exporters with a fence, what they do without the API server.
    """

    names: Sequence[str]
    servers: Sequence[VirtualServer]
    config: Config
    seed: int = 0
    lock_settings: LockSettings | None = None
    rules: Rules | None = None
    rates: Sequence[float] = ()
    offsets: Sequence[float] = ()
    faults: FaultPlan = lambda _node, _operation: FINE
    latency: Callable[[], float] = lambda: 0.001
    driver: Callable[[VhciDriver], VhciDriver] = lambda driver: driver
    observer: Callable[[str], MetricHooks] = lambda _node: MetricHooks()
    tracer: Callable[[str], Tracer] = lambda _node: NoOpTracer()
    fleet: int = 0
    exporters: Mapping[ServerKey, WhenApiIsAway] = field(default_factory=dict)


class Surroundings:
    """Configuration, servers, network and Lease store that all nodes of a simulated cluster share.

    starts: number of agents started, over all nodes.
    """

    domain = "usbip.dev"

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.seed = spec.seed
        self.starts = 0
        self.backend = MemoryBackend()
        self.servers: dict[ServerKey, VirtualServer] = {server.key: server for server in spec.servers}
        self.network = Network(self.servers.get, spec.latency)

    def full(self, resource: str) -> str:
        return f"{self.domain}/{resource}"

    def holder(self, key: DeviceKey) -> str:
        """Returns the holder in the device's Lease, "" for none."""
        lease = self.backend.leases.get(key.id)
        return lease.holder if lease is not None else ""

    def pod_of(self, key: DeviceKey) -> PodRef | None:
        """Returns the pod in the device's Lease, or None."""
        lease = self.backend.leases.get(key.id)
        return lock_of(lease).pod if lease is not None else None

    def serial_of(self, key: DeviceKey) -> str | None:
        """Returns the serial number of the device plugged in at key: "" if it has none, None if there is no device."""
        table = self.servers[key.server].table
        return table.device(key.busid)[0].serial if table.plugged(key.busid) else None
