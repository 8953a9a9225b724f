"""The process of `usbip-plugin export`: the exporter with its configuration file, HTTP pages and signals."""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from usbip_plugin import __version__
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.export import ExportConfig, parse_export
from usbip_plugin.config.reload import ConfigWatcher, Loaded
from usbip_plugin.errors import ConfigError, PluginError
from usbip_plugin.exporter.binder import RETRY_S, Binder
from usbip_plugin.exporter.exports import Exports, ImportResult
from usbip_plugin.exporter.gate import Gate, OpenGate
from usbip_plugin.exporter.host import HostDevices
from usbip_plugin.exporter.metrics import ExporterCounts, ExporterMetrics, ExporterReading
from usbip_plugin.exporter.notify import READY, STOPPING, ServiceNotifier
from usbip_plugin.exporter.report import ExportedRow, ExportState, exported_rows
from usbip_plugin.exporter.server import Dropped, ExportServer, bind_sockets
from usbip_plugin.exporter.state import Export, StateFile
from usbip_plugin.exporter.sysfs import SysfsHost
from usbip_plugin.observe.http import Answer, HttpServer, PageHandler
from usbip_plugin.observe.listen import split_listen
from usbip_plugin.observe.liveness import Loop, Verdict, liveness
from usbip_plugin.observe.pages import JSON, Paced, probe_pages
from usbip_plugin.sync import leaves, start_task
from usbip_plugin.vhci.uevents import NetlinkUevents

log = logging.getLogger(__name__)

BEAT_INTERVAL_S = 2.0
"""Seconds between two heartbeats of the event loop, to /healthz and to systemd's watchdog."""
BEAT_WITHIN_S = 10.0
"""Seconds without a heartbeat of the event loop after which /healthz answers 503."""
START_OVER_S = 10.0
"""Seconds until the memory of the start is released. By then the exporter is idle; code in use is loaded again."""


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of one process, from the command line.

    listen: the address for USB/IP clients. http: the address of the HTTP server, "" for none.
    namespace, kubeconfig: where the fence reads the Leases. after_start: releases memory that only the start needed.
    """

    config: Path
    listen: str
    http: str
    namespace: str
    kubeconfig: str | None
    sysfs: Path
    state_directory: Path
    after_start: Callable[[], None]


def make_host(options: Options, clock: Clock) -> HostDevices:
    """Returns the devices of this host. Raises HostError if none can be bound here."""
    host = SysfsHost(clock, NetlinkUevents(clock, RETRY_S), sysfs=options.sysfs)
    host.check()
    return host


async def make_gate(options: Options, config: ExportConfig, port: int, clock: Clock) -> Gate:
    """Returns the gate that the file asks for. port: that of the listening sockets. Raises ConfigError."""
    if not config.fence:
        return OpenGate()
    from usbip_plugin.exporter import fence  # noqa: PLC0415 - the client of the API server takes memory

    return await fence.make_gate(
        config, port=port, kubeconfig=options.kubeconfig, namespace=options.namespace, clock=clock
    )


async def run(options: Options, loaded: Loaded[ExportConfig]) -> None:
    """Runs until SIGTERM or SIGINT, then ends within 2 s. Leaves devices bound, and connections to the kernel.

    Raises HostError if no device can be bound here, ListenFailed, ConfigError if the fence cannot be set up, and
    OSError if the HTTP address is in use.
    """
    clock = SystemClock()
    host = make_host(options, clock)
    sockets = bind_sockets(*split_listen(options.listen))
    try:
        gate = await make_gate(options, loaded.config, sockets[0].getsockname()[1], clock)
        await _Process(options, loaded, host, gate, sockets, clock).run()
    finally:
        for sock in sockets:
            sock.close()


class _Process:
    def __init__(
        self,
        options: Options,
        loaded: Loaded[ExportConfig],
        host: HostDevices,
        gate: Gate,
        sockets: Sequence[socket.socket],
        clock: Clock,
    ) -> None:
        self._options, self._loaded, self._host, self._gate, self._clock = options, loaded, host, gate, clock
        self._in_file = loaded.config.start_only()
        self._counts = ExporterCounts()
        self._metrics = ExporterMetrics(__version__, self._counts, self._reading)
        self._beat_at: float | None = None
        self._notifier = ServiceNotifier(os.environ)
        self._binder = Binder(host, clock, loaded.config.export)
        state = StateFile(options.state_directory)
        self._exports = Exports(host, self._binder, gate, state, clock, on_import=self._on_import, on_end=self._on_end)
        self._server = ExportServer(sockets, self._exports, clock, loaded.config.allow, self._on_drop)
        self._http = HttpServer(options.http, self._pages(), clock) if options.http else None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        self._watcher = ConfigWatcher(
            self._options.config, parse_export, self._clock, self._reconfigure, self._config_failed, self._loaded
        )
        async with asyncio.TaskGroup() as tasks:
            loop.add_signal_handler(signal.SIGHUP, lambda: start_task(tasks, self._reload(), name="reload"))
            running = [
                tasks.create_task(self._host.run(), name="devices"),
                tasks.create_task(self._gate.run(), name="gate"),
                tasks.create_task(self._binder.run(), name="binder"),
                tasks.create_task(self._exports.run(), name="exports"),
                tasks.create_task(self._serve(), name="server"),
                tasks.create_task(self._watcher.run(), name="configuration"),
                tasks.create_task(self._beat(), name="heartbeat"),
                tasks.create_task(self._settle(), name="settling"),
            ]
            if self._http is not None:
                running.append(tasks.create_task(self._http.run(), name="HTTP"))
            await stop.wait()
            log.info("stopping; devices stay bound, connections stay with the kernel")
            self._notifier.send(STOPPING)
            for task in running:
                task.cancel()

    async def _serve(self) -> None:
        await self._exports.ready.wait()
        if self._http is not None:
            await self._http.started.wait()
        self._server.listen()
        extra = {"version": __version__, "listen": self._options.listen, "devices": sorted(self._binder.exported)}
        log.info("running", extra=extra)
        self._notifier.send(READY, self._status())
        await self._server.run()

    async def _beat(self) -> None:
        status = ""
        while True:
            self._beat_at = self._clock.monotonic()
            self._notifier.alive()
            if self._exports.ready.is_set() and status != (status := self._status()):
                self._notifier.send(status)
            await self._clock.sleep(BEAT_INTERVAL_S)

    def _status(self) -> str:
        return f"STATUS={len(self._binder.exported)} devices exported, {len(self._exports.current)} in use"

    async def _settle(self) -> None:
        await self._clock.sleep(START_OVER_S)
        try:
            self._options.after_start()
        except OSError as error:
            log.debug("startup memory not released", extra={"cause": str(error)})

    async def _reload(self) -> None:
        self._notifier.reloading()
        await self._watcher.check()
        self._notifier.send(READY)

    def _reconfigure(self, config: ExportConfig, warnings: tuple[str, ...]) -> None:
        _warn(warnings)
        self._counts.reloads["success"] += 1
        self._counts.reload_failed = False
        before, self._in_file = self._in_file, config.start_only()
        for name, value in self._in_file.items():
            if before[name] != value:
                extra = {"setting": name, "in_force": self._loaded.config.start_only()[name], "in_file": value}
                log.warning("setting not applied; restart the exporter", extra=extra)
        self._server.allow = config.allow
        self._binder.reconfigure(config.export)
        log.info("configuration reloaded", extra={"selectors": [str(selector) for selector in config.export]})

    def _config_failed(self, error: ConfigError) -> None:
        self._counts.reloads["failure"] += 1
        self._counts.reload_failed = True
        for problem in error.problems:
            log.error("configuration not valid, the last valid one stays in use", extra={"problem": problem})

    def _on_import(self, result: ImportResult) -> None:
        self._counts.imports[result] += 1

    def _on_end(self, _export: Export) -> None:
        self._counts.ended += 1

    def _on_drop(self, why: Dropped) -> None:
        self._counts.refused[why] += 1

    def _pages(self) -> dict[str, PageHandler]:
        pages: dict[str, PageHandler] = {
            "/metrics": lambda: Answer(*self._metrics.render()),
            "/exported": self._exported,
        }
        probes = probe_pages(self._alive, self._ready)
        return {**probes, **{path: Paced(page, self._clock) for path, page in pages.items()}}

    def _alive(self) -> Verdict:
        return liveness({"event loop": Loop(self._beat_at, BEAT_WITHIN_S)}, self._clock.monotonic())

    def _ready(self) -> Verdict:
        ready = self._exports.ready.is_set()
        return Verdict(ok=ready, lines=() if ready else ("devices are being bound",))

    def _exported(self) -> Answer:
        found = {
            "running": True,
            "version": __version__,
            "listen": self._options.listen,
            "fence": self._loaded.config.fence,
            "fence_problem": self._gate.problem(),
            "unmatched": [str(selector) for selector in self._binder.unmatched],
            "devices": [asdict(row) for row in self._rows()],
        }
        return Answer(json.dumps(found, indent=1).encode() + b"\n", JSON)

    def _rows(self) -> tuple[ExportedRow, ...]:
        binder = self._binder
        statuses = {device.busid: self._host.status(device.busid) for device in binder.devices if device.is_bound}
        return exported_rows(binder.devices, statuses, self._exports.current, binder.problems, binder.exported)

    def _reading(self) -> ExporterReading:
        states = collections.Counter(ExportState(row.state) for row in self._rows())
        return ExporterReading(states, len(self._binder.unmatched), self._gate.problem() is not None)


def run_blocking(options: Options, loaded: Loaded[ExportConfig]) -> int:
    """Runs the exporter until a signal. Returns 0, or logs why it cannot run and returns 1."""
    _warn(loaded.warnings)
    status = 0
    try:
        asyncio.run(run(options, loaded))
    except* (PluginError, OSError) as errors:
        for error in leaves(errors):
            log.critical("cannot run", extra={"cause": str(error)})
        status = 1
    return status


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        log.warning("configuration warning", extra={"problem": warning})
