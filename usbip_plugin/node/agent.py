"""The composition root: makes the parts of one node's agent and runs them in one TaskGroup. It has no other logic."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from opentelemetry.trace import Tracer

from usbip_plugin.attach.attachments import Attachments
from usbip_plugin.attach.cdi import CdiSpecs, SpecFiles
from usbip_plugin.attach.events import DeviceEvent, Reattach, evicted
from usbip_plugin.claims import ClaimBook
from usbip_plugin.clock import Clock
from usbip_plugin.config.schema import Config
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import PluginError
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.inventory.probe import Prober
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kube.eviction import Evictor
from usbip_plugin.kube.fleet import Fleet, FleetCount
from usbip_plugin.kube.node_status import NodeStatusPublisher, WriteCounts, patch_status
from usbip_plugin.kube.pods import OwnPods, PodView
from usbip_plugin.kubelet.allocate import Allocator
from usbip_plugin.kubelet.plugins import Plugin, PluginSet, Registrar
from usbip_plugin.kubelet.pod_resources import PodResources, PodResourcesWatcher
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.locks.manager import Acquired, LockManager, LockSettings
from usbip_plugin.locks.protocol import Rules
from usbip_plugin.locks.record import LeaseStore
from usbip_plugin.model import Advertised, NodeIdentity, PodRef
from usbip_plugin.observe.liveness import STUCK_S, Loop
from usbip_plugin.sync import done_within
from usbip_plugin.usbip.client import UsbipClient
from usbip_plugin.usbip.poller import ServerPoller, share
from usbip_plugin.vhci.driver import VhciDriver

log = logging.getLogger(__name__)

LOCKS_WAIT = 5.0
"""Seconds that the first device lists for the kubelet wait for the locks. Then they are published without them."""


@dataclass(frozen=True, slots=True)
class MetricHooks:
    """Callbacks that turn what happens in an agent into metrics. By default they do nothing.

    on_step(step, seconds): a step of an attach or a release ended.
    on_result(resource, error, seconds): an Allocate ended; error is None if it succeeded.
    on_pre_start_failed(resource, error): a PreStartContainer failed.
    on_advertised(name, devices): a resource, named without the domain, advertises other devices; () if it is removed.
    on_plugin(plugin): the registration of a resource with the kubelet changed, or the resource was removed.
    on_notice(event): something happened to a device.
    on_acquire(result, seconds): an attempt to take a lock ended.
    on_withdrawn(seconds): a device was withdrawn from the kubelet, so long after this node saw another node take it.
    on_reattach(result): an attempt to re-attach a device ended.
    """

    on_step: Callable[[str, float], None] = lambda _step, _seconds: None
    on_result: Callable[[str, PluginError | None, float], None] = lambda _resource, _error, _seconds: None
    on_pre_start_failed: Callable[[str, PluginError], None] = lambda _resource, _error: None
    on_advertised: Callable[[str, tuple[Advertised, ...]], None] = lambda _resource, _devices: None
    on_plugin: Callable[[Plugin], None] = lambda _plugin: None
    on_notice: Callable[[DeviceEvent], None] = lambda _notice: None
    on_acquire: Callable[[Acquired, float], None] = lambda _result, _seconds: None
    on_withdrawn: Callable[[float], None] = lambda _seconds: None
    on_reattach: Callable[[Reattach], None] = lambda _result: None


@dataclass(frozen=True, slots=True)
class AgentDependencies:
    """Everything outside the process that a node's agent works with.

    pods: the pods of the node; None to watch them through kube.
    evict(pod, cause): begins the eviction of a pod; None to evict through kube.
    write_counts: writes allocatable counts on the Node; None to write them through kube.
    count_nodes: returns the nodes that run the plugin, raises KubeError if they are not known; None for one node.
    """

    me: NodeIdentity
    client: UsbipClient
    driver: VhciDriver
    leases: LeaseStore
    pod_resources: PodResources
    specs: SpecFiles
    kube: KubeClient | None
    registrar: Registrar
    clock: Clock
    rng: random.Random
    tracer: Tracer
    pods: PodView | None = None
    evict: Callable[[PodRef, str], None] | None = None
    write_counts: WriteCounts | None = None
    count_nodes: Callable[[], Awaitable[Fleet]] | None = None


class Agent:
    """The agent of one node: all its parts, made in the order in which they depend on one another."""

    def __init__(
        self,
        outside: AgentDependencies,
        config: Config,
        *,
        domain: str,
        lock_settings: LockSettings | None = None,
        lock_rules: Rules | None = None,
        observer: MetricHooks | None = None,
    ) -> None:
        """Makes the parts of the agent. Nothing runs before run(). domain: the domain of the resource names."""
        out, observer = outside, observer or MetricHooks()
        context = NodeContext(out.me, out.clock, out.rng, out.tracer)
        self._clock = out.clock
        self._on_notice = observer.on_notice
        self.claims = ClaimBook()
        self.driver = out.driver
        self.fleet = FleetCount(out.count_nodes, out.clock, out.rng) if out.count_nodes is not None else None
        self.poller = ServerPoller(out.client, out.clock, out.rng, fleet=self.fleet)
        self.locks = LockManager(
            out.leases,
            out.me,
            out.clock,
            out.rng,
            lock_settings or LockSettings(duration=config.lock.duration),
            out.tracer,
            lock_rules,
            self.poller.export_state,
            observer.on_acquire,
            is_claimed=lambda device_id: device_id in self.claims.view,
        )
        self.inventory = Inventory(
            context,
            config,
            claims=self.claims,
            locks=self.locks,
            poller=self.poller,
            driver=out.driver,
            fleet=lambda: self.fleet.fleet if self.fleet is not None else Fleet(1),
        )
        # devices in use
        self.evictor = (
            Evictor(out.kube, out.clock, out.rng, self._uses_device, self._evicted)
            if out.kube is not None and out.evict is None
            else None
        )
        self.attachments = Attachments(
            context,
            claims=self.claims,
            client=out.client,
            driver=out.driver,
            locks=self.locks,
            poller=self.poller,
            resources=self.inventory,
            specs=CdiSpecs(out.specs, domain, self.inventory),
            events=observer.on_notice,
            evict=out.evict or (self.evictor.evict if self.evictor is not None else lambda _pod, _cause: None),
            on_step=observer.on_step,
            on_reattach=observer.on_reattach,
            on_outcome=self.inventory.allocate_ended,
        )
        # the kubelet
        write_counts = out.write_counts or (partial(patch_status, out.kube, out.me.node) if out.kube else None)
        self.node_status = (
            NodeStatusPublisher(write_counts, out.clock, out.rng, nodes=lambda: self.fleet.nodes if self.fleet else 1)
            if write_counts is not None and config.publish_node_status
            else None
        )
        self.publisher = KubeletPublisher(
            context,
            inventory=self.inventory,
            locks=self.locks,
            node_status=self.node_status,
            on_advertised=observer.on_advertised,
            on_withdrawn=observer.on_withdrawn,
        )
        # nothing calls the prober: it subscribes to the inventory
        self.prober = Prober(
            context, inventory=self.inventory, poller=self.poller, probe=self.attachments.locator.probe
        )
        self.own_pods = (
            OwnPods(out.kube, out.me.node, out.clock, out.rng, lambda *_: self.usage.pod_may_have_ended())
            if out.kube is not None and out.pods is None
            else None
        )
        self.usage = PodResourcesWatcher(
            context,
            pod_resources=out.pod_resources,
            pods=out.pods or self.own_pods,
            locks=self.locks,
            claims=self.claims,
            usage=self.attachments.usage,
            adopter=self.attachments.adopter,
            domain=domain,
        )
        self.allocator = Allocator(
            context,
            domain=domain,
            attacher=self.attachments.attacher,
            monitor=self.attachments.monitor,
            usage=self.attachments.usage,
            claims=self.claims,
            inventory=self.inventory,
            users=self.usage,
            publisher=self.publisher,
            events=observer.on_notice,
            on_result=observer.on_result,
            on_pre_start_failed=observer.on_pre_start_failed,
        )
        self.resources = PluginSet(
            context,
            domain=domain,
            allocator=self.allocator,
            claims=self.claims,
            inventory=self.inventory,
            publisher=self.publisher,
            registrar=out.registrar,
            on_state=observer.on_plugin,
        )

    @property
    def ready(self) -> bool:
        """Returns whether the locks have been read and every resource, if any, is registered with the kubelet."""
        plugins = self.resources.plugins.values()
        started = bool(plugins) or not self.inventory.config.resources
        return self.locks.ready.is_set() and started and all(plugin.registered for plugin in plugins)

    def loops(self) -> Mapping[str, Loop]:
        """Returns the loops without which devices are not attached or released, by name."""
        seldom = 2 * share(self.fleet.nodes if self.fleet is not None else 1)  # polls of many nodes take turns
        polls = {f"polls of {s}": Loop(at, STUCK_S + seldom) for s, at in self.poller.polled_at.items()}
        return {
            "list of locks": Loop(self.locks.list_began_at),
            "list of pods": Loop(self.own_pods.turned_at if self.own_pods is not None else None),
            "session": Loop(self.locks.session.turned_at),
            "pod-resources": Loop(self.usage.turned_at),
            "vhci ports": Loop(self.inventory.ports_read_at),
            **polls,
        }

    def reconfigure(self, config: Config) -> None:
        """Puts a reloaded configuration in force, except for the settings that Config.start_only() names."""
        self.inventory.reconfigure(config)
        self.resources.look_again()

    async def run(self) -> None:
        """Runs until cancelled, then closes its sockets within 2 s. Attachments and locks stay for the next process."""
        async with asyncio.TaskGroup() as tasks:
            for part in (self.driver, self.locks, self.poller):
                tasks.create_task(part.run(), name=type(part).__name__)
            tasks.create_task(self.attachments.run(), name="Attacher")
            tasks.create_task(self.inventory.run(), name="Advertiser")
            for optional in (self.fleet, self.node_status, self.own_pods, self.evictor):
                if optional is not None:
                    tasks.create_task(optional.run(), name=type(optional).__name__)
            tasks.create_task(self.resources.run(), name="resources")
            tasks.create_task(self._begin(tasks), name="begin")

    async def _begin(self, tasks: asyncio.TaskGroup) -> None:
        await done_within(self._clock, LOCKS_WAIT, self.locks.ready.wait())
        if not self.locks.ready.is_set():
            log.warning("the locks could not be read yet", extra={"cause": self.locks.api.error})
        await self.attachments.started()
        await self.usage.adopt()
        self.publisher.begin()
        self.resources.look_again()
        tasks.create_task(self.usage.run(), name="usage")
        await self.locks.ready.wait()  # before that, it is not known for which devices CDI specs are needed
        await self.usage.adopt()
        self.attachments.sweep()

    def _uses_device(self, pod: PodRef) -> bool:
        return any(claim.pod == pod for claim in self.claims.view.values())

    def _evicted(self, pod: PodRef, cause: str) -> None:
        self._on_notice(evicted(pod, cause))
