"""Re-attaches lost devices from where servers list them now, and decides what a re-attach means for the pod."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable
from dataclasses import replace

from opentelemetry.trace import Span

from usbip_plugin.attach.events import DeviceEvent, EventKind, EventSink, Reattach
from usbip_plugin.attach.locate import Ambiguous, DeviceLocator, NeedsProbe
from usbip_plugin.attach.pipeline import Pipeline, with_usb_id
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimEvent, ClaimState, Resources, place_of
from usbip_plugin.clock import backoff
from usbip_plugin.config.schema import OnLoss
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import (
    CdiError,
    DeviceBusy,
    ImportRefused,
    KubeError,
    LockError,
    LockHeld,
    LockLost,
    LockReleased,
    NodesMissing,
    PluginError,
    RecordNotWritable,
    ServerTimeout,
    ServerUnreachable,
    UsbipError,
    VhciError,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Attachment, DeviceKey, Identity, PodRef
from usbip_plugin.observe.spans import Tries, device_attributes, failed, pod_attributes, span
from usbip_plugin.observe.tracing import remote_parent
from usbip_plugin.sync import done_within
from usbip_plugin.usbip.poller import ServerPoller, ServerView
from usbip_plugin.vhci.children import wants

log = logging.getLogger(__name__)


class AfterReattach(enum.Enum):
    """The effect of a re-attach on the pod that has the device."""

    GOES_ON = "re-attached with the same device nodes"
    CHILDREN_GO_ON = "re-attached with the same device nodes, except its USB node"
    STALE = "re-attached with other device nodes; recreate the pod to use them"
    RENEWED = "re-attached with other device nodes; a container gets them at its next start"
    RESTART = "re-attached with other device nodes; the container must restart to get them"
    EVICT = "re-attached with other device nodes; evicting the pod"


def after_reattach(
    before: Attachment | None,
    after: Attachment,
    on_loss: OnLoss,
    pod: PodRef | None,
    *,
    by_cdi: bool = False,
    children: tuple[str, ...] | None = None,
) -> AfterReattach:
    """Decides what a re-attach means for the pod, from the device nodes before and after.

    If paths and numbers are the same, the pod can go on as soon as it opens the device again. The kernel gives the USB
    node a new number at each attach.

    before: the attachment whose nodes the containers have; None if it is not known.
    pod: evicted only if its uid is known, because another pod may have its name by now.
    by_cdi: whether its containers got the device by CDI: they get the nodes of the updated spec at their next start.
        Other containers keep the paths of their Allocate.
    children: the kinds of child nodes that the resource names. If these nodes are the same, the pod goes on.
    """
    if before is not None and before.nodes == after.nodes:
        return AfterReattach.GOES_ON
    if before is not None and children:
        # a device with another USB ID has the same nodes under other by-id names
        had, has = (
            tuple(replace(node, interface=None, by_id="") for node in one.nodes[1:] if wants(children, node))
            for one in (before, after)
        )
        if had and had == has:
            return AfterReattach.CHILDREN_GO_ON
    if on_loss is OnLoss.EVICT and pod is not None and pod.uid is not None:
        return AfterReattach.EVICT
    if not by_cdi:
        return AfterReattach.STALE
    return AfterReattach.RESTART if on_loss is OnLoss.RESTART else AfterReattach.RENEWED


REATTACH_FIRST_WAIT = 0.2
"""Seconds between the first two tries to re-attach a lost device. The wait doubles with each try."""
REATTACH_MAX_WAIT = 3.5
"""Longest wait in seconds, without jitter (20 %), between two tries to re-attach a lost device.

With jitter and the attach itself, a device is re-attached within 5 s of the return of its server.
"""
REATTACH_TIMEOUT = 10.0
"""Longest time in seconds for one try to re-attach a device. A childrenTimeout beyond the default adds to it."""
UNDO_TIME = 0.5
"""Seconds of such a try kept for the detach of a device that does not enumerate; measured 13-29 ms."""


class Reattacher:
    """Re-attaches lost devices. All methods belong to one event loop."""

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        poller: ServerPoller,
        resources: Resources,
        tasks: DeviceTasks,
        pipeline: Pipeline,
        locator: DeviceLocator,
        events: EventSink,
        evict: Callable[[PodRef, str], None],
        on_reattach: Callable[[Reattach], None],
    ) -> None:
        """Subscribes to the poller, the locks and the locator.

        evict(pod, cause): begins to evict a pod whose device was re-attached with other device nodes.
        on_reattach: called with the result of each try.
        """
        self._clock = context.clock
        self._rng = context.rng
        self._tracer = context.tracer
        self._locks = locks
        self._resources = resources
        self._tasks = tasks
        self._pipeline = pipeline
        self.locator = locator
        self._events = events
        self._evict = evict
        self._on_reattach = on_reattach
        self._wakeups: dict[str, asyncio.Event] = {}
        locator.probe_ended.subscribe(self._look_everywhere)
        poller.subscribe(self._server_changed)
        locks.subscribe(self._lock_changed)

    def look_again(self, device_id: str) -> None:
        """Ends the wait of a re-attach: it makes its next try now, or ends if its claim is no longer Reattaching."""
        if (wakeup := self._wakeups.get(device_id)) is not None:
            wakeup.set()

    def _server_changed(self, view: ServerView) -> None:
        """Starts the next try at once for each lost device that the server may list, see may_be_listed()."""
        self.locator.server_changed(view)
        for device_id in self._wakeups:
            claim = self._tasks.book.get(device_id)
            if claim is not None and self.locator.may_be_listed(claim, view.server):
                self.look_again(device_id)

    def _lock_changed(self, change: LockChange) -> None:
        """Starts the next try at once for each lost device that may be the one whose lock another node has released.

        It may have taken the lock only to read the serial number.
        """
        if not change.former or change.new is None or change.new.holder:
            return
        for device_id in self._wakeups:
            claim = self._tasks.book.get(device_id)
            if claim is not None and claim.serial and claim.serial == change.new.serial:
                self.look_again(device_id)

    def pod_known(self, claim: Claim) -> None:
        """Begins to evict the claim's pod if its device came back with other device nodes before the pod was known.

        To be called when the pod becomes known. Only resources with onLoss evict do so, see after_reattach().
        """
        if claim.state is ClaimState.ATTACHED and claim.allocated_as is not None and claim.attachment is not None:
            self._evict_if(self._verdict(claim, claim.allocated_as, claim.attachment), claim)

    def _look_everywhere(self) -> None:
        for wakeup in self._wakeups.values():
            wakeup.set()

    async def reattach(self, device_id: str) -> None:
        """Tries to re-attach the device until it is attached, its pod is gone or its lock is lost.

        Leaves a device whose lock is lost as it is. The claim must be in the state Reattaching.
        """
        waits = backoff(self._rng, REATTACH_FIRST_WAIT, REATTACH_MAX_WAIT)
        wakeup = self._wakeups[device_id] = asyncio.Event()
        claim = self._tasks.book[device_id]
        before = claim.allocated_as
        attributes = device_attributes(claim.key) | pod_attributes(claim.pod)
        began, evicting = self._clock.monotonic(), False
        try:
            with span(self._tracer, "re-attach", attributes, context=remote_parent(claim.traceparent)) as whole:
                tries = Tries(whole)
                while await self._reattach_once(device_id, before, whole, tries, promising=wakeup.is_set()):
                    wakeup.clear()
                    evicting = evicting or self._evict_if_away(device_id, self._clock.monotonic() - began)
                    await done_within(self._clock, next(waits), wakeup.wait())
        finally:
            if self._wakeups.get(device_id) is wakeup:
                del self._wakeups[device_id]

    def _evict_if_away(self, device_id: str, seconds: float) -> bool:
        """Begins to evict the pod if its device has been lost for evictAfter. Returns whether it did.

        seconds: since the loss, or since this process adopted the lost device.
        """
        claim = self._tasks.book.get(device_id)
        limit = self._resources.resource_of(claim).evict_after if claim is not None else None
        if claim is None or claim.pod is None or claim.pod.uid is None or limit is None or seconds < limit:
            return False
        self._evict(claim.pod, f"{claim.key} did not come back within {limit:g} s")
        return True

    async def _reattach_once(
        self, device_id: str, before: Attachment | None, whole: Span, tries: Tries, *, promising: bool
    ) -> bool:
        """Makes one try to re-attach the device. Returns whether another try should follow."""
        async with self._tasks.mutex(device_id):
            claim = self._tasks.book.get(device_id)
            if claim is None or claim.state is not ClaimState.REATTACHING:
                return False
            resource = self._resources.resource_of(claim)
            if (resource.children, resource.children_timeout) != (claim.children, claim.children_timeout):
                claim = replace(claim, children=resource.children, children_timeout=resource.children_timeout)
                self._tasks.book.put(claim)
            try:
                with tries.one(traced=promising):
                    limit = REATTACH_TIMEOUT + claim.extra_timeout
                    async with self._clock.timeout(limit):
                        after = await self._attach(device_id, self._clock.monotonic() + limit - UNDO_TIME)
            except LockLost as error:
                self._on_reattach(Reattach.FAILED)
                failed(whole, error)
                if self._tasks.book[device_id].state is ClaimState.REATTACHING:
                    self._tasks.book.move(self._tasks.book[device_id], ClaimEvent.LOCK_LOST)
                return False
            except (TimeoutError, LockError, KubeError, UsbipError, VhciError, CdiError) as error:
                self._on_reattach(Reattach.FAILED)
                tries.failed(error)
                log.debug("re-attach failed, will retry", extra={"device": str(claim.key), "cause": str(error)})
                if isinstance(error, CdiError | RecordNotWritable | NodesMissing):
                    self._set_obstacle(device_id, str(error))
                return True
        self._report_move(claim, whole)
        self._reattached(claim, before, after, whole)
        return False

    def _set_obstacle(self, device_id: str, obstacle: str) -> None:
        """Sets the claim's blocked_by to what an operator must repair, "" for nothing, and reports it once."""
        claim = self._tasks.book[device_id]
        if claim.blocked_by == obstacle:
            return
        self._tasks.book.put(replace(claim, blocked_by=obstacle))
        if obstacle:
            log.warning("device not re-attached", extra={"device": str(claim.key), "cause": obstacle})
            self._events(DeviceEvent(EventKind.NOT_REATTACHED, claim.key, obstacle, claim.pod))

    async def _attach(self, device_id: str, deadline: float) -> Attachment:
        """Attaches the device from the claim's location or, if it is not there, from where a server lists it now."""
        claim = self._tasks.book[device_id]
        if await self._pipeline.still_attached(device_id) is not None:
            return await self._attach_from_location(device_id, deadline)
        cause: PluginError | None = (
            self.locator.serial_mismatch(claim)
            or self.locator.server_error(claim)
            or self.locator.replaced(claim)
            or self.locator.unlisted(claim)
        )
        if cause is None:
            self._accept_listed_usb_id(claim)
        found = self._locate(device_id, cause) if cause is not None else None
        if cause is None or (found is None and isinstance(cause, ServerUnreachable)):
            try:
                return await self._attach_from_location(device_id, deadline)
            except DeviceBusy:
                raise
            except (ImportRefused, WrongDevice, WrongSerial) as error:
                if claim.moved_to is not None:
                    self.look_again(device_id)  # the claim's own bus ID is tried next, at once
                    raise
                cause = error
            found = self._locate(device_id, cause)
        if found is None or self._tasks.mutex(found.id).locked():
            await self._pipeline.take_lock_again(device_id)
            raise cause
        # from here on a lock on that bus ID belongs to this claim, even if the task that acquires it fails
        self._tasks.book.put(replace(self._tasks.book[device_id], moved_to=found))
        return await self._attach_from_location(device_id, deadline)

    def _accept_listed_usb_id(self, claim: Claim) -> None:
        """Changes the claim's USB ID if its resource selects the device that is listed at the claim's location."""
        listed = self.locator.listed(claim)
        if listed is not None and listed.usb_id != claim.usb_id:
            accepted = with_usb_id(claim, self._resources.resource_of(claim), listed)
            if accepted is not None:
                self._pipeline.change_usb_id(accepted)
            else:
                self._set_obstacle(claim.id, str(WrongDevice(claim.location, claim.usb_id, listed.usb_id)))

    async def _attach_from_location(self, device_id: str, deadline: float) -> Attachment:
        claim = self._tasks.book[device_id]
        location = claim.location
        try:
            answers = self.locator.may_answer(location.server)
            return await self._pipeline.reattach(device_id, deadline, wait_for_list=answers)
        except DeviceBusy:
            raise
        except (ServerUnreachable, ServerTimeout) as error:
            if location.server != claim.key.server:  # the device may be at its own bus ID again, or elsewhere
                self.locator.attach_failed(location, error)
                await self._pipeline.detach_from_location(device_id)
            raise
        except (ImportRefused, WrongDevice, WrongSerial, LockHeld, LockReleased) as error:
            self.locator.attach_failed(location, error)
            if self._tasks.book[device_id].moved_to is not None:
                if isinstance(error, WrongSerial):
                    await self._tasks.record_identity(location, Identity(error.devid, error.found))
                await self._pipeline.detach_from_location(device_id)
            raise

    def _locate(self, device_id: str, cause: PluginError) -> DeviceKey | None:
        """Returns the location where a server lists the device now, or None if it is not known.

        cause: why the device is not attached from the claim's own bus ID. Sets the claim's blocked_by.
        """
        claim = self._tasks.book[device_id]
        verdict = self.locator.find(claim)
        if isinstance(verdict, NeedsProbe):
            return None  # the next try starts as soon as the probes have ended
        obstacle = str(cause) if isinstance(cause, WrongDevice | WrongSerial) else ""
        if isinstance(verdict, Ambiguous):
            locations = " and ".join(place_of(replace(claim, moved_to=key)) for key in verdict.keys)
            obstacle = f"serial number {claim.serial} was found at {locations}; neither is used"
        self._set_obstacle(device_id, obstacle)
        return verdict if isinstance(verdict, DeviceKey) else None

    def _report_move(self, before: Claim, whole: Span) -> None:
        claim = self._tasks.book.get(before.id)
        if claim is None or claim.moved_to == before.moved_to:
            return
        whole.set_attribute("usbip.moved_to", place_of(claim))
        log.info("device followed to another place", extra={"device": str(claim.key), "place": str(claim.location)})
        if claim.location.server == claim.key.server:
            where = f"its server now lists it as {claim.location.busid}"
        else:
            where = f"it is now plugged in at {claim.location}"
        self._events(DeviceEvent(EventKind.MOVED, claim.key, f"{where}; attached from there", claim.pod))

    def _reattached(self, claim: Claim, before: Attachment | None, after: Attachment, whole: Span) -> None:
        verdict = self._verdict(claim, before, after)
        same = verdict in (AfterReattach.GOES_ON, AfterReattach.CHILDREN_GO_ON)
        self._on_reattach(Reattach.SAME_NODES if same else Reattach.OTHER_NODES)
        whole.set_attribute("usbip.same_nodes", same)
        log.info("device re-attached", extra={"device": str(claim.key), "port": after.port, "same_nodes": same})
        changed = EventKind.RESTART_NEEDED if verdict is AfterReattach.RESTART else EventKind.NODES_CHANGED
        what = EventKind.REATTACHED if same else changed
        first = before.usb_id if before is not None else claim.usb_id
        other_id = f" (USB ID {after.usb_id}, was {first})" if after.usb_id != first else ""
        self._events(DeviceEvent(what, claim.key, verdict.value + other_id, claim.pod))
        self._evict_if(verdict, claim)

    def _verdict(self, claim: Claim, before: Attachment | None, after: Attachment) -> AfterReattach:
        resource, by_cdi = self._resources.resource_of(claim), bool(claim.container_indexes)
        return after_reattach(before, after, resource.on_loss, claim.pod, by_cdi=by_cdi, children=resource.children)

    def _evict_if(self, verdict: AfterReattach, claim: Claim) -> None:
        if verdict is AfterReattach.EVICT and claim.pod is not None:
            self._evict(claim.pod, f"{claim.key} was re-attached with other device nodes")
