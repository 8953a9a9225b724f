"""Keeps what is attached attached: watches ports and locks, re-attaches, withdraws, adopts a predecessor's devices."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from opentelemetry.trace import Span

from usbip_plugin import retry
from usbip_plugin.attaching import Means
from usbip_plugin.claims import (
    Adoption,
    AfterReattach,
    Claim,
    Event,
    State,
    User,
    after_reattach,
    decide_adoption,
    own_port,
)
from usbip_plugin.config import OnLoss
from usbip_plugin.errors import (
    CdiError,
    DeviceBusy,
    ImportRefused,
    KubeError,
    LockError,
    LockHeld,
    LockLost,
    PluginError,
    RecordNotWritable,
    UsbipError,
    VhciError,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.inventory import key_of, parse_usb_id
from usbip_plugin.locks.manager import LockChange
from usbip_plugin.model import Attachment, DeviceKey, Lock, PodRef, UsbId
from usbip_plugin.notices import Notice, What
from usbip_plugin.observe.tracing import remote_parent, within
from usbip_plugin.seeker import Configured, Seeker
from usbip_plugin.spans import Tries, device_attributes, failed, pod_attributes, span
from usbip_plugin.usbip.poller import ServerView
from usbip_plugin.vhci.driver import PortState
from usbip_plugin.whereabouts import Ambiguous, Ask, Found
from usbip_plugin.work import DeviceWork

log = logging.getLogger(__name__)

REATTACH_FIRST_WAIT = 0.2
REATTACH_MAX_WAIT = 3.5
"""Seconds between tries to attach a lost device again; with jitter and the attach, 5 s after its server is back."""
REATTACH_TIMEOUT = 10.0
"""Seconds one such try may take."""
PORT_CHECK_INTERVAL = 15.0
"""Seconds between looks at the ports when no uevent says to look: uevents can be dropped under memory pressure."""


class Reattach(enum.Enum):
    """What one try to attach a lost device again came to."""

    SAME_NODES = "same_nodes"
    OTHER_NODES = "other_nodes"
    FAILED = "failed"


class Keeper:
    """See the module. `run` must be running.

    on_notice is told what people should hear of, on_reattach of each try; on_loss(claim) says what its resource wants,
    evict(pod) does it. configured: which devices may be looked at in search of a lost one.
    """

    def __init__(
        self,
        means: Means,
        work: DeviceWork,
        on_notice: Callable[[Notice], None],
        on_reattach: Callable[[Reattach], None],
        on_loss: Callable[[Claim], OnLoss],
        evict: Callable[[PodRef], None],
        configured: Configured,
    ) -> None:
        self._work = work
        self.seeker = Seeker(means, work, configured, self._look_everywhere)
        self._me = means.me
        self._driver = means.driver
        self._locks = means.locks
        self._specs = means.specs
        self._clock = means.clock
        self._rng = means.rng
        self._tracer = means.tracer
        self._on_notice = on_notice
        self._on_reattach = on_reattach
        self._on_loss = on_loss
        self._evict = evict
        self._ports_event = asyncio.Event()
        self._stirs: dict[str, asyncio.Event] = {}

    async def run(self) -> None:
        """Until cancelled."""
        unsubscribe = [self._locks.subscribe(self._lock_changed), self._driver.subscribe(self._ports_event.set)]
        try:
            await self._watch_ports()
        finally:
            for undo in unsubscribe:
                undo()

    def look_again(self, device_id: str) -> None:
        """A re-attach that waits for its next try makes it now, or ends if nobody wants the device any more."""
        if (stir := self._stirs.get(device_id)) is not None:
            stir.set()

    def server_changed(self, view: ServerView) -> None:
        """A server that lists a lost device again, or one of its kind, is asked for it at once."""
        self.seeker.server_changed(view)
        busids, kinds = {device.busid for device in view.devices}, {device.usb_id for device in view.devices}
        for device_id in self._stirs:
            claim = self._work.book.get(device_id)
            if claim is None or claim.key.server != view.server:
                continue
            if claim.place.busid in busids or claim.usb_id in kinds:
                self.look_again(device_id)

    def _look_everywhere(self) -> None:
        for device_id in self._stirs:
            self.look_again(device_id)

    # what the previous process left

    async def adopt(self, used: Mapping[str, User], *, complete: bool, deprived: bool) -> None:
        """Takes over what locks and ports say is this node's.

        used: by device ID, as far as is known. complete: nobody else uses a device here; else nothing is let go.
        deprived: also looks for pods whose devices have lost their locks, under an earlier process.

        Idempotent; to be called when the locks are known, and again whenever the API server is back.
        """
        try:
            ports = await self._driver.ports()
        except VhciError as error:
            log.warning("cannot read vhci ports", extra={"cause": str(error)})
            ports = ()
        found = list(self._locks.mine())
        if deprived:
            locks = self._locks.locks
            found += [locks[i] for i in sorted(used) if i in locks and locks[i].holder != self._me.node]
        for lock in found:
            key = key_of(lock)
            if key is None or self._work.mutex(lock.device_id).locked():
                continue  # at work on it already
            async with self._work.mutex(lock.device_id):
                now = self._locks.locks.get(lock.device_id)
                if now is None or self._work.book.concerns(lock.device_id) or now.holder != lock.holder:
                    continue
                orphaned = lock.in_place_of is None or self._is_orphan(lock.in_place_of)
                if orphaned or now.holder != self._me.node:
                    await self._adopt_one(key, lock, ports, used, complete=complete)

        if deprived:
            await self._forget_what_ended(ports)

    async def _forget_what_ended(self, ports: Sequence[PortState]) -> None:
        """Port records of attachments that ended when nobody here knew of them, their locks being others' by now."""
        for lock in tuple(self._locks.locks.values()):
            key = key_of(lock)
            if key is None or lock.holder == self._me.node or self._work.book.concerns(lock.device_id):
                continue
            if own_port(key, ports, None) is None and not self._work.mutex(lock.device_id).locked():
                await self._driver.forget(key)

    def _is_orphan(self, in_place_of: str) -> bool:
        """Whether a lock in place of this device will not be taken over together with that one's own."""
        own = self._locks.locks.get(in_place_of)
        adopted = self._work.book.get(in_place_of) is not None
        return adopted or own is None or own.holder != self._me.node or key_of(own) is None

    async def _adopt_one(
        self, key: DeviceKey, lock: Lock, ports: Sequence[PortState], users: Mapping[str, User], *, complete: bool
    ) -> None:
        mine = lock.holder == self._me.node
        others = self._locks.mine() if mine else ()
        there = next((other for other in others if other.in_place_of == key.id and key_of(other)), None)
        moved_to, at = (key_of(there), there) if there is not None else (None, lock)
        place = moved_to or key
        alive = not mine or lock.boot_id == at.boot_id == self._me.boot_id
        port = own_port(place, ports, at.port if mine else None) if alive else None
        attachment = await self._driver.inspect(place, port.number) if port is not None else None
        usb_id = parse_usb_id(lock.usb_id) or (attachment.usb_id if attachment is not None else UsbId(0, 0))
        if attachment is not None and attachment.usb_id != usb_id:
            attachment, port = None, None  # a stale record: what stands there is somebody else's
        user = users.get(key.id)
        handed = self._specs.recall(key.id, user.resource if user is not None else None)
        used = True if user is not None else False if complete else None
        claim = Claim(
            key,
            usb_id,
            resource=user.resource if user is not None else handed.resource if handed is not None else None,
            numbers=handed.numbers if handed is not None else (),
            port=port.number if port is not None else None,
            attachment=replace(attachment, key=key) if attachment is not None else None,
            traceparent=lock.traceparent,
            allocated_at=self._clock.monotonic(),
            pod=lock.pod if mine else user.pod if user is not None else None,
            serial=(attachment.serial if attachment is not None else None) or lock.serial or None,
            moved_to=moved_to,
        )
        if not mine:
            self._work.book.move(claim, Event.DEPRIVED)
            log.error("lock lost", extra={"device": str(key), "holder": lock.holder})
            self._work.spawn(self._withdraw(key.id), f"withdraw {key}")
            return
        orphan = lock.in_place_of is not None
        verdict = decide_adoption(lock, self._me, attached=attachment is not None, used=used, orphan=orphan)
        attributes = device_attributes(key) | pod_attributes(lock.pod) | {"usbip.adoption": verdict.name.lower()}
        with span(self._tracer, "adopt", attributes, context=remote_parent(claim.traceparent)):
            self._adopt_as(claim, verdict)

    def _adopt_as(self, claim: Claim, verdict: Adoption) -> None:
        key = claim.key
        match verdict:
            case Adoption.ADOPT:
                self._adopt_attached(claim)
            case Adoption.REATTACH:
                self._work.book.move(claim, Event.ORPHANED)
                self._work.spawn(self._reattach(key.id), f"re-attach {key}")
            case Adoption.RELEASE:
                self._work.book.move(claim, Event.UNUSED)
                self._work.spawn(self._work.finish_locked(key.id, State.RELEASING), f"release {key}")

    def _adopt_attached(self, claim: Claim) -> None:
        try:
            if claim.attachment is not None:
                self._specs.write(claim, claim.attachment)  # the predecessor may have died before it did
        except CdiError as error:
            log.warning("CDI spec not true", extra={"device": str(claim.key), "cause": str(error)})
            self._work.book.move(claim, Event.ORPHANED)
            self._work.spawn(self._reattach(claim.id), f"re-attach {claim.key}")
        else:
            self._work.book.move(claim, Event.ADOPTED)
            log.info("adopted", extra={"device": str(claim.key), "port": claim.port, "place": str(claim.place)})

    # losing the port, losing the lock

    async def verify(self, device_id: str) -> None:
        """Looks now whether a device stands attached as its claim says, and which nodes it has. VhciError, CdiError."""
        await self._check_port(device_id, await self._driver.ports())
        claim = self._work.book.get(device_id)
        if claim is None or claim.state is not State.ATTACHED or claim.attachment is None or claim.port is None:
            return
        now = await self._driver.inspect(claim.place, claim.port)
        if now is not None and self._work.book.get(device_id) == claim and _grew(claim.attachment, now):
            now = replace(now, key=claim.key)
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

    async def _check_port(self, device_id: str, ports: Sequence[PortState]) -> None:
        claim = self._work.book.get(device_id)
        if claim is None or claim.state is not State.ATTACHED or await self._work.pipeline.stands(claim, ports):
            return
        now = self._work.book.get(device_id)
        if now is None or now.state is not State.ATTACHED or now.attachment != claim.attachment:
            return
        # the state moves here and now, so that the withdrawal does not wait for the mutex
        self._work.book.move(now, Event.PORT_LOST)
        with within(claim.traceparent):
            log.warning("attachment lost", extra={"device": str(claim.key), "port": claim.port})
        self._on_notice(Notice(What.LOST, claim.key, f"vhci port {claim.port} fell free, re-attaching", claim.pod))
        self._work.spawn(self._reattach(device_id), f"re-attach {claim.key}")

    async def _reattach(self, device_id: str) -> None:
        """Until the device is attached again, its pod is gone, or its lock is."""
        waits = retry.backoff(self._rng, REATTACH_FIRST_WAIT, REATTACH_MAX_WAIT)
        stir = self._stirs[device_id] = asyncio.Event()
        claim = self._work.book[device_id]
        # what the pod has; a try that attaches and then fails replaces it in the book
        before = claim.attachment
        try:
            attributes, context = (
                device_attributes(claim.key) | pod_attributes(claim.pod),
                remote_parent(claim.traceparent),
            )
            with span(self._tracer, "re-attach", attributes, context=context) as whole:
                tries = Tries(whole)
                while await self._reattach_once(device_id, before, whole, tries, promising=stir.is_set()):
                    stir.clear()
                    with contextlib.suppress(TimeoutError):
                        async with self._clock.timeout(next(waits)):
                            await stir.wait()
        finally:
            if self._stirs.get(device_id) is stir:
                del self._stirs[device_id]
        after = self._work.book.get(device_id)
        if after is not None and after.state is State.LOST:
            await self._clock.sleep(REATTACH_FIRST_WAIT)
            self._regain(device_id)

    async def _reattach_once(
        self, device_id: str, before: Attachment | None, whole: Span, tries: Tries, *, promising: bool
    ) -> bool:
        """True if it should be tried again."""
        async with self._work.mutex(device_id):
            claim = self._work.book.get(device_id)
            if claim is None or claim.state is not State.REATTACHING:
                return False
            try:
                with tries.one(promising=promising):
                    async with self._clock.timeout(REATTACH_TIMEOUT):
                        after = await self._attach(device_id, self._clock.monotonic() + REATTACH_TIMEOUT)
            except LockLost as error:
                self._on_reattach(Reattach.FAILED)
                failed(whole, error)
                if self._work.book[device_id].state is State.REATTACHING:
                    self._work.book.move(self._work.book[device_id], Event.LOCK_LOST)
                await self._work.finish(device_id, keep=True)
                return False
            except (TimeoutError, LockError, KubeError, UsbipError, VhciError, CdiError) as error:
                self._on_reattach(Reattach.FAILED)
                tries.failed(error)
                log.debug("re-attach failed, will retry", extra={"device": str(claim.key), "cause": str(error)})
                self._note_trouble(claim, error)
                return True
        self._tell_move(claim, whole)
        self._reattached(claim, before, after, whole)
        return False

    def _note_trouble(self, claim: Claim, error: Exception) -> None:
        """What only this node's operator can mend is the device's reason, and is told once."""
        now = self._work.book.get(claim.id)
        if not isinstance(error, CdiError | RecordNotWritable) or now is None or now.hindrance == str(error):
            return
        self._work.book.put(replace(now, hindrance=str(error)))
        log.warning("not re-attached", extra={"device": str(claim.key), "cause": str(error)})
        self._on_notice(Notice(What.NOT_REATTACHED, claim.key, str(error), claim.pod))

    async def _attach(self, device_id: str, deadline: float) -> Attachment:
        """From the claim's place or, if the device is not there, from where its server lists it now."""
        claim = self._work.book[device_id]
        cause: PluginError | None = self.seeker.wrong_at_home(claim)
        if cause is None:
            try:
                return await self._attach_from_place(device_id, deadline)
            except DeviceBusy:
                raise
            except (ImportRefused, WrongDevice, WrongSerial) as error:
                if claim.moved_to is not None:
                    self.look_again(device_id)  # its own place comes next, at once
                    raise
                cause = error
        place = self._seek(device_id, cause)
        if place is None or self._work.mutex(place.id).locked():
            raise cause
        # from here on a lock on that place is this claim's, whatever becomes of who takes it
        self._work.book.put(replace(self._work.book[device_id], moved_to=place))
        return await self._attach_from_place(device_id, deadline)

    async def _attach_from_place(self, device_id: str, deadline: float) -> Attachment:
        place = self._work.book[device_id].place
        try:
            return await self._work.pipeline.reattach(device_id, deadline)
        except DeviceBusy:
            raise
        except (ImportRefused, WrongDevice, WrongSerial, LockHeld) as error:
            self.seeker.not_there(place, error)
            if self._work.book[device_id].moved_to is not None:
                if isinstance(error, WrongSerial):
                    await self._work.write_serial(place, error.found)
                await self._work.pipeline.leave(device_id)
            raise

    def _seek(self, device_id: str, cause: PluginError) -> DeviceKey | None:
        """Where the device is instead; what keeps it from being attached is noted, and told once."""
        claim = self._work.book[device_id]
        verdict = self.seeker.find(claim)
        if isinstance(verdict, Ask):
            return None  # it is tried again as soon as that is known
        hindrance = str(cause) if isinstance(cause, WrongDevice | WrongSerial) else ""
        if isinstance(verdict, Ambiguous):
            busids = " and ".join(key.busid for key in verdict.keys)
            hindrance = f"{busids} both have its serial number {claim.serial}, so neither is taken for it"
        if hindrance != claim.hindrance:
            self._work.book.put(replace(claim, hindrance=hindrance))
            if hindrance:
                log.warning("not re-attached", extra={"device": str(claim.key), "cause": hindrance})
                self._on_notice(Notice(What.NOT_REATTACHED, claim.key, hindrance, claim.pod))
        return verdict.key if isinstance(verdict, Found) else None

    def _tell_move(self, before: Claim, whole: Span) -> None:
        claim = self._work.book.get(before.id)
        if claim is None or claim.moved_to == before.moved_to:
            return
        whole.set_attribute("usbip.moved_to", claim.place.busid)
        log.info("followed", extra={"device": str(claim.key), "place": str(claim.place)})
        text = f"its server lists it as {claim.place.busid} now; it is attached from there"
        self._on_notice(Notice(What.MOVED, claim.key, text, claim.pod))
        if claim.moved_to is not None and claim.pod is not None:
            self._work.spawn(self._work.note_pod(claim.moved_to, claim.pod), f"note pod {claim.pod}")

    def _reattached(self, claim: Claim, before: Attachment | None, after: Attachment, whole: Span) -> None:
        verdict = after_reattach(before, after, self._on_loss(claim), claim.pod, by_cdi=bool(claim.numbers))
        same = verdict is AfterReattach.GOES_ON
        self._on_reattach(Reattach.SAME_NODES if same else Reattach.OTHER_NODES)
        whole.set_attribute("usbip.same_nodes", same)
        log.info("re-attached", extra={"device": str(claim.key), "port": after.port, "same_nodes": same})
        known = {AfterReattach.GOES_ON: What.REATTACHED, AfterReattach.RESTART: What.RESTART_NEEDED}
        what = known.get(verdict, What.NODES_CHANGED)
        self._on_notice(Notice(what, claim.key, verdict.value, claim.pod))
        if verdict is AfterReattach.EVICT and claim.pod is not None:
            self._evict(claim.pod)
        lock = self._locks.locks.get(claim.id)
        if claim.pod is not None and lock is not None and lock.pod is None:  # it was taken anew
            self._work.spawn(self._work.note_pod(claim.key, claim.pod), f"note pod {claim.pod}")

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
            if self._on_loss(claim) is OnLoss.EVICT and claim.pod is not None and claim.pod.uid is not None:
                self._evict(claim.pod)
        self.look_again(change.device_id)
        self._work.spawn(self._withdraw(change.device_id), f"withdraw {claim.key}")

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
            self._work.spawn(self._reattach(device_id), f"re-attach {claim.key}")

    def _place_lost(self, device_id: str, holder: str) -> None:
        """R6 for a place that a device was followed to: the claim stays, the attachment does not."""
        claim = self._work.book.moved_here(device_id)
        if claim is None or claim.state is not State.ATTACHED:
            return
        self._work.book.move(claim, Event.PORT_LOST)
        log.error("lock lost", extra={"device": str(claim.key), "place": str(claim.place), "holder": holder})
        text = f"the lock of {claim.place} names {holder or 'nobody'} now; it is detached here"
        self._on_notice(Notice(What.LOST, claim.key, text, claim.pod))
        self._work.spawn(self._reattach(claim.id), f"re-attach {claim.key}")


def _grew(before: Attachment, now: Attachment) -> bool:
    """The same enumeration of the device with other child nodes: a driver came late, or another was bound."""
    return now.nodes[:1] == before.nodes[:1] and now.nodes != before.nodes
