"""Metrics that are a state of something: read at each scrape, kept nowhere."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from usbip_plugin.observe.metrics import PREFIX

Labelled = Mapping[tuple[str, ...], float]
"""A value for each set of label values."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of one node. Durations in seconds; counts since the process began.

    registered: by resource. servers: by host:port, whether it answers; those not asked yet are left out. listed: the
    devices each of these lists. ports_used, ports_free: by hub, hs or ss; empty where the driver is not loaded. claims:
    by state. session_age: since the last heartbeat that succeeded, None while the node holds no lock or has sent none.
    """

    version: str
    ready: bool
    registered: Mapping[str, bool] = field(default_factory=dict)
    servers: Mapping[str, bool] = field(default_factory=dict)
    listed: Mapping[str, int] = field(default_factory=dict)
    driver_loaded: bool = False
    ports_used: Mapping[str, int] = field(default_factory=dict)
    ports_free: Mapping[str, int] = field(default_factory=dict)
    claims: Mapping[str, int] = field(default_factory=dict)
    locks_held: int = 0
    lock_duration: float = 0.0
    session_age: float | None = None
    api_reachable: bool = False
    pod_resources_polls: int = 0
    events_dropped: int = 0
    trace_export_failures: int = 0
    trace_spans_dropped: int = 0


class NodeCollector(Collector):
    """read is called once for each scrape, in the thread that renders; it must be quick and not raise."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        now = self._read()
        yield _gauge(
            "build_info",
            "Always 1; the labels say what runs.",
            ("version", "python"),
            {(now.version, platform.python_version()): 1},
        )
        yield _one("ready", "1 if /readyz says so: locks read, every resource registered.", now.ready)
        yield _gauge("registered", "1 if the kubelet listens to the resource.", ("resource",), _by(now.registered))
        yield _gauge("server_reachable", "1 if the USB/IP server answers.", ("server",), _by(now.servers))
        yield _gauge(
            "server_devices",
            "Devices that the USB/IP server listed when it last answered.",
            ("server",),
            _by(now.listed),
        )
        yield _one("vhci_driver_loaded", "1 if vhci_hcd is loaded and can be read.", now.driver_loaded)
        yield _gauge("vhci_ports_used", "Ports of vhci_hcd in use, by whomever.", ("hub",), _by(now.ports_used))
        yield _gauge("vhci_ports_free", "Free ports of vhci_hcd.", ("hub",), _by(now.ports_free))
        yield _gauge("claims", "Devices this node does something with.", ("state",), _by(now.claims))
        yield _one("locks_held", "Locks that name this node.", now.locks_held)
        yield _one("lock_duration_seconds", "Silence after which a lock may be taken over.", now.lock_duration)
        yield _gauge(
            "session_age_seconds",
            "Time since the last heartbeat that the API server took, while a lock is held.",
            (),
            {} if now.session_age is None else {(): now.session_age},
        )
        yield _one("api_reachable", "1 if the API server answers and the locks are watched.", now.api_reachable)
        yield _count(
            "pod_resources_polls", "Lists of the kubelet that claims were compared with.", now.pod_resources_polls
        )
        yield _count("events_dropped", "Kubernetes Events that were not recorded.", now.events_dropped)
        yield _count("trace_export_failures", "Batches of spans that no collector took.", now.trace_export_failures)
        yield _count("trace_spans_dropped", "Spans that were to be exported and are lost.", now.trace_spans_dropped)


def _by(values: Mapping[str, float]) -> Labelled:
    return {(label,): value for label, value in values.items()}


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Labelled) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _one(name: str, text: str, value: float) -> Metric:
    return _gauge(name, text, (), {(): value})


def _count(name: str, text: str, value: int) -> Metric:
    """Exported with the suffix _total."""
    return CounterMetricFamily(PREFIX + name, text, value=value)
