"""Metrics of each resource: some fifty series, which the library would keep as objects with a lock each, 31 KiB."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from usbip_plugin.model import Advertised, Reason

LABEL = "resource"


@dataclass(slots=True)
class OfResource:
    """What is counted of one resource.

    devices: as they are advertised, None before the first list. They are counted when somebody asks.
    failures, pre_start_failures: by reason, one of few; never an error's text.
    """

    devices: tuple[Advertised, ...] | None = None
    allocations: int = 0
    restarts: int = 0
    denials: int = 0
    registrations: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    pre_start_failures: Counter[str] = field(default_factory=Counter)


class ResourceCollector(Collector):
    """prefix: of the names, but for that of the Go program. In one thread."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._resources: dict[str, OfResource] = {}

    def of(self, resource: str) -> OfResource:
        """To count in. From now on the resource has series."""
        found = self._resources.get(resource)
        if found is None:
            found = self._resources[resource] = OfResource()
        return found

    def forget(self, resource: str) -> None:
        """Its series end. If it comes again one day, its counters begin at 0."""
        self._resources.pop(resource, None)

    def collect(self) -> Iterable[Metric]:
        devices = {
            resource: Counter(device.health.reason for device in of.devices)
            for resource, of in self._resources.items()
            if of.devices is not None
        }
        yield self._gauge(
            "available_devices",
            "Devices offered as healthy.",
            {resource: sum(n for reason, n in by.items() if reason.healthy) for resource, by in devices.items()},
        )
        yield self._gauge(
            "attached_devices",
            "Devices attached to this node.",
            {resource: by[Reason.ATTACHED] for resource, by in devices.items()},
        )
        yield self._count("allocations", "Allocates that were answered with devices.", lambda of: of.allocations)
        # The Go program names it device_plugin_restarts_total and exports it with the prefix.
        text = "Times the plugin of a resource was served and registered anew."
        yield self._count("restarts", text, lambda of: of.restarts)
        yield self._count("device_plugin_restarts", text, lambda of: of.restarts, prefix="")
        by_reason = GaugeMetricFamily(
            f"{self._prefix}devices",
            "Devices by the reason they are advertised as they are.",
            labels=(LABEL, "reason"),
        )
        for resource, by in devices.items():
            for reason in Reason:
                by_reason.add_metric((resource, reason.name.lower()), by[reason])
        yield by_reason
        yield self._count(
            "allocate_denials", "Allocates refused because another node holds the device.", lambda of: of.denials
        )
        yield self._failed("allocate_failures", "Allocates that failed for another reason.", lambda of: of.failures)
        yield self._failed(
            "pre_start_failures",
            "PreStartContainer calls that failed: containers that were not started.",
            lambda of: of.pre_start_failures,
        )
        yield self._count(
            "kubelet_registrations",
            "Registrations that the kubelet accepted and listens to.",
            lambda of: of.registrations,
        )

    def _gauge(self, name: str, text: str, values: Mapping[str, int]) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=(LABEL,))
        for resource, value in values.items():
            family.add_metric((resource,), value)
        return family

    def _count(self, name: str, text: str, value: Callable[[OfResource], int], prefix: str | None = None) -> Metric:
        """Exported with the suffix _total."""
        family = CounterMetricFamily((self._prefix if prefix is None else prefix) + name, text, labels=(LABEL,))
        for resource, of in self._resources.items():
            family.add_metric((resource,), value(of))
        return family

    def _failed(self, name: str, text: str, values: Callable[[OfResource], Mapping[str, int]]) -> Metric:
        """The same by reason."""
        family = CounterMetricFamily(self._prefix + name, text, labels=(LABEL, "reason"))
        for resource, of in self._resources.items():
            for reason, value in values(of).items():
                family.add_metric((resource, reason), value)
        return family
