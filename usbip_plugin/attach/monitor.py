"""Keeps what is attached attached: watches ports and locks, and begins what a loss of either calls for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from usbip_plugin.attach.adopt import Adopter
from usbip_plugin.attach.events import Notice, What, late_nodes
from usbip_plugin.attach.pipeline import Means, own_port
from usbip_plugin.attach.reattach import REATTACH_FIRST_WAIT, Reattacher, Wishes
from usbip_plugin.attach.tasks import DeviceWork
from usbip_plugin.claims import Claim, Event, State
from usbip_plugin.config.schema import OnLoss
from usbip_plugin.errors import CdiError, VhciError
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Attachment
from usbip_plugin.observe.tracing import within
from usbip_plugin.vhci.children import wants
from usbip_plugin.vhci.driver import PortState

log = logging.getLogger(__name__)


PORT_CHECK_INTERVAL = 15.0
"""Seconds between looks at the ports when no uevent says to look: uevents can be dropped under memory pressure."""


class Keeper:
    """See the module. `run` must be running."""

    def __init__(self, means: Means, work: DeviceWork, wishes: Wishes) -> None:
        self._work = work
        self.reattacher = Reattacher(means, work, wishes)
        self.adopter = Adopter(means, work, reattach=self._begin_reattach, withdraw=self._begin_withdrawal)
        self._me = means.me
        self._driver = means.driver
        self._locks = means.locks
        self._specs = means.specs
        self._clock = means.clock
        self._on_notice = wishes.on_notice
        self._resource_of = wishes.resource_of
        self._evict = wishes.evict
        self._ports_event = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        unsubscribe = [self._locks.subscribe(self._lock_changed), self._driver.subscribe(self._ports_event.set)]
        try:
            await self._watch_ports()
        finally:
            for undo in unsubscribe:
                undo()

    async def verify(self, device_id: str) -> None:
        """Looks now whether a device stands attached as its claim says, and which nodes it has. VhciError, CdiError."""
        now = await self._check_port(device_id, await self._driver.ports())
        claim = self._work.book.get(device_id)
        if now is not None and claim is not None and claim.attachment is not None and claim.attachment != now:
            self._specs.write(claim, now)
            self._work.book.put(replace(claim, attachment=now))

    async def _watch_ports(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(PORT_CHECK_INTERVAL):
                    await self._ports_event.wait()
            self._ports_event.clear()
            if not any(claim.state is State.ATTACHED for claim in self._work.book.view.values()):
                continue
            try:
                ports = await self._driver.ports()
                for device_id in list(self._work.book.view):
                    await self._check_port(device_id, ports)
            except VhciError as error:
                log.warning("cannot read vhci ports", extra={"cause": str(error)})

    async def _check_port(self, device_id: str, ports: Sequence[PortState]) -> Attachment | None:
        """Begins a re-attach if the device does not stand attached as its claim says; else the attachment as it is."""
        claim = self._work.book.get(device_id)
        if claim is None or claim.state is not State.ATTACHED:
            return None
        standing = await self._work.pipeline.standing(claim, ports)
        now = self._work.book.get(device_id)
        if now is None or now.state is not State.ATTACHED or now.attachment != claim.attachment:
            return None
        if standing is not None:
            self._take_late_nodes(now, standing)
            return standing
        # the state moves here and now, so that the withdrawal does not wait for the mutex
        self._work.book.move(now, Event.PORT_LOST)
        with within(claim.traceparent):
            log.warning("attachment lost", extra={"device": str(claim.key), "port": claim.port})
        on_port = own_port(claim.place, ports, claim.port)
        why = "fell free" if on_port is None else "has it no more as it was: it has left the bus"
        self._on_notice(Notice(What.LOST, claim.key, f"vhci port {claim.port} {why}, re-attaching", claim.pod))
        self.reattacher.seeker.lost(device_id)
        self._begin_reattach(device_id)
        return None

    def _take_late_nodes(self, claim: Claim, now: Attachment) -> None:
        """Child nodes that came after the Allocate: in the spec, for the next start of a container; and told of.

        Nodes that go are left in the spec until a container starts: a program that takes an interface from its kernel
        driver gives it back when it ends.
        """
        before = claim.attachment
        late = [node for node in now.nodes if before is not None and node not in before.nodes]
        wanted = [node.path for node in late if wants(self._resource_of(claim).children, node)]
        if before is None or not late:
            return
        try:
            self._specs.write(claim, now)
        except CdiError as error:
            log.warning("CDI spec not true", extra={"device": str(claim.key), "cause": str(error)})
            return
        self._work.book.put(replace(claim, attachment=now))
        if wanted:
            log.warning("device nodes came late", extra={"device": str(claim.key), "nodes": wanted})
            self._on_notice(late_nodes(claim.key, wanted, claim.pod, by_cdi=bool(claim.numbers)))

    def _lock_changed(self, change: LockChange) -> None:
        """R6: the watch shows another holder of a device that is attached here. Or that a lost lock is free again."""
        claim = self._work.book.get(change.device_id)
        if claim is not None and claim.state is State.LOST:
            self._regain(change.device_id)
            return
        holder = change.new.holder if change.new is not None else ""
        if holder == self._me.node:
            return
        self._place_lost(change.device_id, holder)
        claim = self._work.book.get(change.device_id)
        if claim is None or claim.state not in (State.ATTACHED, State.REATTACHING):
            return
        # also when the Lease was deleted or emptied by hand: without a lock naming this node nothing may stay attached
        self._work.book.move(claim, Event.LOCK_LOST)
        with within(claim.traceparent):
            log.error("lock lost", extra={"device": str(claim.key), "holder": holder})
        text = f"node {holder} holds it now" if holder else "its lock no longer names this node"
        if change.old is not None and change.old.holder == self._me.node:
            self._on_notice(Notice(What.LOCK_LOST, claim.key, text + "; it is detached here", claim.pod))
            if self._resource_of(claim).on_loss is OnLoss.EVICT and claim.pod is not None and claim.pod.uid is not None:
                self._evict(claim.pod)
        self.reattacher.look_again(change.device_id)
        self._begin_withdrawal(change.device_id)

    def _begin_reattach(self, device_id: str) -> None:
        self._work.spawn(self._reattach(device_id), f"re-attach {self._work.book[device_id].key}")

    async def _reattach(self, device_id: str) -> None:
        await self.reattacher.reattach(device_id)
        after = self._work.book.get(device_id)
        if after is not None and after.state is State.LOST:
            await self._clock.sleep(REATTACH_FIRST_WAIT)
            self._regain(device_id)

    def _begin_withdrawal(self, device_id: str) -> None:
        self._work.spawn(self._withdraw(device_id), f"withdraw {self._work.book[device_id].key}")

    async def _withdraw(self, device_id: str) -> None:
        await self._work.finish_locked(device_id, State.LOST)
        self._regain(device_id)

    def _regain(self, device_id: str) -> None:
        """A device that was lost with its lock is attached again when the lock is free, if its pod is still there.

        Not if a person has released it: that is to stay so.
        """
        claim, lock = self._work.book.get(device_id), self._locks.locks.get(device_id)
        if claim is None or claim.state is not State.LOST or self._work.mutex(device_id).locked():
            return
        if lock is None or (lock.holder in ("", self._me.node) and not lock.by_hand):
            self._work.book.move(claim, Event.LOCK_FREE)
            self._begin_reattach(device_id)

    def _place_lost(self, device_id: str, holder: str) -> None:
        """R6 for a place that a device was followed to: the claim stays, the attachment does not."""
        claim = self._work.book.moved_here(device_id)
        if claim is None or claim.state is not State.ATTACHED:
            return
        self._work.book.move(claim, Event.PORT_LOST)
        log.error("lock lost", extra={"device": str(claim.key), "place": str(claim.place), "holder": holder})
        text = f"the lock of {claim.place} names {holder or 'nobody'} now; it is detached here"
        self._on_notice(Notice(What.LOST, claim.key, text, claim.pod))
        self._begin_reattach(claim.id)
