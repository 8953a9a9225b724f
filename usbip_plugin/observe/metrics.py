"""Prometheus metrics in a registry of their own: what is counted as it happens.

Their names and labels are in docs/metrics.md; four of them are those of the Go program.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client.metrics import Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from usbip_plugin.model import Advertised
from usbip_plugin.observe.by_resource import ResourceCollector

PREFIX = "usbip_device_plugin_"
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ALLOCATE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 30, 60)
"""allocateTimeout may be up to a minute."""
WITHDRAWAL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Everything /metrics shows. The label resource is the full name, domain included.

    Labels have few values that are known beforehand, or come from the configuration: never devices, pods or free text.
    What is a state of something else is not kept here but read when it is asked for: see add().
    """

    def __init__(self) -> None:
        # a second series for each counter, which nobody reads; the library has no other switch
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._resources = ResourceCollector(PREFIX)
        self.registry.register(self._resources)
        self._gauge("tasks", "Tasks of the event loop.", ()).set_function(_tasks)
        self._steps = self._histogram("step_seconds", "Time taken by one step of Allocate or release.", ("step",))
        self._allocates = self._histogram(
            "allocate_seconds", "Time from an Allocate to its outcome.", ("result",), ALLOCATE_BUCKETS_S
        )
        self._withdrawals = self._histogram(
            "withdrawal_seconds",
            "Time from seeing that another node took a device to the kubelet having been told.",
            (),
            WITHDRAWAL_BUCKETS_S,
        )
        self._acquires = self._histogram(
            "lock_acquire_seconds", "Time taken to get, or be refused, the lock of a device.", ("result",)
        )
        self._transitions = self._counter(
            "lock_transitions", "Locks that this node took, took over, released or lost.", ("transition",)
        )
        self._losses = self._counter("attachments_lost", "Attachments that ended without this node's doing.", ())
        self._reattaches = self._counter("reattaches", "Tries to attach a lost device again.", ("result",))
        self._api_errors = self._counter("api_errors", "Requests to the API server that failed.", ("verb", "reason"))
        self._reloads = self._counter("config_reloads", "Changes of the configuration file.", ("result",))
        self._reload_failed = self._gauge(
            "config_reload_failed", "1 while the configuration file cannot be used, else 0.", ()
        )
        self._reloaded_at = self._gauge(
            "config_last_reload_success_timestamp_seconds",
            "When the configuration in force was loaded, since the Unix epoch.",
            (),
        )

    def add(self, collector: Collector) -> None:
        """What is read at each scrape."""
        self.registry.register(collector)

    def expect(
        self, *, results: Iterable[str], acquires: Iterable[str], transitions: Iterable[str], reattaches: Iterable[str]
    ) -> None:
        """The values that labels will have. A counter that exists at 0 can be rated from its first increment."""
        for result in results:
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
        """The counters of a resource exist from now on. failures, pre_starts: what they may fail for."""
        counted = self._resources.of(resource)
        for reason in failures:
            counted.failures.setdefault(reason, 0)
        for reason in pre_starts:
            counted.pre_start_failures.setdefault(reason, 0)

    def devices(self, resource: str, devices: tuple[Advertised, ...]) -> None:
        """The devices of a resource, for the gauges."""
        self._resources.of(resource).devices = devices

    def forget(self, resource: str) -> None:
        """The resource is not offered any more. If it is again one day, its counters begin at 0."""
        self._resources.forget(resource)

    def allocated(self, resource: str) -> None:
        self._resources.of(resource).allocations += 1

    def allocate(self, result: str, seconds: float) -> None:
        self._allocates.labels(result).observe(seconds)

    def denied(self, resource: str) -> None:
        self._resources.of(resource).denials += 1

    def failed(self, resource: str, reason: str) -> None:
        """reason: one of few; never an error's text."""
        self._resources.of(resource).failures[reason] += 1

    def pre_start_failed(self, resource: str, reason: str) -> None:
        """reason: as for failed()."""
        self._resources.of(resource).pre_start_failures[reason] += 1

    def restarted(self, resource: str) -> None:
        self._resources.of(resource).restarts += 1

    def registered(self, resource: str) -> None:
        self._resources.of(resource).registrations += 1

    def step(self, name: str, seconds: float) -> None:
        """name: one of few, such as lock, import, attach; never a device or a pod."""
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
        """At start. at: seconds since the epoch."""
        self._reload_failed.set(0)
        self._reloaded_at.set(at)

    def config_reloaded(self, at: float) -> None:
        self._reloads.labels("success").inc()
        self.config_loaded(at)

    def config_reload_failed(self) -> None:
        self._reloads.labels("failure").inc()
        self._reload_failed.set(1)

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        # imported here: it brings HTTP servers and clients, 1 MiB for who is not scraped
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415

        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        """Exported with the suffix _total."""
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = STEP_BUCKETS_S
    ) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)


def _tasks() -> int:
    """0 where no loop runs."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0
