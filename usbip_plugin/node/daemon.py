"""The process of `usbip-plugin run`: one agent, with its configuration file, HTTP pages and signals."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from usbip_plugin import __version__
from usbip_plugin.attach.cdi import CdiDirectory
from usbip_plugin.attach.events import DeviceEvent, events_of
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.reload import ConfigWatcher, LoadedConfig
from usbip_plugin.config.schema import DEFAULT_ALLOW_EXTRAS, DEFAULT_CDI_DIRECTORY, Config
from usbip_plugin.errors import ConfigError, PluginError
from usbip_plugin.kube.client import connect
from usbip_plugin.kube.events import EventRecorder
from usbip_plugin.kube.fleet import count_pods
from usbip_plugin.kubelet.plugins import SocketRegistrar
from usbip_plugin.kubelet.pod_resources import GrpcPodResources
from usbip_plugin.kubelet.registration import PluginDirectory
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.model import NodeIdentity
from usbip_plugin.node.agent import Agent, AgentDependencies
from usbip_plugin.node.cluster import cluster_of, port_for_others
from usbip_plugin.node.memory import small_tls_buffers, trim_after_start, trim_heap
from usbip_plugin.node.metrics import AgentMetrics, DropCounts
from usbip_plugin.node.products import Products
from usbip_plugin.node.status import config_failed, config_loaded, report_of, status_of
from usbip_plugin.observe.http import HttpServer
from usbip_plugin.observe.liveness import Loop, Verdict, liveness
from usbip_plugin.observe.metrics import Metrics
from usbip_plugin.observe.pages import Site, probe_pages
from usbip_plugin.observe.status import ClusterReport, NodeReport, Report
from usbip_plugin.observe.tracing import Tracing
from usbip_plugin.sync import Steps, leaves
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.vhci.driver import VhciDriver

log = logging.getLogger(__name__)

BEAT_INTERVAL = 2.0
"""Seconds between two heartbeats of the event loop."""
BEAT_WITHIN = 10.0
"""Seconds without a heartbeat of the event loop after which /healthz answers 503."""
START_OVER_S = 10.0
"""Seconds until the memory of the start is released. By then the plugin is idle; code in use is loaded again."""


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of one process, from the command line, the configuration file and the defaults.

    namespace: the namespace of the Leases.
    domain: the domain of the resource names.
    listen: the addresses of all pages, "" for none. probes: those of the pages for probes alone.
    trace_link: as Page has it.
    kubeconfig: its path, None to find the API server as kube.client.connect does.
    allow_extras: as parse_config has it.
    """

    node: str
    namespace: str
    config: Path
    domain: str
    plugin_directory: Path
    pod_resources_socket: Path
    listen: str
    probes: str = ""
    trace_link: str = ""
    kubeconfig: str | None = None
    cdi_directory: Path = Path(DEFAULT_CDI_DIRECTORY)
    allow_extras: Sequence[str] = DEFAULT_ALLOW_EXTRAS


MakeDriver = Callable[[Clock], VhciDriver]
"""Makes the driver of this node's vhci_hcd, which uses the clock."""


def boot_id() -> str:
    """Returns the kernel's boot id, which differs after each boot. Raises OSError if /proc is not mounted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


async def run(options: Options, loaded: LoadedConfig, make_driver: MakeDriver) -> None:
    """Runs until SIGTERM or SIGINT, then ends within 2 s and leaves attachments and locks for the next process.

    Raises ConfigError if it does not find how to reach the API server, OSError if the HTTP address is in use.
    """
    clock = SystemClock()
    metrics = Metrics()
    agent_metrics = AgentMetrics(metrics, clock, domain=options.domain, node=options.node)
    kube = await connect(options.kubeconfig, clock=clock, on_error=agent_metrics.api_error)
    kube.on_large_list = trim_heap
    tracing = Tracing(options.node, version=__version__)
    client = TcpUsbipClient(clock)
    try:
        async with GrpcPodResources(options.pod_resources_socket, options.domain) as pod_resources:
            rng = random.Random()  # noqa: S311 - jitter only
            outside = AgentDependencies(
                me=NodeIdentity(options.node, boot_id()),
                client=client,
                driver=make_driver(clock),
                leases=KubernetesLeases(kube, options.namespace),
                pod_resources=pod_resources,
                specs=CdiDirectory(options.cdi_directory, options.domain),
                kube=kube,
                registrar=SocketRegistrar(PluginDirectory(options.plugin_directory, clock), clock, rng),
                clock=clock,
                rng=rng,
                tracer=tracing.tracer,
                count_nodes=partial(count_pods, kube, options.namespace),
            )
            events = EventRecorder(kube, outside.me, clock, rng)
            await _Process(options, loaded, outside, events, tracing, metrics, agent_metrics).run()
    finally:
        client.close()
        await kube.close()
        tracing.shutdown()


class _Process:
    def __init__(
        self,
        options: Options,
        loaded: LoadedConfig,
        outside: AgentDependencies,
        events: EventRecorder,
        tracing: Tracing,
        metrics: Metrics,
        agent_metrics: AgentMetrics,
    ) -> None:
        self._options = options
        self._clock = clock = outside.clock
        self._loaded = loaded
        self._start_only = loaded.config.start_only()
        self._events = events
        self._metrics = metrics
        self._agent_metrics = agent_metrics
        self._recent = tracing.recent
        self._config_report = config_loaded(options.config, loaded.config, loaded.warnings, clock.now())
        self._started = clock.monotonic()
        self._beat_at: float | None = None
        observer = replace(agent_metrics.observer, on_notice=self._notice)
        self.agent = Agent(outside, loaded.config, domain=options.domain, observer=observer)
        self._products = Products(self.agent.claims)
        losses = DropCounts(
            events_dropped=lambda: events.dropped,
            trace_export_failures=lambda: tracing.export_failures,
            trace_spans_dropped=lambda: tracing.spans_dropped,
        )
        agent_metrics.follow(self.agent, losses)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        watcher = ConfigWatcher(
            self._options.config,
            partial(parse_config, allow_extras=self._options.allow_extras, node=self._options.node),
            self._clock,
            self._reconfigure,
            self._config_failed,
            initial=self._loaded,
        )
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self.agent.run(), name="agent"),
                tasks.create_task(watcher.run(), name="configuration"),
                tasks.create_task(self._events.run(), name="events"),
                tasks.create_task(self._beat(), name="heartbeat"),
                tasks.create_task(self._settle(), name="settling"),
            ]
            running += [tasks.create_task(server.run(), name="HTTP") for server in self._http()]
            log.info("running", extra={"version": __version__, "node": self._options.node})
            await stop.wait()
            log.info("stopping; attachments and locks stay for the next process")
            for task in running:
                task.cancel()

    def _http(self) -> Iterable[HttpServer]:
        """Yields the servers. The probes have one of their own: the peers of the other pages cannot make them fail."""
        probes, names = probe_pages(self._alive, self._ready), (self._options.node,)
        if self._options.probes:
            yield HttpServer(self._options.probes, probes, self._clock, names=names)
        if self._options.listen:
            site = Site(
                self._status,
                self._cluster,
                self._metrics.render,
                self._recent,
                self._clock,
                trace_link=self._options.trace_link,
            )
            pages = {**probes, **site.pages()}
            yield HttpServer(self._options.listen, pages, self._clock, below=site.below(), names=names)

    async def _beat(self) -> None:
        while True:
            self._beat_at = self._clock.monotonic()
            await self._clock.sleep(BEAT_INTERVAL)

    async def _settle(self) -> None:
        await self._clock.sleep(START_OVER_S)
        try:
            trim_after_start()
        except OSError as error:
            log.debug("startup memory not released", extra={"cause": str(error)})
        else:
            log.debug("startup memory released")

    def _alive(self) -> Verdict:
        loops = {"event loop": Loop(self._beat_at, BEAT_WITHIN), **self.agent.loops()}
        return liveness(loops, self._clock.monotonic())

    def _ready(self) -> Verdict:
        if self.agent.ready:
            return Verdict(ok=True)
        plugins = self.agent.resources.plugins.values()
        lines = [f"{p.resource}: not registered: {p.error or 'waiting'}" for p in plugins if not p.registered]
        if not self.agent.locks.ready.is_set():
            lines.append(f"locks not read: {self.agent.locks.api.error or 'waiting'}")
        return Verdict(ok=False, lines=tuple(lines))

    def _report(self) -> Report:
        return report_of(
            node=self._options.node,
            clock=self._clock,
            started=self._started,
            ready=self._ready(),
            alive=self._alive(),
        )

    def _status(self) -> Steps[NodeReport]:
        return status_of(
            self.agent,
            self._report(),
            domain=self._options.domain,
            now=self._clock.now(),
            monotonic=self._clock.monotonic(),
            config=self._config_report,
            products=self._products,
            events=tuple(self._events.recent),
        )

    def _cluster(self) -> Steps[ClusterReport]:
        return cluster_of(
            self.agent,
            self._report(),
            domain=self._options.domain,
            now=self._clock.now(),
            monotonic=self._clock.monotonic(),
            products=self._products,
            port=port_for_others(self._options.listen),
        )

    def _notice(self, notice: DeviceEvent) -> None:
        self._agent_metrics.notice(notice)
        for text, pod in events_of(notice):
            self._events.record(text, pod)

    def _reconfigure(self, config: Config, warnings: tuple[str, ...]) -> None:
        _warn(warnings)
        self._agent_metrics.config_reloaded()
        self._config_report = config_loaded(self._options.config, config, warnings, self._clock.now())
        before, self._start_only = self._start_only, config.start_only()
        for name, value in self._start_only.items():
            if before[name] != value:
                extra = {"setting": name, "in_force": self._loaded.config.start_only()[name], "in_file": value}
                log.warning("setting not applied; restart the plugin", extra=extra)
        self.agent.reconfigure(config)
        log.info("configuration reloaded", extra={"resources": [resource.name for resource in config.resources]})

    def _config_failed(self, error: ConfigError) -> None:
        self._agent_metrics.config_failed()
        self._config_report = config_failed(self._config_report, error, self._clock.now())
        for problem in error.problems:
            log.error("configuration not valid, the last valid one stays in use", extra={"problem": problem})


def run_blocking(options: Options, loaded: LoadedConfig, make_driver: MakeDriver) -> int:
    """Runs the plugin until a signal. Returns 0, or logs why the plugin cannot run and returns 1."""
    _warn(loaded.warnings)
    small_tls_buffers()
    status = 0
    try:
        asyncio.run(run(options, loaded, make_driver))
    except* (PluginError, OSError) as errors:
        for error in leaves(errors):
            log.critical("cannot run", extra={"cause": str(error)})
        status = 1
    return status


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        log.warning("configuration warning", extra={"problem": warning})
