"""Keeps what the inventory says up to date, and in front of whoever is to know it.

Changes come from six sides: servers, locks, claims, ports, the API server, the configuration. Each only says "look
again"; one evaluation per turn of the event loop answers all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Mapping

from usbip_plugin.attach.attacher import Attacher
from usbip_plugin.claims import Claim
from usbip_plugin.clock import Clock
from usbip_plugin.config.schema import Config, ResourceConfig
from usbip_plugin.inventory import evaluate
from usbip_plugin.inventory.conditions import Conditions
from usbip_plugin.inventory.evaluate import Oddities, advertise
from usbip_plugin.inventory.facts import Driver, Facts, Members, Seen
from usbip_plugin.inventory.handover import Handovers
from usbip_plugin.inventory.members import held_as, learn
from usbip_plugin.inventory.probe import Prober
from usbip_plugin.kubelet.publish import TELLING_SHARE, Telling, time_kept
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Advertised, Health, NodeIdentity
from usbip_plugin.usbip.poller import ServerPoller, ServerView
from usbip_plugin.vhci.driver import VhciDriver

log = logging.getLogger(__name__)


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
        telling: Telling,
        clock: Clock,
    ) -> None:
        self._me = me
        self._config = config
        self._domain = domain
        self._attacher = attacher
        self._locks = locks
        self._poller = poller
        self._telling = telling
        self._clock = clock
        self._former: dict[str, ResourceConfig] = {}
        self._members: Members = {}
        self._conditions = Conditions(driver, locks, clock, self.look_again)
        self._handovers = Handovers(
            me=me.node, locks=locks, poller=poller, clock=clock, spawn=self._spawn, look_at=self._look_at
        )
        self._prober = Prober(
            me=me.node,
            attacher=attacher,
            poller=poller,
            clock=clock,
            facts=self.facts,
            spawn=self._spawn,
            look_again=self.look_again,
        )
        self._oddities = Oddities()
        self._scheduled = False
        self._due: set[str] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        poller.set_servers(config.servers())

    # what others ask

    @property
    def advertised(self) -> Mapping[str, tuple[Advertised, ...]]:
        """By resource name without the domain, as last told to the kubelet."""
        return self._telling.lists

    @property
    def config(self) -> Config:
        return self._config

    @property
    def ports(self) -> Driver:
        """The driver and its ports, as last read."""
        return self._conditions.ports

    def health(self) -> Mapping[str, Health]:
        """By device ID. Of a device that several resources offer, as the one that can have it."""
        found: dict[str, Health] = {}
        for devices in self.advertised.values():
            for device in devices:
                if device.id not in found or not found[device.id].healthy:
                    found[device.id] = device.health
        return found

    def offered(self) -> Mapping[str, bool]:
        """The resources that have to be registered, by name without the domain, and whether they are handed out by CDI.

        Those of the configuration, and those of which a pod has a device: a kubelet that has lost the plugin of a
        resource starts no container again that wants it.
        """
        claims = self._attacher.claims
        held = {claim.resource: bool(claim.numbers) for claim in claims.values() if claim.resource is not None}
        configured = {resource.name for resource in self._config.resources}
        for name, devices in self._members.items():
            if name not in configured and any(held_as(claims, i, name) for i in devices):
                held[name] = self._former[name].cdi if name in self._former else held.get(name, False)
        return held | {resource.name: resource.cdi for resource in self._config.resources}

    def lookup(self, resource: str) -> tuple[ResourceConfig, Mapping[str, Seen]] | None:
        """A resource, by its full name, and the devices it offers. None if it is, and was, not in the configuration."""
        name = self._telling.short(resource)
        config = next((r for r in self._config.resources if r.name == name), self._former.get(name))
        return None if config is None else (config, self._members.get(name, {}))

    def resource_of(self, claim: Claim) -> ResourceConfig:
        """Its resource, which says what is done when it comes back under other device nodes.

        A claim that was adopted does not know its resource: then it is the first that offers the device. One with the
        defaults if there is none any more.
        """
        name = claim.resource if claim.resource is not None else next(iter(self._offering(claim.id)), "")
        found = self.lookup(f"{self._domain}/{name}")
        return ResourceConfig(name, ()) if found is None else found[0]

    def facts(self, device_ids: Collection[str] | None = None) -> Facts:
        """What is known now; with device_ids, of their locks and releases no others."""
        locks = self._locks.locks
        if device_ids is not None:
            locks = {i: locks[i] for i in device_ids if i in locks}
        return Facts(
            me=self._me.node,
            config=self._config,
            servers=self._poller.views,
            locks=locks,
            standings={i: self._locks.standing(i) for i in locks},
            claims=self._attacher.claims,
            moved_here=self._attacher.moved_here,
            driver=self._conditions.ports,
            api=self._conditions.api,
            released=self._handovers.released(device_ids),
            restless=self._prober.restless(),
            suspect=self._prober.suspect(self._locks.locks),
        )

    # what others tell

    def reconfigure(self, config: Config) -> None:
        """A new configuration: held devices stay offered, as they were configured, until they are let go."""
        self._former.update({resource.name: resource for resource in self._config.resources})
        self._config = config
        self._poller.set_servers(config.servers())
        self.look_again()

    def ready(self) -> None:
        """What a previous process left has been adopted: from now on lists are complete enough to be sent."""
        self._telling.begin()
        self._evaluate()

    def look_again(self, _device_id: str = "") -> None:
        """Something changed; what is advertised is worked out anew before the event loop turns again."""
        self._due = None
        self._schedule()

    def server_changed(self, view: ServerView) -> None:
        """For the poller: a server's list or state changed."""
        self._prober.server_changed(view, self._locks.locks, self._handovers.released())
        self._handovers.servers_changed()
        self.look_again()

    async def denied(self, resource: str) -> None:
        """Before a failed Allocate answers: kubelet and Node are to know what it failed of. Within time_kept.

        Otherwise the scheduler sends the replacement straight back here (measured: up to 51 failed pods).
        """
        self._evaluate()
        await self._telling.made_sure(resource, TELLING_SHARE * time_kept(self._config))

    # work

    async def run(self) -> None:
        """Until cancelled."""
        unsubscribe = self._locks.subscribe(self._lock_changed)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._conditions.run(), name="ports and API server")
                self.look_again()
        finally:
            self._tasks = None
            unsubscribe()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        try:
            if self._tasks is not None:
                self._tasks.create_task(work)
                return
        except RuntimeError:  # the plugin is being stopped, and the group takes no more
            log.debug("not begun, stopping")
        work.close()

    def _lock_changed(self, change: LockChange) -> None:
        self._prober.lock_changed(change)
        self._handovers.lock_changed(change)
        device_id = change.device_id
        taken = change.holder != change.former and change.holder not in ("", self._me.node)
        if taken and self._offering(device_id):
            now = self._clock.monotonic()
            self._spawn(self._telling.withdraw(change, now, lambda: self._offering_now(device_id)))
        self._look_at(device_id)

    def _offering(self, device_id: str) -> list[str]:
        """The resources that have the device, by their names without the domain."""
        return [name for name, devices in self._members.items() if device_id in devices]

    def _offering_now(self, device_id: str) -> list[str]:
        self._evaluate_if_due()
        return self._offering(device_id)

    def _look_at(self, device_id: str) -> None:
        """As look_again, where nothing but the lock of this device has changed."""
        if self._due is not None:
            self._due.add(device_id)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and self._tasks is not None:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._evaluate_if_due)

    def _evaluate_if_due(self) -> None:
        """Unless what was to be looked at has been looked at meanwhile."""
        if self._scheduled:
            self._evaluate(self._due)

    def _evaluate(self, due: Collection[str] | None = None) -> None:
        """due: the devices of which only the locks have changed; None for everything."""
        self._scheduled, self._due = False, set()
        if self._tasks is None:
            return
        facts = evaluate.only(self.facts(due), self._members, due) if due is not None else None
        if facts is not None and due is not None:
            self._members, lists, told = evaluate.relearn(self._members, self.advertised, facts, due)
        else:
            facts = self.facts()
            self._members = learn(self._members, facts)
            lists = told = advertise(self._members, facts)
        if self._former:
            kept = self._members.keys() - {resource.name for resource in self._config.resources}
            self._former = {name: resource for name, resource in self._former.items() if name in kept}
        self._oddities.look(self._members, told)
        self._telling.tell(lists, self._locks.locks)
        self._prober.begin(facts)
