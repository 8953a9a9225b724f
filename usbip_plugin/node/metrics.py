"""The metrics of one node, from the callbacks of its agent (MetricHooks) and from the agent's state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from usbip_plugin import __version__, errors
from usbip_plugin.attach.events import DeviceEvent, EventKind, Reattach
from usbip_plugin.claims import ClaimState
from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeError, LockHeld, PluginError
from usbip_plugin.kubelet.plugins import Plugin
from usbip_plugin.locks.manager import Acquired
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Advertised
from usbip_plugin.node.agent import Agent, MetricHooks
from usbip_plugin.observe.metrics import Metrics, NodeCollector, NodeReading
from usbip_plugin.usbip.poller import ServerFlaw, ServerState

OTHER = "other"
"""The label of an error without a label of its own."""
ALLOCATE_FAILURES: Mapping[type[PluginError], str] = MappingProxyType(
    {
        errors.LockLost: "lock_lost",
        errors.LockUnavailable: "lock_unavailable",
        errors.ServerUnreachable: "server_unreachable",
        errors.ServerTimeout: "server_timeout",
        errors.MalformedReply: "malformed_reply",
        errors.DeviceBusy: "device_busy",
        errors.DeviceUnknown: "not_exported",
        errors.ImportRefused: "import_refused",
        errors.WrongDevice: "wrong_device",
        errors.WrongSerial: "wrong_serial",
        errors.DriverMissing: "no_driver",
        errors.DriverNotWritable: "driver_not_writable",
        errors.PortsExhausted: "no_port",
        errors.AttachRefused: "attach_refused",
        errors.AttachStuck: "attach_stuck",
        errors.HubRefused: "hub",
        errors.InterfacesRefused: "interfaces",
        errors.NodesMissing: "nodes_missing",
        errors.DetachFailed: "detach_failed",
        errors.RecordNotWritable: "record_not_writable",
        errors.CdiError: "cdi_not_writable",
        errors.UnknownDevice: "unknown_device",
        errors.AllocateTimeout: "timeout",
        errors.ClaimBusy: "claim_busy",
        errors.PathTaken: "path_taken",
    }
)
"""The label of each error that an Allocate can fail with."""
PRE_START_FAILURES: Mapping[type[PluginError], str] = MappingProxyType(
    {
        errors.NotAttached: "not_attached",
        errors.DriverMissing: "no_driver",
        errors.DriverNotWritable: "driver_not_writable",
        errors.CdiError: "cdi_not_writable",
    }
)
"""The label of each error that a PreStartContainer can fail with."""
API_ERRORS: Mapping[type[PluginError], str] = MappingProxyType(
    {
        errors.KubeUnreachable: "unreachable",
        errors.KubeUnauthorized: "unauthorized",
        errors.KubeForbidden: "forbidden",
        errors.KubeNotFound: "not_found",
        errors.KubeConflict: "conflict",
        errors.KubeGone: "gone",
        errors.KubeMisdirected: "misdirected",
        errors.KubeThrottled: "throttled",
        errors.KubeServerError: "server_error",
    }
)
"""The label of each error that a request to the API server can fail with."""
TRANSITIONS = ("taken", "taken_over", "released", "lost")
"""The labels of the transitions of a lock."""


def reason_of(error: PluginError, reasons: Mapping[type[PluginError], str]) -> str:
    """Returns the label of an error's class or of its nearest base class that has one, else OTHER."""
    return next((reasons[kind] for kind in type(error).__mro__ if kind in reasons), OTHER)


def transition(change: LockChange, me: str, *, in_use: bool) -> str | None:
    """Returns the transition (one of TRANSITIONS) that a change of a lock means for the node `me`.

    Returns None if only other nodes are concerned, or if `me` keeps the lock in the same epoch.
    in_use: a pod's device is attached here under this lock, or was until a moment ago. The node does not release such
    a lock, so it counts as lost if it has no holder any more.
    """
    if change.holder == me:
        epoch = change.old.epoch if change.old is not None else None
        if change.former == me and change.new is not None and epoch == change.new.epoch:
            return None
        return "taken_over" if change.former not in ("", me) else "taken"
    if change.former != me:
        return None
    return "released" if change.new is not None and change.holder == "" and not in_use else "lost"


@dataclass(frozen=True, slots=True)
class DropCounts:
    """Counters of dropped Events, failed trace exports and dropped spans, since the process began."""

    events_dropped: Callable[[], int] = lambda: 0
    trace_export_failures: Callable[[], int] = lambda: 0
    trace_spans_dropped: Callable[[], int] = lambda: 0


class AgentMetrics:
    """Metrics of an agent: `observer` has the callbacks, follow() adds the state. domain: that of resource names."""

    def __init__(self, metrics: Metrics, clock: Clock, *, domain: str, node: str) -> None:
        self._metrics = metrics
        self._clock = clock
        self._domain = domain
        self._node = node
        self._agent: Agent | None = None
        metrics.expect(
            acquires=[result.value for result in Acquired],
            transitions=TRANSITIONS,
            reattaches=[result.value for result in Reattach],
        )
        metrics.config_loaded(clock.now().timestamp())

    @property
    def observer(self) -> MetricHooks:
        """Returns the callbacks for an agent. Whoever replaces on_notice must call notice() too."""
        metrics = self._metrics
        return MetricHooks(
            on_step=metrics.step,
            on_result=self._allocated,
            on_pre_start_failed=self._pre_start_failed,
            on_advertised=self._advertised,
            on_plugin=self._plugin_changed,
            on_notice=self.notice,
            on_acquire=lambda result, seconds: metrics.acquired(result.value, seconds),
            on_withdrawn=metrics.withdrawn,
            on_reattach=lambda result: metrics.reattach(result.value),
        )

    def follow(self, agent: Agent, losses: DropCounts) -> None:
        """Adds the state of this agent to the metrics from now on. Must be called only once."""
        self._agent = agent
        self._metrics.add(NodeCollector(lambda: self._read(agent, losses)))
        agent.locks.subscribe(self._lock_changed)

    def notice(self, notice: DeviceEvent) -> None:
        if notice.what is EventKind.LOST:
            self._metrics.attachment_lost()

    def api_error(self, error: KubeError) -> None:
        """Counts a failed API request: the on_error callback of kube.client.connect."""
        self._metrics.api_error(error.verb, reason_of(error, API_ERRORS))

    def config_reloaded(self) -> None:
        self._metrics.config_reloaded(self._clock.now().timestamp())

    def config_failed(self) -> None:
        self._metrics.config_reload_failed()

    def _allocated(self, resource: str, error: PluginError | None, seconds: float) -> None:
        if error is None:
            self._metrics.allocated(resource, seconds)
        elif isinstance(error, LockHeld):
            self._metrics.denied(resource, seconds)
        else:
            self._metrics.failed(resource, reason_of(error, ALLOCATE_FAILURES), seconds)

    def _pre_start_failed(self, resource: str, error: PluginError) -> None:
        self._metrics.pre_start_failed(resource, reason_of(error, PRE_START_FAILURES))

    def _advertised(self, resource: str, devices: tuple[Advertised, ...]) -> None:
        agent = self._agent
        full = f"{self._domain}/{resource}"
        if not devices and agent is not None and all(r.name != resource for r in agent.inventory.config.resources):
            self._metrics.forget(full)
        else:
            self._metrics.devices(full, devices)

    def _plugin_changed(self, plugin: Plugin) -> None:
        resource, agent = plugin.resource, self._agent
        if agent is not None and resource not in agent.resources.plugins:
            self._metrics.forget(resource)
            return
        failures, pre_starts = (*ALLOCATE_FAILURES.values(), OTHER), (*PRE_START_FAILURES.values(), OTHER)
        self._metrics.expect_resource(resource, failures, pre_starts)
        if plugin.registered:
            self._metrics.registered(resource, again=plugin.registrations > 1)

    def _lock_changed(self, change: LockChange) -> None:
        agent = self._agent
        if agent is None or not agent.locks.ready.is_set():
            return  # the first list has the locks that the previous process took
        claim = agent.claims.view.get(change.device_id)
        in_use = claim is not None and claim.state in (ClaimState.ATTACHED, ClaimState.REATTACHING, ClaimState.LOST)
        name = transition(change, self._node, in_use=in_use)
        if name is not None:
            self._metrics.transition(name)

    def _read(self, agent: Agent, losses: DropCounts) -> NodeReading:
        views = {str(s): v for s, v in agent.poller.views.items() if v.state is not ServerState.PENDING}
        driver = agent.inventory.ports
        loaded = driver.error is None
        claims = Counter(claim.state for claim in agent.claims.view.values())
        held = len(agent.locks.mine())
        beat = agent.locks.session.written_at
        return NodeReading(
            version=__version__,
            ready=agent.ready,
            registered={name: plugin.registered for name, plugin in agent.resources.plugins.items()},
            servers={name: view.state is ServerState.REACHABLE for name, view in views.items()},
            listed={name: len(view.devices) for name, view in views.items()},
            lists_in_use={name: view.lists_in_use for name, view in views.items()},
            exports_twice={name: ServerFlaw.EXPORTS_TWICE in view.flaws for name, view in views.items()},
            driver_loaded=loaded,
            ports_used={"hs": driver.used_hs, "ss": driver.used_ss} if loaded else {},
            ports_free={"hs": driver.free_hs, "ss": driver.free_ss} if loaded else {},
            claims={state.value.lower(): claims[state] for state in ClaimState if state is not ClaimState.FREE},
            locks_held=held,
            locks_ignored={
                "other_server": agent.locks.ignored.foreign,
                "too_many": agent.locks.ignored.excess,
            },
            lock_duration=agent.locks.settings.duration,
            session_age=self._clock.monotonic() - beat if held and beat is not None else None,
            api_reachable=agent.locks.api.reachable,
            pod_resources_polls=agent.usage.polls,
            events_dropped=losses.events_dropped(),
            trace_export_failures=losses.trace_export_failures(),
            trace_spans_dropped=losses.trace_spans_dropped(),
        )
