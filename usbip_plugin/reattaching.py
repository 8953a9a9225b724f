"""Attaches lost devices again, from where their servers list them now; and what that means for the pod."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from opentelemetry.trace import Span

from usbip_plugin import retry
from usbip_plugin.attaching import Means
from usbip_plugin.claims import AfterReattach, Claim, Event, State, after_reattach
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
from usbip_plugin.model import Attachment, DeviceKey, PodRef
from usbip_plugin.notices import Notice, What
from usbip_plugin.observe.tracing import remote_parent
from usbip_plugin.seeker import Configured, Seeker
from usbip_plugin.spans import Tries, device_attributes, failed, pod_attributes, span
from usbip_plugin.usbip.poller import ServerView
from usbip_plugin.whereabouts import Ambiguous, Ask, Found
from usbip_plugin.work import DeviceWork

log = logging.getLogger(__name__)

REATTACH_FIRST_WAIT = 0.2
REATTACH_MAX_WAIT = 3.5
"""Seconds between tries to attach a lost device again; with jitter and the attach, 5 s after its server is back."""
REATTACH_TIMEOUT = 10.0
"""Seconds one such try may take."""


class Reattach(enum.Enum):
    """What one try to attach a lost device again came to."""

    SAME_NODES = "same_nodes"
    OTHER_NODES = "other_nodes"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the rest of the agent is told of lost devices, and asked about them.

    on_notice is told what people should hear of, on_reattach of each try; on_loss(claim) says what its resource wants,
    evict(pod) does it. configured: which devices may be looked at in search of a lost one.
    """

    on_notice: Callable[[Notice], None]
    on_reattach: Callable[[Reattach], None]
    on_loss: Callable[[Claim], OnLoss]
    evict: Callable[[PodRef], None]
    configured: Configured


class Reattacher:
    """The tries that are under way. All methods belong to one event loop."""

    def __init__(self, means: Means, work: DeviceWork, wishes: Wishes) -> None:
        self._work = work
        self.seeker = Seeker(means, work, wishes.configured, self._look_everywhere)
        self._locks = means.locks
        self._clock = means.clock
        self._rng = means.rng
        self._tracer = means.tracer
        self._on_notice = wishes.on_notice
        self._on_reattach = wishes.on_reattach
        self._on_loss = wishes.on_loss
        self._evict = wishes.evict
        self._stirs: dict[str, asyncio.Event] = {}

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

    async def reattach(self, device_id: str) -> None:
        """Until the device is attached again, its pod is gone, or its lock is. The claim is Reattaching."""
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
