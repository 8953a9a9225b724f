"""Prometheus metrics in a registry of their own. The first four have the names and labels of the Go program."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from usbip_plugin.model import Reason

STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Everything /metrics shows. The label resource is the full name, domain included."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        label = ("resource",)
        self._available = self._gauge("usbip_device_plugin_available_devices", "Devices offered as healthy.", label)
        self._attached = self._gauge("usbip_device_plugin_attached_devices", "Devices attached to this node.", label)
        self._gauge("usbip_device_plugin_tasks", "asyncio tasks of the process.", ()).set_function(_tasks)
        self._allocations = self._counter(
            "usbip_device_plugin_allocations", "Containers that were given their devices.", label
        )
        # The Go program names it device_plugin_restarts_total and exports it with the prefix.
        restarts = "Times the plugin of a resource was served and registered anew."
        self._restarts = self._counter("usbip_device_plugin_restarts", restarts, label)
        self._restarts_unprefixed = self._counter("device_plugin_restarts", restarts, label)
        self._by_reason = self._gauge(
            "usbip_device_plugin_devices", "Devices by the reason they are advertised as they are.", (*label, "reason")
        )
        self._steps = Histogram(
            "usbip_device_plugin_step_seconds",
            "Time taken by one step of Allocate or release.",
            ("step",),
            buckets=STEP_BUCKETS_S,
            registry=self.registry,
        )
        self._reload_failed = self._gauge(
            "usbip_device_plugin_config_reload_failed", "1 while the configuration file cannot be used.", ()
        )

    def devices(self, resource: str, reasons: Mapping[Reason, int]) -> None:
        """The devices of a resource, counted by reason; sets the gauges."""
        self._available.labels(resource).set(sum(count for reason, count in reasons.items() if reason.healthy))
        self._attached.labels(resource).set(reasons.get(Reason.ATTACHED, 0))
        for reason in Reason:
            self._by_reason.labels(resource, reason.name.lower()).set(reasons.get(reason, 0))
        # a counter that exists at 0 can be rated from its first increment
        self._allocations.labels(resource)
        self._restarts.labels(resource)
        self._restarts_unprefixed.labels(resource)

    def allocated(self, resource: str, containers: int = 1) -> None:
        self._allocations.labels(resource).inc(containers)

    def restarted(self, resource: str) -> None:
        self._restarts.labels(resource).inc()
        self._restarts_unprefixed.labels(resource).inc()

    def step(self, name: str, seconds: float) -> None:
        """name: one of few, such as lock, import, attach; never a device or a pod."""
        self._steps.labels(name).observe(seconds)

    def config_reload(self, *, failed: bool) -> None:
        self._reload_failed.set(1 if failed else 0)

    def forget(self, resource: str) -> None:
        """The resource is not configured any more. Its counters stay, as counters must."""
        with contextlib.suppress(KeyError):  # never counted
            self._available.remove(resource)
            self._attached.remove(resource)
            for reason in Reason:
                self._by_reason.remove(resource, reason.name.lower())

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        """Exported with the suffix _total."""
        return Counter(name, text, labels, registry=self.registry)


def _tasks() -> int:
    """0 where no loop runs."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0
