"""The metrics of the plugin, in a registry of their own.

Four names are those of the Go program. Events are counted as they happen; states are read at each scrape. The fifty
series of a resource are made at each scrape, too: as objects of prometheus_client with a lock each, they take 31 KiB.
"""

from __future__ import annotations

import asyncio
import collections
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics import Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from usbip_plugin.model import Advertised, Reason
from usbip_plugin.sync import Steps

PREFIX = "usbip_device_plugin_"
"""Precedes the names of the metrics."""
LABEL = "resource"
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ALLOCATE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 30, 60, 120)
"""Upper bounds of the buckets in seconds. An Allocate takes at most allocateTimeout, which is at most 120 s."""
WITHDRAWAL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

Labelled = Mapping[tuple[str, ...], float]
"""A value for each set of label values."""


@dataclass(frozen=True, slots=True)
class NodeReading:
    """The state of one node, a field for each metric of NodeCollector. Durations are in seconds.

    ready: whether /readyz answers 200.
    registered: by resource, whether it is registered with the kubelet.
    servers: by host:port, whether the server answers. Servers not queried yet are left out.
    listed: by host:port, how many devices the server lists.
    lists_in_use, exports_twice: by host:port, whether the server was seen to do so.
    driver_loaded: whether vhci_hcd is loaded and can be read.
    ports_used, ports_free: by hub, "hs" or "ss". Empty if the driver is not loaded.
    claims: by state.
    locks_ignored: by reason, "other_server" or "too_many".
    lock_duration: silence after which a lock may be taken over.
    session_age: since the last heartbeat that succeeded. None while the node holds no lock or has sent no heartbeat.
    api_reachable: whether the API server answers and the locks are watched.
    pod_resources_polls, events_dropped, trace_export_failures, trace_spans_dropped: since the process began.
    """

    version: str
    ready: bool
    registered: Mapping[str, bool] = field(default_factory=dict)
    servers: Mapping[str, bool] = field(default_factory=dict)
    listed: Mapping[str, int] = field(default_factory=dict)
    lists_in_use: Mapping[str, bool] = field(default_factory=dict)
    exports_twice: Mapping[str, bool] = field(default_factory=dict)
    driver_loaded: bool = False
    ports_used: Mapping[str, int] = field(default_factory=dict)
    ports_free: Mapping[str, int] = field(default_factory=dict)
    claims: Mapping[str, int] = field(default_factory=dict)
    locks_held: int = 0
    locks_ignored: Mapping[str, int] = field(default_factory=dict)
    lock_duration: float = 0.0
    session_age: float | None = None
    api_reachable: bool = False
    pod_resources_polls: int = 0
    events_dropped: int = 0
    trace_export_failures: int = 0
    trace_spans_dropped: int = 0


class NodeCollector(Collector):
    """Collector of the metrics that show the state of the node.

    Calls read() once for each scrape, in the thread that renders. read() must be quick and must not raise.
    """

    def __init__(self, read: Callable[[], NodeReading]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        now = self._read()
        build: Labelled = {(now.version, platform.python_version()): 1}
        yield _gauge("build_info", "Always 1. The labels name the versions in use.", ("version", "python"), build)
        yield _one("ready", "1 if /readyz answers 200: locks read, every resource registered.", now.ready)
        yield _by("registered", "1 if the kubelet listens to the resource.", LABEL, now.registered)
        yield _by(
            "server_reachable", "1 if the USB/IP server answers. Absent until it was asked.", "server", now.servers
        )
        text = "Devices in the last answer of the USB/IP server, which leaves out devices in use."
        yield _by("server_devices", text, "server", now.listed)
        text = "1 if the USB/IP server was seen to list a device in use. Its list ends no lock then."
        yield _by("server_lists_in_use", text, "server", now.lists_in_use)
        text = "1 if the USB/IP server was seen to export a device to two clients."
        yield _by("server_exports_twice", text, "server", now.exports_twice)
        yield _one("vhci_driver_loaded", "1 if vhci_hcd is loaded and can be read.", now.driver_loaded)
        yield _by(
            "vhci_ports_used",
            "Ports of vhci_hcd in use, by any program. Absent without the driver.",
            "hub",
            now.ports_used,
        )
        yield _by("vhci_ports_free", "Free ports of vhci_hcd. Absent without the driver.", "hub", now.ports_free)
        yield _by("claims", "Devices that this node has a claim on.", "state", now.claims)
        yield _one("locks_held", "Locks held by this node.", now.locks_held)
        text = "Locks that this node ignores: of servers that it does not use, or too many of one server."
        yield _by("locks_ignored", text, "reason", now.locks_ignored)
        text = "Time without a heartbeat after which another node may take over a lock."
        yield _one("lock_duration_seconds", text, now.lock_duration)
        text = "Time since the API server last accepted a heartbeat, while this node holds a lock."
        yield _gauge("session_age_seconds", text, (), {} if now.session_age is None else {(): now.session_age})
        yield _one("api_reachable", "1 if the API server answers and the locks are watched.", now.api_reachable)
        text = "Comparisons with the kubelet's list of devices in use. None while nothing is attached."
        yield _counter("pod_resources_polls", text, (), {(): now.pod_resources_polls})
        yield _counter(
            "events_dropped", "Kubernetes Events that were dropped or refused.", (), {(): now.events_dropped}
        )
        text = "Batches of spans that no collector accepted."
        yield _counter("trace_export_failures", text, (), {(): now.trace_export_failures})
        text = "Spans that were lost before their export."
        yield _counter("trace_spans_dropped", text, (), {(): now.trace_spans_dropped})


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Labelled) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    return _gauge(name, text, (label,), {(label_value,): value for label_value, value in values.items()})


def _one(name: str, text: str, value: float) -> Metric:
    return _gauge(name, text, (), {(): value})


def _counter(name: str, text: str, labels: tuple[str, ...], values: Labelled, prefix: str = PREFIX) -> Metric:
    family = CounterMetricFamily(prefix + name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


@dataclass(slots=True)
class ResourceCounts:
    """The counts of one resource since it got its series.

    devices: as they are advertised; None before the first list. A scrape counts them.
    failures, pre_start_failures: by reason, one of few; never an error's text.
    """

    devices: tuple[Advertised, ...] | None = None
    allocations: int = 0
    restarts: int = 0
    denials: int = 0
    registrations: int = 0
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    pre_start_failures: collections.Counter[str] = field(default_factory=collections.Counter)


class ResourceCollector(Collector):
    """Collector of the metrics of each resource. All accesses must be in one thread.

    counts: by resource, for the owner to change. The first access to a resource creates its series.
    """

    def __init__(self) -> None:
        self.counts: collections.defaultdict[str, ResourceCounts] = collections.defaultdict(ResourceCounts)

    def collect(self) -> Iterable[Metric]:
        devices = {
            resource: collections.Counter(device.health.reason for device in counts.devices)
            for resource, counts in self.counts.items()
            if counts.devices is not None
        }
        available = {resource: sum(n for reason, n in by.items() if reason.healthy) for resource, by in devices.items()}
        yield _by("available_devices", "Devices that this node offers as Healthy.", LABEL, available)
        attached = {resource: by[Reason.ATTACHED] for resource, by in devices.items()}
        yield _by("attached_devices", "Devices attached to this node.", LABEL, attached)
        text = "Allocates that were answered with devices."
        yield self._counter("allocations", text, lambda counts: counts.allocations)
        # The Go program names it device_plugin_restarts_total and exports it with the prefix.
        text = "Times the resource was registered with the kubelet again, without the first time."
        yield self._counter("restarts", text, lambda counts: counts.restarts)
        yield self._counter("device_plugin_restarts", text, lambda counts: counts.restarts, prefix="")
        reasons: Labelled = {(name, reason.code): by[reason] for name, by in devices.items() for reason in Reason}
        yield _gauge("devices", "Devices by the reason for their health.", (LABEL, "reason"), reasons)
        text = "Allocates refused because another node holds the device. Each is a failed pod."
        yield self._counter("allocate_denials", text, lambda counts: counts.denials)
        text = "Allocates that failed for another reason. Each is a failed pod."
        yield self._failures("allocate_failures", text, lambda counts: counts.failures)
        text = "PreStartContainer calls that failed, so that a container with CDI did not start."
        yield self._failures("pre_start_failures", text, lambda counts: counts.pre_start_failures)
        text = "Registrations that the kubelet accepted and followed by opening ListAndWatch."
        yield self._counter("kubelet_registrations", text, lambda counts: counts.registrations)

    def _counter(self, name: str, text: str, value: Callable[[ResourceCounts], int], prefix: str = PREFIX) -> Metric:
        values: Labelled = {(resource,): value(counts) for resource, counts in self.counts.items()}
        return _counter(name, text, (LABEL,), values, prefix)

    def _failures(self, name: str, text: str, by_reason: Callable[[ResourceCounts], Mapping[str, int]]) -> Metric:
        values: Labelled = {
            (resource, reason): count
            for resource, counts in self.counts.items()
            for reason, count in by_reason(counts).items()
        }
        return _counter(name, text, (LABEL, "reason"), values)


class Metrics:
    """All metrics that /metrics exports. The label "resource" is the full name, domain included.

    A label's values are few and known beforehand, or come from the configuration: never devices, pods or free text.
    Metrics that show the state of another object are not kept here. A collector reads them at each scrape: see add().
    """

    def __init__(self) -> None:
        # avoids the _created series of each counter, which nobody reads; the library has only this global switch
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._resources = ResourceCollector()
        self.registry.register(self._resources)
        self._gauge("tasks", "Tasks of the event loop. Constant when idle.", ()).set_function(_tasks)
        self._steps = self._histogram("step_seconds", "Duration of a step that succeeded.", ("step",))
        self._allocates = self._histogram(
            "allocate_seconds",
            "Duration of an Allocate. The kubelet admits no other pod meanwhile.",
            ("result",),
            ALLOCATE_BUCKETS_S,
        )
        self._withdrawals = self._histogram(
            "withdrawal_seconds",
            "Time from seeing that another node took a device until the kubelet has the change; 1 s if longer.",
            (),
            WITHDRAWAL_BUCKETS_S,
        )
        self._acquires = self._histogram(
            "lock_acquire_seconds", "Time until the lock of a device was acquired or refused.", ("result",)
        )
        self._transitions = self._counter(
            "lock_transitions",
            "Locks that this node took, took over from a silent node, released, or lost to the write of another.",
            ("transition",),
        )
        text = "Attachments that ended although this node did not detach the device."
        self._losses = self._counter("attachments_lost", text, ())
        text = "Attempts to re-attach a lost device. With same_nodes, the pod can go on."
        self._reattaches = self._counter("reattaches", text, ("result",))
        text = "Requests to the API server that failed. conflict, not_found and gone are normal."
        self._api_errors = self._counter("api_errors", text, ("verb", "reason"))
        self._reloads = self._counter("config_reloads", "Reloads of the changed configuration file.", ("result",))
        self._reload_failed = self._gauge(
            "config_reload_failed", "1 while the file is rejected and the last valid configuration is in force.", ()
        )
        self._reloaded_at = self._gauge(
            "config_last_reload_success_timestamp_seconds",
            "Unix time at which the configuration in force was loaded.",
            (),
        )

    def add(self, collector: Collector) -> None:
        self.registry.register(collector)

    def expect(self, *, acquires: Iterable[str], transitions: Iterable[str], reattaches: Iterable[str]) -> None:
        """Creates the counters for label values that will come.

        rate() in Prometheus sees the first increment only of a counter that was exported at 0 before.
        """
        for result in ("allocated", "denied", "failed"):
            self._allocates.labels(result)
        for result in acquires:
            self._acquires.labels(result)
        for transition in transitions:
            self._transitions.labels(transition)
        for result in reattaches:
            self._reattaches.labels(result)
        for result in ("success", "failure"):
            self._reloads.labels(result)

    def expect_resource(self, resource: str, failures: Iterable[str], pre_starts: Iterable[str]) -> None:
        """Creates the counters of a resource. failures, pre_starts: the reasons for which the calls may fail."""
        counted = self._resources.counts[resource]
        for reason in failures:
            counted.failures.setdefault(reason, 0)
        for reason in pre_starts:
            counted.pre_start_failures.setdefault(reason, 0)

    def devices(self, resource: str, devices: tuple[Advertised, ...]) -> None:
        self._resources.counts[resource].devices = devices

    def forget(self, resource: str) -> None:
        """Ends the series of a resource that is no longer offered. If it returns, its counters begin at 0."""
        self._resources.counts.pop(resource, None)

    def allocated(self, resource: str, seconds: float) -> None:
        self._resources.counts[resource].allocations += 1
        self._allocates.labels("allocated").observe(seconds)

    def denied(self, resource: str, seconds: float) -> None:
        self._resources.counts[resource].denials += 1
        self._allocates.labels("denied").observe(seconds)

    def failed(self, resource: str, reason: str, seconds: float) -> None:
        self._resources.counts[resource].failures[reason] += 1
        self._allocates.labels("failed").observe(seconds)

    def pre_start_failed(self, resource: str, reason: str) -> None:
        self._resources.counts[resource].pre_start_failures[reason] += 1

    def registered(self, resource: str, *, again: bool) -> None:
        self._resources.counts[resource].registrations += 1
        self._resources.counts[resource].restarts += again

    def step(self, name: str, seconds: float) -> None:
        """Records how long a step took. name: such as lock, import, attach; never a device or a pod."""
        self._steps.labels(name).observe(seconds)

    def withdrawn(self, seconds: float) -> None:
        self._withdrawals.observe(seconds)

    def acquired(self, result: str, seconds: float) -> None:
        self._acquires.labels(result).observe(seconds)

    def transition(self, name: str) -> None:
        self._transitions.labels(name).inc()

    def attachment_lost(self) -> None:
        self._losses.inc()

    def reattach(self, result: str) -> None:
        self._reattaches.labels(result).inc()

    def api_error(self, verb: str, reason: str) -> None:
        self._api_errors.labels(verb, reason).inc()

    def config_loaded(self, at: float) -> None:
        """Records that the first configuration was loaded, at the start. at: seconds since the epoch."""
        self._reload_failed.set(0)
        self._reloaded_at.set(at)

    def config_reloaded(self, at: float) -> None:
        """Records that a changed configuration was loaded. at: seconds since the epoch."""
        self._reloads.labels("success").inc()
        self.config_loaded(at)

    def config_reload_failed(self) -> None:
        self._reloads.labels("failure").inc()
        self._reload_failed.set(1)

    def render(self) -> Steps[tuple[bytes, str]]:
        """Returns the text for Prometheus and its content type."""
        # imported here: it loads HTTP servers and clients, 1 MiB that a process without scrapes does not need
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415

        parts = []
        for family in self.registry.collect():
            parts.append(generate_latest(_OneFamily(family)))
            yield
        return b"".join(parts), CONTENT_TYPE_LATEST

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = STEP_BUCKETS_S
    ) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)


class _OneFamily(Collector):
    """A collector of one metric, which is rendered in one step."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0
