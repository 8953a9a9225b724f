"""Watches the ports and locks of attached devices, and begins a re-attach or detach when one is lost.

R6 is the rule for a lost lock, see docs/internals/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.claim_locks import is_outdated
from usbip_plugin.attach.events import DeviceEvent, EventKind, EventSink
from usbip_plugin.attach.pipeline import Pipeline, own_port
from usbip_plugin.attach.reattach import REATTACH_FIRST_WAIT, Reattacher
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks, failure_of
from usbip_plugin.claims import Claim, ClaimEvent, ClaimState, Resources
from usbip_plugin.config.schema import OnLoss
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import CdiError, VhciError
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.protocol import Loss
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Attachment, Lock, PodRef, ServerKey
from usbip_plugin.observe.tracing import within
from usbip_plugin.sync import done_within
from usbip_plugin.usbip.poller import ServerFlaw
from usbip_plugin.vhci.children import wants
from usbip_plugin.vhci.driver import PortState, VhciDriver

log = logging.getLogger(__name__)


PORT_CHECK_INTERVAL = 15.0
"""Longest time in seconds between two checks of the ports.

A uevent starts a check at once, but uevents can be dropped under memory pressure.
"""
MIN_WAIT = 0.05
"""Least seconds between two looks at a lost lock, so that rounding of a clock never makes them spin."""


class AttachmentMonitor:
    """Watches ports and locks of attached devices. Works only while `run()` runs."""

    def __init__(
        self,
        context: NodeContext,
        *,
        driver: VhciDriver,
        locks: LockManager,
        specs: CdiSpecs,
        resources: Resources,
        tasks: DeviceTasks,
        pipeline: Pipeline,
        releaser: Releaser,
        reattacher: Reattacher,
        events: EventSink,
        evict: Callable[[PodRef, str], None],
        on_flaw: Callable[[ServerKey, ServerFlaw], None],
    ) -> None:
        """Takes evict(pod, cause), which begins to evict a pod whose device has lost its lock."""
        self._me = context.me
        self._clock = context.clock
        self._driver = driver
        self._locks = locks
        self._specs = specs
        self._resources = resources
        self._tasks = tasks
        self._pipeline = pipeline
        self._releaser = releaser
        self._reattacher = reattacher
        self._events = events
        self._evict = evict
        self._on_flaw = on_flaw
        self._ports_event = asyncio.Event()
        self._unreadable = ""
        self._reported: set[str] = set()
        self._lost_since: dict[str, float] = {}
        """By device ID: when a Lost claim was first seen with another holder in its lock (seconds, monotonic)."""

    async def run(self) -> None:
        """Watches the ports and locks until cancelled."""
        unsubscribe = [self._locks.subscribe(self._lock_changed), self._driver.subscribe(self._ports_event.set)]
        try:
            await self._watch_ports()
        finally:
            for undo in unsubscribe:
                undo()

    async def verify(self, device_id: str) -> None:
        """Checks now whether a device is attached as its claim says, and which device nodes it has.

        Updates claim and CDI spec if the nodes have changed. Begins a re-attach if the attachment is lost.
        Raises VhciError or CdiError.
        """
        claim = self._tasks.book.get(device_id)
        ports = await self._driver.ports()
        now = await self._check_port(claim, ports) if claim is not None else None
        claim = self._tasks.book.get(device_id)
        if now is not None and claim is not None and claim.attachment is not None and claim.attachment != now:
            self._specs.write(claim, now)
            self._tasks.book.put(replace(claim, attachment=now))

    async def prepare(self, device_id: str, resource: str, number: int | None) -> bool:
        """Prepares a device for a container that is about to start. Returns whether the device is attached.

        If it is, its CDI spec, if it has one, is up to date. Waits while the device is being adopted, attached or
        re-attached; the caller bounds that wait. Raises VhciError or CdiError. Cancel-safe.

        resource: the resource's name without the domain.
        number: the number by which the container knows the device; None if it was not handed out by CDI.
        """
        await self.verify(device_id)
        await self._tasks.book.changed.until(lambda: not self._coming(device_id))
        claim = self._tasks.book.get(device_id)
        if claim is None or claim.state is not ClaimState.ATTACHED or claim.attachment is None:
            return False
        attachment = claim.attachment
        if number is not None and claim.container_indexes != ():
            # after a reboot there is no CDI spec to adopt, and the container starts before pod-resources lists it
            indexes = tuple(sorted({*(claim.container_indexes or ()), number}))
            claim = replace(
                claim, resource=claim.resource or resource, container_indexes=indexes, allocated_as=attachment
            )
        self._specs.write(claim, attachment)
        self._tasks.book.put(claim)
        return True

    def _coming(self, device_id: str) -> bool:
        claim = self._tasks.book.get(device_id)
        if claim is None:  # the device may not be adopted yet
            return not self._locks.ready.is_set() or any(lock.device_id == device_id for lock in self._locks.mine())
        return claim.state in (ClaimState.LOCKING, ClaimState.IMPORTING, ClaimState.ATTACHING, ClaimState.REATTACHING)

    async def _watch_ports(self) -> None:
        while True:
            await done_within(self._clock, PORT_CHECK_INTERVAL, self._ports_event.wait())
            self._ports_event.clear()
            # the claims are read before the ports, so that a device attached in between does not count as missing
            attached = [claim for claim in self._tasks.book.view.values() if claim.state is ClaimState.ATTACHED]
            if not attached:
                continue
            try:
                ports = await self._driver.ports()
                for claim in attached:
                    await self._check_port(claim, ports)
                self._unreadable = ""
            except VhciError as error:
                self.report_unreadable(error)

    def report_unreadable(self, error: VhciError) -> None:
        """Logs, once for each cause, that the vhci ports cannot be read."""
        if self._unreadable != str(error):
            self._unreadable = str(error)
            log.warning("cannot read vhci ports", extra={"cause": str(error)})

    async def _check_port(self, claim: Claim, ports: Sequence[PortState]) -> Attachment | None:
        """Returns the attachment as it is now, or begins a re-attach if the device is not attached as its claim says.

        Returns None after a loss, and if the claim is not Attached or has changed since the ports were read.
        """
        device_id = claim.id
        if claim.state is not ClaimState.ATTACHED:
            return None
        attachment = await self._pipeline.current_attachment(claim, ports)
        now = self._tasks.book.get(device_id)
        if now is None or now.state is not ClaimState.ATTACHED or now.attachment != claim.attachment:
            return None
        if attachment is not None:
            self._take_late_nodes(now, attachment)
            return attachment
        # the state changes at once, so that publishing the device as unavailable does not wait for the mutex
        self._tasks.book.move(now, ClaimEvent.PORT_LOST)
        with within(claim.traceparent):
            log.warning("attachment lost", extra={"device": str(claim.key), "port": claim.port})
        on_port = own_port(claim.location, ports, claim.port)
        why = "became free" if on_port is None else "lost the device, which left the bus"
        self._events(DeviceEvent(EventKind.LOST, claim.key, f"vhci port {claim.port} {why}; re-attaching", claim.pod))
        self._reattacher.locator.lost(device_id)
        self.begin_reattach(device_id)
        return None

    def _take_late_nodes(self, claim: Claim, now: Attachment) -> None:
        """Adds child nodes that came after the Allocate to claim and CDI spec, and reports those the resource wants.

        A container gets them at its next start. Nodes that disappear stay in the spec until then: a libusb program
        detaches a kernel driver, and re-attaches it when it ends.
        """
        before = claim.attachment
        late = [node for node in now.nodes if before is not None and node not in before.nodes]
        wanted = [node.path for node in late if wants(self._resources.resource_of(claim).children, node)]
        if before is None or not late:
            return
        try:
            self._specs.write(claim, now)
        except CdiError as error:
            log.warning("CDI spec out of date", extra={"device": str(claim.key), "cause": str(error)})
            return
        self._tasks.book.put(replace(claim, attachment=now))
        if wanted:
            log.warning("device nodes appeared after the Allocate", extra={"device": str(claim.key), "nodes": wanted})
            cure = f"{'restart the container' if claim.container_indexes else 'recreate the pod'} to use them"
            hint = "list their kinds under children to make Allocate wait for them"
            text = f"{', '.join(wanted)} appeared after the Allocate; {cure}; {hint}"
            self._events(DeviceEvent(EventKind.NODES_LATE, claim.key, text, claim.pod))

    def _lock_changed(self, change: LockChange) -> None:
        """Withdraws a device whose lock names another holder by now, or nobody (R6).

        If the claim is already Lost, takes the lock again once it is free.
        """
        claim = self._tasks.book.get(change.device_id)
        if claim is not None and claim.state is ClaimState.LOST:
            self._regain(change.device_id)
            return
        if self._loss(change.device_id, 0.0) is Loss.NONE:
            if change.listed:
                epochs = {lock.epoch for lock in (change.old, change.new) if lock is not None}
                self._correct_lock(change.device_id, another_epoch=len(epochs) > 1)
            return
        self._location_lost(change.device_id, change.new)
        claim = self._tasks.book.get(change.device_id)
        if claim is None or claim.state not in (ClaimState.ATTACHED, ClaimState.REATTACHING):
            return
        # also if the Lease was deleted: without a lock that names this node no device is offered
        self._tasks.book.move(claim, ClaimEvent.LOCK_LOST)
        self._reported.discard(claim.id)
        with within(claim.traceparent):
            log.error("lock lost", extra={"device": str(claim.key), "holder": change.holder})
        self._reattacher.look_again(change.device_id)
        self.begin_withdrawal(change.device_id)

    async def check_locks(self, device_id: str, port: PortState) -> None:
        """Checks the locks of a device that has just been adopted as a change of them is checked.

        Writes them to the port record, if that has others. Begins all else, and does not wait for it.
        """
        await self._pipeline.note_holds(device_id, port)
        claim = self._tasks.book[device_id]
        lock = self._locks.locks.get(claim.location.id)
        if lock is None or not lock.names(self._me):
            self._location_lost(claim.location.id, lock)
        for key in claim.locked:
            self._correct_lock(key.id)

    def _correct_lock(self, device_id: str, *, another_epoch: bool = False) -> None:
        """Begins to correct a lock of this node whose record a restore of etcd has set back. Returns at once.

        The next process would believe it, and release the device of a pod that the lock does not name.

        another_epoch: whether the lock is of another epoch than before, so that the port record names an outdated one.
        """
        claim = self._tasks.book.get(device_id) or self._tasks.book.moved_here(device_id)
        lock = self._locks.locks.get(device_id)
        if claim is None or lock is None or claim.state is not ClaimState.ATTACHED:
            return
        outdated = is_outdated(lock, claim)
        if outdated:
            log.warning("lock outdated, correcting it", extra={"device": str(claim.key)})
        if not (outdated or another_epoch):
            return
        self._tasks.spawn(self._correct_locks(claim), f"correct the lock of {claim.key}")

    async def _correct_locks(self, claim: Claim) -> None:
        error = await failure_of(self._correct_once(claim.id))
        if error is not None:
            log.warning("lock not corrected", extra={"device": str(claim.key), "cause": str(error)})
        await self._tasks.try_again(
            error, lambda: self._correct_once(claim.id), lambda: self._is_in(claim.id, ClaimState.ATTACHED)
        )
        self._regain(claim.id)  # the lock may have been lost meanwhile

    async def _correct_once(self, device_id: str) -> None:
        async with self._tasks.mutex(device_id):
            if self._is_in(device_id, ClaimState.ATTACHED):
                await self._pipeline.correct_locks(device_id)

    def begin_reattach(self, device_id: str) -> None:
        """Begins to re-attach the device of a Reattaching claim. Returns at once."""
        self._tasks.spawn(self._reattach(device_id), f"re-attach {self._tasks.book[device_id].key}")

    async def _reattach(self, device_id: str) -> None:
        await self._reattacher.reattach(device_id)
        if self._is_in(device_id, ClaimState.LOST):
            await self._clock.sleep(REATTACH_FIRST_WAIT)
            await self._withdraw(device_id)

    def _is_in(self, device_id: str, state: ClaimState) -> bool:
        claim = self._tasks.book.get(device_id)
        return claim is not None and claim.state is state

    def begin_withdrawal(self, device_id: str) -> None:
        """Begins to take the lock of a Lost claim again or, if that fails, to detach the device. Returns at once."""
        self._tasks.spawn(self._withdraw(device_id), f"withdraw {self._tasks.book[device_id].key}")

    async def _withdraw(self, device_id: str) -> None:
        while self._is_in(device_id, ClaimState.LOST):
            now = self._clock.monotonic()
            loss = self._loss(device_id, now - self._lost_since.setdefault(device_id, now))
            if loss is Loss.WAIT and self._tasks.book[device_id].port is not None:
                # a server that exports the device here refuses the new holder, which then releases the lock
                end = self._lost_since[device_id] + self._locks.settings.import_window
                await self._clock.sleep(max(MIN_WAIT, end - now))
                continue
            if loss in (Loss.WAIT, Loss.DETACH):
                await self._report_loss(self._tasks.book[device_id])
                await self._releaser.finish_locked(device_id, ClaimState.LOST)
            break
        self._lost_since.pop(device_id, None)
        self._regain(device_id)

    def _loss(self, device_id: str, held_for: float) -> Loss:
        lock, claim = self._locks.locks.get(device_id), self._tasks.book.get(device_id)
        if claim is not None and self._locks.is_set_back(device_id):
            # nobody else can have what is attached here; what an earlier boot of this node held is taken by R3
            holder = lock.holder if lock is not None else ""
            if claim.port is not None or holder == self._me.node:
                return Loss.REGAIN
        if claim is not None and claim.port is None and self._locks.is_of_earlier_boot(device_id):
            return Loss.REGAIN  # by R3: nobody else releases such a lock
        pod = claim.pod if claim is not None else None
        return self._locks.rules.decide_loss(lock, self._me, pod, held_for, self._locks.settings.import_window)

    async def _report_loss(self, claim: Claim) -> None:
        """Reports once that the device of a Lost claim is detached here."""
        if claim.id in self._reported:
            return
        self._reported.add(claim.id)
        lock = self._locks.locks.get(claim.id)
        if lock is not None and lock.holder and lock.port is not None:
            with contextlib.suppress(VhciError):
                if await self._pipeline.still_attached(claim.id) is not None:
                    self._on_flaw(claim.location.server, ServerFlaw.EXPORTS_TWICE)
        holder = lock.holder if lock is not None else ""
        text = f"node {holder} holds the device now" if holder else "the lock no longer names this node"
        self._events(DeviceEvent(EventKind.LOCK_LOST, claim.key, text + "; detaching the device here", claim.pod))
        evict = self._resources.resource_of(claim).on_loss is OnLoss.EVICT
        if evict and claim.pod is not None and claim.pod.uid is not None:
            self._evict(
                claim.pod, f"node {holder} took {claim.key}" if holder else f"nobody holds the lock of {claim.key} now"
            )

    def _regain(self, device_id: str) -> None:
        """Begins to take the lock of a Lost claim again, if it is free or was set back, and the pod is still there.

        A device that is still attached stays so, any other is attached again. A lock that a person has released stays
        released. Does nothing while other work has the device's mutex.
        """
        claim = self._tasks.book.get(device_id)
        if claim is None or claim.state is not ClaimState.LOST or self._tasks.mutex(device_id).locked():
            return
        if self._loss(device_id, 0.0) in (Loss.NONE, Loss.REGAIN):
            self._tasks.book.move(claim, ClaimEvent.LOCK_FREE)
            self._reported.discard(device_id)
            self.begin_reattach(device_id)

    def _location_lost(self, device_id: str, lock: Lock | None) -> None:
        """Begins to re-attach the device that was followed to this bus ID, because the lock here is lost (R6).

        The re-attach takes the lock again if nobody holds it and no person has released it, or detaches the device.
        """
        holder = lock.holder if lock is not None else ""
        claim = self._tasks.book.moved_here(device_id)
        if claim is None or claim.state is not ClaimState.ATTACHED:
            return
        self._tasks.book.move(claim, ClaimEvent.PORT_LOST)
        log.error("lock lost", extra={"device": str(claim.key), "place": str(claim.location), "holder": holder})
        if lock is not None and lock.stays_released(claim.pod):
            text = f"a person has released the lock of {claim.location}; detaching the device here"
        else:
            text = f"the lock of {claim.location} names {holder or 'nobody'} now; re-attaching"
        self._events(DeviceEvent(EventKind.LOST, claim.key, text, claim.pod))
        self.begin_reattach(claim.id)
