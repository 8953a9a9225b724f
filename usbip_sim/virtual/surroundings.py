"""What the nodes of a simulated cluster share: its configuration, servers, network and Lease store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opentelemetry.trace import NoOpTracer, Tracer

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
"""(node, operation) -> what happens to it."""


def unchanged(driver: VhciDriver) -> VhciDriver:
    """The driver as it is."""
    return driver


@dataclass(slots=True)
class ClusterSpec:
    """What a cluster is made of. Everything of the outside may be replaced for one run.

    rates: each node's clock against the loop's, 1.0 where not given; offsets: where its monotonic clock begins (s).
    fleet: of how many nodes these are taken to be a part; 0: they are all.
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
    driver: Callable[[VhciDriver], VhciDriver] = unchanged
    observer: Callable[[str], MetricHooks] = lambda _node: MetricHooks()
    tracer: Callable[[str], Tracer] = lambda _node: NoOpTracer()
    fleet: int = 0


class Surroundings:
    """starts: how many agents were started so far, of all nodes."""

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
        """Whom the lock names in the store itself, "" for nobody."""
        lease = self.backend.leases.get(key.id)
        return lease.holder if lease is not None else ""

    def pod_of(self, key: DeviceKey) -> PodRef | None:
        """Which pod the lock names in the store itself."""
        lease = self.backend.leases.get(key.id)
        return lock_of(lease).pod if lease is not None else None

    def serial_of(self, key: DeviceKey) -> str | None:
        """Of what is plugged in there now, "" if it has none; None if nothing is."""
        table = self.servers[key.server].table
        return table.device(key.busid)[0].serial if table.plugged(key.busid) else None
