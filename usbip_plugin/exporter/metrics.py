"""The metrics of the exporter. Events are counted as they happen; states are read at each scrape."""

from __future__ import annotations

import collections
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from usbip_plugin.exporter.exports import ImportResult
from usbip_plugin.exporter.report import ExportState
from usbip_plugin.exporter.server import Dropped

PREFIX = "usbip_exporter_"
"""Precedes the names of the metrics."""
RELOADS = ("success", "failure")


@dataclass(slots=True)
class ExporterCounts:
    """What has happened since the process began."""

    imports: collections.Counter[ImportResult] = field(default_factory=collections.Counter)
    refused: collections.Counter[Dropped] = field(default_factory=collections.Counter)
    ended: int = 0
    reloads: collections.Counter[str] = field(default_factory=collections.Counter)
    reload_failed: bool = False


@dataclass(frozen=True, slots=True)
class ExporterReading:
    """The state of the exporter. devices: how many, by state. gate_problem: whether the fence cannot read the locks."""

    devices: Mapping[ExportState, int]
    unmatched: int = 0
    gate_problem: bool = False


class ExporterMetrics(Collector):
    """All metrics of the exporter, in a registry of their own. read() must be quick and must not raise."""

    def __init__(self, version: str, counts: ExporterCounts, read: Callable[[], ExporterReading]) -> None:
        self._version, self._counts, self._read = version, counts, read
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        now, counts = self._read(), self._counts
        build = GaugeMetricFamily(
            PREFIX + "build_info", "Always 1. The labels name the versions in use.", labels=("version", "python")
        )
        build.add_metric((self._version, platform.python_version()), 1)
        yield build
        devices = {state.value: now.devices.get(state, 0) for state in ExportState}
        yield _by(GaugeMetricFamily, "devices", "Devices that are bound to usbip-host, or should be.", "state", devices)
        yield _one(
            GaugeMetricFamily, "unmatched_selectors", "Selectors in the file that match no device.", now.unmatched
        )
        imports = {result.value: counts.imports[result] for result in ImportResult}
        yield _by(CounterMetricFamily, "imports", "Imports by their result.", "result", imports)
        refused = {why.value: counts.refused[why] for why in Dropped}
        text = "Connections that did not get the answer they wanted."
        yield _by(CounterMetricFamily, "connections_refused", text, "reason", refused)
        text = "Exports that the fence ended because the lock had gone to another holder."
        yield _one(CounterMetricFamily, "exports_ended", text, counts.ended)
        text = "1 while the fence cannot read the locks."
        yield _one(GaugeMetricFamily, "fence_problem", text, now.gate_problem)
        reloads = {result: counts.reloads[result] for result in RELOADS}
        text = "Reloads of the changed configuration file."
        yield _by(CounterMetricFamily, "config_reloads", text, "result", reloads)
        text = "1 while the file is rejected and the last valid configuration is in force."
        yield _one(GaugeMetricFamily, "config_reload_failed", text, counts.reload_failed)

    def render(self) -> tuple[bytes, str]:
        """Returns the text for Prometheus and its content type."""
        # imported here: it loads HTTP servers and clients, 1 MiB that a process without scrapes does not need
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


_Family: TypeAlias = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _by(family: _Family, name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    metric = family(PREFIX + name, text, labels=(label,))
    for value, count in values.items():
        metric.add_metric((value,), count)
    return metric


def _one(family: _Family, name: str, text: str, value: int) -> Metric:
    return family(PREFIX + name, text, value=value)
