"""Keeps up to date which devices this node offers, and why each is available or unavailable.

A change of servers, locks, claims, ports, the API server or the configuration only schedules an evaluation: one in a
turn of the event loop, for all changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping

from usbip_plugin.claims import Claim, ClaimBook
from usbip_plugin.config.schema import Config, ResourceConfig
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import PluginError, is_device_failure
from usbip_plugin.inventory.conditions import Conditions
from usbip_plugin.inventory.evaluate import Evaluation, Lists, OverlapWarnings, advertise, evaluate_part, restrict
from usbip_plugin.inventory.failures import FailureTracker
from usbip_plugin.inventory.handover import HandoverTracker, ProbeLimiter, ReplacedDevices
from usbip_plugin.inventory.members import FORGET_AFTER, held_as, update_absent, update_offered
from usbip_plugin.inventory.snapshot import OfferedDevice, OfferedDevices, PortSummary, Snapshot
from usbip_plugin.inventory.turns import Turns
from usbip_plugin.kube.fleet import Fleet
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import DeviceKey, Health
from usbip_plugin.sync import done_within, start_task
from usbip_plugin.usbip.poller import ServerPoller, ServerView
from usbip_plugin.vhci.driver import VhciDriver

LOCKS_WAIT = 5.0
"""Longest time in seconds for which new servers wait for their locks. Then they are polled without them."""
FORGET_INTERVAL = 3600.0
"""Seconds between two evaluations, without any change, that find the devices to forget."""


class Inventory:
    """The devices that this node offers, by resource, each with its health.

    All methods belong to one event loop. The inventory is evaluated only while `run()` runs.
    """

    def __init__(
        self,
        context: NodeContext,
        config: Config,
        *,
        claims: ClaimBook,
        locks: LockManager,
        poller: ServerPoller,
        driver: VhciDriver,
        fleet: Callable[[], Fleet],
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self.config = config
        self._claims = claims
        self._locks = locks
        self._poller = poller
        self._subscribers: list[Callable[[Evaluation], None]] = []
        self._taken_subscribers: list[Callable[[LockChange, float], Coroutine[object, object, None]]] = []
        self.advertised: Lists = {}
        """The devices that each resource advertises, by resource name without the domain, as last evaluated."""
        self._former: dict[str, ResourceConfig] = {}
        self._members: OfferedDevices = {}
        self._absent: Mapping[str, float] = {}
        self._moved: set[str] = set()
        self._conditions = Conditions(context, driver=driver, locks=locks, on_change=self.invalidate)
        self._handovers = HandoverTracker(
            context, locks=locks, poller=poller, spawn=self.spawn, on_trusted=self.invalidate
        )
        self._turns = Turns(context, fleet=fleet, spawn=self.spawn, on_turn=self.invalidate)
        self._probe_limiter = ProbeLimiter()
        self._replaced_devices = ReplacedDevices(self._probe_limiter)
        self._failures = FailureTracker(context, on_pause_end=self.invalidate)
        self._overlap_warnings = OverlapWarnings()
        self._scheduled = False
        self._due: set[str] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        locks.follow(config.servers())
        poller.set_servers(config.servers())
        poller.subscribe(self._server_changed)
        claims.subscribe(self._claim_changed)

    def subscribe(self, callback: Callable[[Evaluation], None]) -> None:
        """Calls callback, synchronously, after each evaluation, in the order of subscribing."""
        self._subscribers.append(callback)

    def subscribe_taken(self, callback: Callable[[LockChange, float], Coroutine[object, object, None]]) -> None:
        """Runs callback(change, seen_at) in a task when another node has taken a device that is offered here.

        seen_at: seconds, monotonic. The change is evaluated before the task resumes from its first await.
        """
        self._taken_subscribers.append(callback)

    @property
    def ports(self) -> PortSummary:
        """Returns the state of vhci_hcd and its ports, as last read."""
        return self._conditions.ports

    @property
    def ports_read_at(self) -> float | None:
        """Returns when the ports were last about to be read (monotonic seconds), None before the first time."""
        return self._conditions.ports_read_at

    def health(self) -> Mapping[str, Health]:
        """Returns the health of each device by device ID; of several resources, a healthy one is preferred."""
        healths: dict[str, Health] = {}
        for devices in self.advertised.values():
            for device in devices:
                if device.id not in healths or not healths[device.id].healthy:
                    healths[device.id] = device.health
        return healths

    def offered(self) -> Mapping[str, bool]:
        """Returns the resources to register, by name without the domain, and whether each is handed out by CDI.

        These are the resources of the configuration, and those of which a pod has a device: without a resource's
        plugin, the kubelet does not restart the containers that use the resource.
        """
        claims = self._claims.view
        held = {c.resource: bool(c.container_indexes) for c in claims.values() if c.resource is not None}
        configured = {resource.name for resource in self.config.resources}
        for name, devices in self._members.items():
            if name not in configured and any(held_as(claims, i, name) for i in devices):
                held[name] = self._former[name].cdi if name in self._former else held.get(name, False)
        return held | {resource.name: resource.cdi for resource in self.config.resources}

    def lookup(self, name: str) -> tuple[ResourceConfig, Mapping[str, OfferedDevice]] | None:
        """Returns a resource, by its name without the domain, and the devices that it offers, by device ID.

        Returns None if no configuration has the resource, neither the present nor a former one with devices in use.
        """
        config = self.resource_named(name)
        return None if config is None else (config, self._members.get(name, {}))

    def resource_named(self, name: str) -> ResourceConfig | None:
        return next((r for r in self.config.resources if r.name == name), self._former.get(name))

    def resource_of(self, claim: Claim) -> ResourceConfig:
        """Returns the claim's resource. For an adopted claim without one, the first resource that offers the device."""
        name = claim.resource if claim.resource is not None else next(iter(self.offering(claim.id)), "")
        return self.resource_named(name) or ResourceConfig(name, ())

    def offering(self, device_id: str) -> list[str]:
        """Returns the names, without the domain, of the resources that offer the device."""
        return [name for name, devices in self._members.items() if device_id in devices]

    def snapshot(self, device_ids: Collection[str] | None = None) -> Snapshot:
        """Returns what is known now. `locks`, `lock_statuses` and `released` only of these devices; None for all."""
        locks = self._locks.locks
        if device_ids is not None:
            locks = {i: locks[i] for i in device_ids if i in locks}
        now = self._clock.monotonic()
        return Snapshot(
            me=self._me.node,
            config=self.config,
            servers=self._poller.views,
            locks=locks,
            lock_statuses={i: self._locks.lock_status(i) for i in locks},
            claims=self._claims.view,
            moved_here=self._claims.moved_here,
            driver=self._conditions.ports,
            api=self._conditions.api,
            released=self._handovers.released(device_ids),
            awaited=self._turns.awaited(device_ids),
            probe_limited=self._probe_limiter.probe_limited(now),
            replaced=self._replaced_devices.now(self._locks.locks),
            paused=self._failures.paused(self._poller.views, self._is_in_hand),
            forgotten=frozenset(i for i, since in self._absent.items() if now - since >= FORGET_AFTER),
        )

    def allocate_ended(self, key: DeviceKey, error: PluginError | None, seconds: float) -> None:
        """Learns from the outcome of an Allocate for one device, which took so many seconds."""
        if error is None:  # the claim is attached, which is evaluated in any case
            self._failures.succeeded(key.id)
        elif is_device_failure(error):
            self._failures.failed(key, self._me.node, str(error), seconds)
            self.invalidate(key.id)

    def _is_in_hand(self, device_id: str) -> bool:
        """Returns whether a node has the device, or its server may still reset it: its list entry proves nothing."""
        lock = self._locks.locks.get(device_id)
        held = lock is not None and lock.holder != ""
        return held or device_id in self._claims.view or bool(self._handovers.released((device_id,)))

    def reconfigure(self, config: Config) -> None:
        """Applies a new configuration. Held devices stay offered, as they were configured, until they are released."""
        self._former.update({resource.name: resource for resource in self.config.resources})
        self.config = config
        servers, polled = config.servers(), self._poller.views.keys()
        self._locks.follow(servers)
        if servers <= polled or self._tasks is None:
            self._poller.set_servers(servers)
        else:
            self._poller.set_servers(servers & polled)
            self.spawn(self._add_servers())
        self.invalidate()

    async def _add_servers(self) -> None:
        """Polls new servers as soon as their locks are known, so that no locked device is offered."""
        servers = self.config.servers()
        await done_within(self._clock, LOCKS_WAIT, self._locks.followed(servers))
        if servers == self.config.servers():  # else a later configuration has its own task
            self._poller.set_servers(servers)

    def invalidate(self, device_id: str | None = None) -> None:
        """Schedules an evaluation for the next turn of the event loop.

        device_id: the device of which only the lock or the claim has changed; None to evaluate everything.
        """
        if device_id is None:
            self._due = None
        elif self._due is not None:
            self._due.add(device_id)
        if not self._scheduled and self._tasks is not None:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.evaluate_if_due)

    def _claim_changed(self, device_id: str) -> None:
        """A claim affects its own device only, unless the device is, or was until now, attached from another bus ID."""
        claim, was_moved = self._claims.get(device_id), device_id in self._moved
        self._moved.discard(device_id)
        if claim is not None and claim.moved_to is not None:
            self._moved.add(device_id)
        self.invalidate(None if was_moved or device_id in self._moved else device_id)

    def _server_changed(self, view: ServerView) -> None:
        now = self._clock.monotonic()
        self._replaced_devices.server_changed(view, self._locks.locks, self._handovers.released(), now)
        self._handovers.servers_changed(view)
        self.invalidate()

    async def run(self) -> None:
        """Evaluates the inventory after changes. Runs until cancelled."""
        unsubscribe = self._locks.subscribe(self._lock_changed)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._conditions.run(), name="ports and API server")
                tasks.create_task(self._failures.run(), name="failed Allocates")
                while True:
                    self.invalidate()
                    await self._clock.sleep(FORGET_INTERVAL)
        finally:
            self._tasks = None
            unsubscribe()

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Runs work in a task that ends with run(). If run() is not running, closes work without starting it."""
        start_task(self._tasks, work)

    def _lock_changed(self, change: LockChange) -> None:
        before, after = (lock.read_from if lock is not None else None for lock in (change.old, change.new))
        if None not in (before, after) and before != after:
            self._probe_limiter.note(change.device_id, self._clock.monotonic())
        self._handovers.lock_changed(change)
        self._turns.lock_changed(change)
        if self.offering(change.device_id):
            self._failures.lock_changed(change)
        taken = change.holder != change.former and change.holder not in ("", self._me.node)
        if taken and self.offering(change.device_id):
            now = self._clock.monotonic()
            for callback in self._taken_subscribers:
                self.spawn(callback(change, now))
        self.invalidate(change.device_id)

    def evaluate_if_due(self) -> None:
        """Evaluates what is advertised at once, if anything has changed since the last evaluation."""
        if self._scheduled:
            self.evaluate(self._due)

    def evaluate(self, due: Collection[str] | None = None) -> None:
        """Evaluates what is advertised at once and calls the subscribers. Does nothing unless run() runs.

        due: the devices of which only the locks and claims have changed; None to evaluate everything.
        """
        self._scheduled, self._due = False, set()
        if self._tasks is None:
            return
        snapshot = restrict(self.snapshot(due), self._members, due) if due is not None else None
        if snapshot is not None and due is not None:
            self._members, lists, evaluated = evaluate_part(self._members, self.advertised, snapshot, due)
        else:
            snapshot = self.snapshot()
            self._members = update_offered(self._members, snapshot)
            self._absent = update_absent(self._absent, self._members, snapshot, self._clock.monotonic())
            lists = evaluated = advertise(self._members, snapshot)
        if self._former:
            kept = self._members.keys() - {resource.name for resource in self.config.resources}
            self._former = {name: resource for name, resource in self._former.items() if name in kept}
        self._overlap_warnings.warn(self._members, evaluated)
        before, self.advertised = self.advertised, lists
        evaluation = Evaluation(before, lists, snapshot)
        for callback in self._subscribers:
            callback(evaluation)
