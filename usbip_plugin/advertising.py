"""Keeps what the inventory says in front of the kubelet, the scheduler and the operator.

Changes come from six sides: servers, locks, claims, ports, the API server, the configuration. Each only says "look
again"; one evaluation per turn of the event loop answers all of them, and only differences go out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Protocol

from opentelemetry.trace import SpanKind, Tracer
from opentelemetry.util.types import AttributeValue

from usbip_plugin import inventory
from usbip_plugin.attacher import Attacher
from usbip_plugin.claims import Claim
from usbip_plugin.clock import Clock
from usbip_plugin.config import Config, OnLoss, ResourceConfig
from usbip_plugin.errors import PluginError, VhciError
from usbip_plugin.inventory import API_GRACE, RESET_GRACE, Api, Driver, Facts, Members, Seen
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.node_status import NodeStatusPublisher, allocatable
from usbip_plugin.locks.manager import LockChange, LockManager
from usbip_plugin.model import Advertised, Descriptor, DeviceKey, Health, NodeIdentity, ServerKey
from usbip_plugin.observe.tracing import remote_parent, within
from usbip_plugin.spans import device_attributes, failed, span, untraced
from usbip_plugin.usbip.poller import ServerPoller, ServerView
from usbip_plugin.vhci.driver import VhciDriver
from usbip_plugin.vhci.sysfs import PortStatus

log = logging.getLogger(__name__)

RPC: Mapping[str, AttributeValue] = {"rpc.system.name": "grpc", "rpc.method": "v1beta1.DevicePlugin/ListAndWatch"}
SENT_TIMEOUT = 1.0
"""Seconds a withdrawal's span waits at most for the kubelet to be told."""
KEPT_SHARE, KEPT_MAX_S = 0.1, 1.0
"""Of allocateTimeout, for what follows a failure: kubelet and Node are told, and the Allocate answers."""
TELLING_SHARE = 0.8
"""Of that, for the telling."""
PORTS_SETTLE = 0.1
"""Seconds in which uevents are gathered before the free ports are counted: one device makes a dozen of them."""
PORTS_INTERVAL = 30.0
"""Seconds between looks at the free ports when no uevent says to look."""
GRACE_MARGIN = 0.01
"""Seconds after the end of the API grace at which it is looked at."""
PROBE_RETRY = 10.0
"""Seconds before a serial number that could not be read is asked for again."""


def time_kept(config: Config) -> float:
    """Seconds of allocateTimeout that the work on devices leaves for Advertiser.denied and the answer."""
    return min(KEPT_MAX_S, KEPT_SHARE * config.allocate_timeout)


class Publish(Protocol):
    """Told what one resource advertises whenever that changes; nothing, when it is not offered any more."""

    def __call__(self, resource: str, devices: tuple[Advertised, ...], /) -> None: ...


class Advertiser:
    """The one place that knows what this node offers. All methods belong to one event loop; `run` must be running."""

    def __init__(
        self,
        *,
        me: NodeIdentity,
        config: Config,
        domain: str,
        attacher: Attacher,
        locks: LockManager,
        poller: ServerPoller,
        driver: VhciDriver,
        node_status: NodeStatusPublisher | None,
        clock: Clock,
        tracer: Tracer,
        on_advertised: Publish,
        on_withdrawn: Callable[[float], None],
    ) -> None:
        """on_withdrawn: seconds from seeing that another node took a device until a listening kubelet was told."""
        self._me = me
        self._config = config
        self._domain = domain
        self._attacher = attacher
        self._locks = locks
        self._poller = poller
        self._driver = driver
        self._node_status = node_status
        self._clock = clock
        self._tracer = tracer
        self._on_advertised = on_advertised
        self._on_withdrawn = on_withdrawn
        self._former: dict[str, ResourceConfig] = {}
        self._servers: dict[str, DevicePluginServer] = {}
        self._members: Members = {}
        self._advertised: Mapping[str, tuple[Advertised, ...]] = {}
        self._ports = Driver()
        self._ports_event = asyncio.Event()
        self._api_event = asyncio.Event()
        self._probes: dict[str, ServerKey] = {}
        self._probed_last: dict[ServerKey, str] = {}
        self._probe_failures: dict[str, str] = {}
        self._released: dict[str, float] = {}
        self._scheduled = False
        self._ready = False
        self._tasks: asyncio.TaskGroup | None = None

    # what others ask

    @property
    def advertised(self) -> Mapping[str, tuple[Advertised, ...]]:
        """By resource name without the domain, as last told to the kubelet."""
        return self._advertised

    @property
    def config(self) -> Config:
        return self._config

    @property
    def ports(self) -> Driver:
        """The driver and its ports, as last read."""
        return self._ports

    def health(self) -> Mapping[str, Health]:
        """By device ID. Of a device that several resources offer, as the one that can have it."""
        found: dict[str, Health] = {}
        for devices in self._advertised.values():
            for device in devices:
                if device.id not in found or not found[device.id].healthy:
                    found[device.id] = device.health
        return found

    def claimed(self) -> frozenset[str]:
        """Resources, by name without the domain, of which this node has a device."""
        claims = self._attacher.claims
        return frozenset(name for name, devices in self._members.items() if any(i in claims for i in devices))

    def lookup(self, resource: str) -> tuple[ResourceConfig, Mapping[str, Seen]] | None:
        """A resource, by its full name, and the devices it offers."""
        name = self._short(resource)
        config = next((r for r in self._config.resources if r.name == name), self._former.get(name))
        return None if config is None else (config, self._members.get(name, {}))

    def on_loss(self, claim: Claim) -> OnLoss:
        """What its resource wants done when it comes back under other device nodes.

        A claim that was adopted does not know its resource: then the first that offers the device decides.
        """
        for name, devices in self._members.items():
            if claim.resource == name or (claim.resource is None and claim.id in devices):
                found = self.lookup(f"{self._domain}/{name}")
                return found[0].on_loss if found is not None else OnLoss.KEEP
        return OnLoss.KEEP

    # what others tell

    def attach_server(self, server: DevicePluginServer) -> None:
        """From now on this device-plugin server is told what its resource advertises."""
        self._servers[server.resource] = server
        self._publish_one(server)

    def detach_server(self, resource: str) -> None:
        self._servers.pop(resource, None)
        self._former.pop(self._short(resource), None)
        if self._node_status is not None:
            self._node_status.forget(resource)

    def kubelet_gone(self, resource: str) -> None:
        """The kubelet forgot this resource and writes 0 for it: nothing is published until it listens again."""
        if self._node_status is not None:
            self._node_status.forget(resource)

    def reconfigure(self, config: Config) -> None:
        """A new configuration: held devices stay offered, as they were configured, until they are let go."""
        self._former.update({resource.name: resource for resource in self._config.resources})
        self._config = config
        self._poller.set_servers(config.servers())
        self.look_again()

    def ready(self) -> None:
        """What a previous process left has been adopted: from now on lists are complete enough to be sent."""
        self._ready = True
        self._evaluate()

    def look_again(self, _device_id: str = "") -> None:
        """Something changed; what is advertised is worked out anew before the event loop turns again."""
        if not self._scheduled and self._tasks is not None:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._evaluate_if_due)

    def server_changed(self, _view: ServerView) -> None:
        """For the poller: a server's list or state changed."""
        self._locks.set_importable(inventory.importable(self._poller.views))
        self.look_again()

    async def denied(self, resource: str) -> None:
        """Before a failed Allocate answers: kubelet and Node are to know what it failed of. Within time_kept.

        Otherwise the scheduler sends the replacement straight back here (measured: up to 51 failed pods).
        """
        self._evaluate()
        server = self._servers.get(resource)
        if server is None:
            return
        limit = TELLING_SHARE * time_kept(self._config)
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(limit):
                await server.wait_sent()
                if self._node_status is not None and server.announced:
                    await self._node_status.publish_now({resource: self._count(resource)}, limit)

    # work

    async def run(self) -> None:
        """Until cancelled."""
        undo = [
            self._locks.subscribe(self._lock_changed),
            self._locks.subscribe_api(lambda _state: self._api_event.set()),
            self._driver.subscribe(self._ports_event.set),
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._watch_ports(), name="free ports")
                tasks.create_task(self._watch_api(), name="API grace")
                self.look_again()
        finally:
            self._tasks = None
            for unsubscribe in undo:
                unsubscribe()

    async def _watch_ports(self) -> None:
        while True:
            if self._ports_event.is_set():
                await self._clock.sleep(PORTS_SETTLE)
            self._ports_event.clear()
            before, self._ports = self._ports, await self._read_ports()
            if self._ports != before:
                self.look_again()
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(PORTS_INTERVAL):
                    await self._ports_event.wait()

    async def _read_ports(self) -> Driver:
        try:
            ports = await self._driver.ports()
        except VhciError as error:
            return Driver(str(error), 0, 0)
        free = [port.hub for port in ports if port.status is PortStatus.NULL]
        used = [port.hub for port in ports if port.status is not PortStatus.NULL]
        return Driver(None, free.count("hs"), free.count("ss"), used.count("hs"), used.count("ss"))

    async def _watch_api(self) -> None:
        """An API server that stays away becomes a reason when the grace is over, without anything else happening."""
        while True:
            self._api_event.clear()
            self.look_again()
            if self._locks.api.reachable:
                await self._api_event.wait()
                continue
            left = API_GRACE - (self._clock.monotonic() - self._locks.api.since)
            # a moment past the end: a timer may fire a rounding error early, and would then be set again for nothing
            wait = left + GRACE_MARGIN if left > 0 else PORTS_INTERVAL
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(wait):
                    await self._api_event.wait()

    def _lock_changed(self, change: LockChange) -> None:
        old = change.old.holder if change.old is not None else ""
        new = change.new.holder if change.new is not None else ""
        if old != new and new not in ("", self._me.node) and self._offered(change.device_id):
            self._spawn(self._withdraw(change, self._clock.monotonic()))
        elif old != new and new == "" and change.new is not None:
            self._released[change.device_id] = self._clock.monotonic()
            self._spawn(self._after_release(change))
        self.look_again()

    async def _withdraw(self, change: LockChange, seen_at: float) -> None:
        """Another node took a device: this joins its trace, up to the moment the kubelet has been told."""
        lock = change.new
        assert lock is not None  # noqa: S101 - the caller looked
        key = inventory.key_of(lock)
        attributes = device_attributes(key) if key is not None else {}
        attributes["usbip.device.id"] = change.device_id
        attributes.update({"usbip.lock.holder": lock.holder, "usbip.lock.epoch": lock.epoch})
        context = remote_parent(lock.traceparent)
        with span(self._tracer, "withdraw", attributes, context=context, kind=SpanKind.CONSUMER):
            self._evaluate_if_due()
            for server in [s for name, s in self._servers.items() if self._offers(name, change.device_id)]:
                await self._sent(server)
                if server.open_streams:
                    self._on_withdrawn(self._clock.monotonic() - seen_at)

    async def _sent(self, server: DevicePluginServer) -> None:
        """The part of a withdrawal that is the kubelet's: it ends when the new list is written to its stream."""
        attributes = {**RPC, "usbip.resource": server.resource, "usbip.streams": server.open_streams}
        with span(self._tracer, "ListAndWatch", attributes, kind=SpanKind.PRODUCER) as sent:
            try:
                async with self._clock.timeout(SENT_TIMEOUT):
                    await server.wait_sent()
            except TimeoutError as error:
                failed(sent, error)

    async def _after_release(self, change: LockChange) -> None:
        """A device was let go: its server is asked at once and when the reset is over; then its list counts again."""
        since = self._released[change.device_id]
        key = inventory.key_of(change.new) if change.new is not None else None
        if key is not None:
            self._poller.poke(key.server)
        await self._clock.sleep(RESET_GRACE)
        if self._released.get(change.device_id) == since:
            del self._released[change.device_id]
        self.look_again()

    async def _probe(self, key: DeviceKey, descriptor: Descriptor) -> None:
        try:
            # tried every few seconds for as long as it takes: only the first failure of a kind is told
            with untraced() if key.id in self._probe_failures else contextlib.nullcontext():
                await self._attacher.probe(key, descriptor)
            self._probe_failures.pop(key.id, None)
        except PluginError as error:
            if self._probe_failures.get(key.id) != str(error):
                self._probe_failures[key.id] = str(error)
                log.warning("serial number not read yet", extra={"device": str(key), "cause": str(error)})
            await self._clock.sleep(PROBE_RETRY)
        finally:
            self._probes.pop(key.id, None)
            self.look_again()

    # evaluation

    def facts(self) -> Facts:
        """What is known now."""
        api = self._locks.api
        gone = None if api.reachable else self._clock.monotonic() - api.since
        return Facts(
            me=self._me.node,
            config=self._config,
            servers=self._poller.views,
            locks=self._locks.locks,
            standings={i: self._locks.standing(i) for i in self._locks.locks},
            claims=self._attacher.claims,
            moved_here=self._attacher.moved_here,
            driver=self._ports,
            api=Api(gone, api.error or ""),
            released=frozenset(self._released),
        )

    def _evaluate_if_due(self) -> None:
        """Unless what was to be looked at has been looked at meanwhile."""
        if self._scheduled:
            self._evaluate()

    def _evaluate(self) -> None:
        self._scheduled = False
        if self._tasks is None:
            return
        facts = self.facts()
        self._members = inventory.learn(self._members, facts)
        before, self._advertised = self._advertised, inventory.advertise(self._members, facts)
        for name, devices in self._advertised.items():
            if devices != before.get(name):
                self._log_changes(name, before.get(name, ()), devices)
                self._on_advertised(name, devices)
        for name in before.keys() - self._advertised.keys():
            self._on_advertised(name, ())
        for server in self._servers.values():
            self._publish_one(server)
        if facts.api.unreachable_for is None:
            wanted = inventory.wanting_serial(facts)
            for key, descriptor in inventory.next_probes(wanted, self._probes, self._probed_last):
                self._probes[key.id], self._probed_last[key.server] = key.server, key.id
                self._spawn(self._probe(key, descriptor))

    def _publish_one(self, server: DevicePluginServer) -> None:
        if not self._ready:
            return
        server.publish(self._advertised.get(self._short(server.resource), ()))
        if self._node_status is not None and server.announced:
            self._node_status.publish({server.resource: self._count(server.resource)})

    def _count(self, resource: str) -> int:
        return allocatable(self._advertised.get(self._short(resource), ()))

    def _short(self, resource: str) -> str:
        """A resource's name in the configuration."""
        return resource.removeprefix(f"{self._domain}/")

    def _offers(self, resource: str, device_id: str) -> bool:
        return device_id in self._members.get(self._short(resource), {})

    def _offered(self, device_id: str) -> bool:
        return any(device_id in devices for devices in self._members.values())

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        try:
            if self._tasks is not None:
                self._tasks.create_task(work)
                return
        except RuntimeError:  # the plugin is being stopped, and the group takes no more
            log.debug("not begun, stopping")
        work.close()

    def _log_changes(self, resource: str, before: tuple[Advertised, ...], after: tuple[Advertised, ...]) -> None:
        known: Mapping[str, Advertised] = {device.id: device for device in before}
        for device in after:
            old, lock = known.get(device.id), self._locks.locks.get(device.id)
            if old is not None and old.health.reason is device.health.reason:
                continue
            extra = {
                "resource": resource,
                "device": str(device.key),
                "reason": device.health.reason.value,
                "detail": device.health.detail,
            }
            # this may have been called on account of another device: each line belongs to the trace of its own
            with within(lock.traceparent if lock is not None else None):
                if device.health.healthy:
                    log.info("healthy", extra=extra)
                else:
                    log.info("unhealthy", extra=extra)
