"""Attaches the devices that an Allocate asks for.

Each device has its own mutex, so an attach waits for that of another device only during the driver's short sysfs
writes. Attaches run in tasks of one TaskGroup, and outlive their callers. So an Allocate that gives up, or a kubelet
that hangs up, never leaves a half-done attachment: the task that began it also undoes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from opentelemetry import trace

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.pipeline import Pipeline, Progress
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimEvent, ClaimState, allocated, serves
from usbip_plugin.config.schema import DEFAULT_CHILDREN_TIMEOUT_S
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import AllocateTimeout, ClaimBusy, PluginError, is_device_failure
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import Attachment, DeviceKey, Identity, UsbId
from usbip_plugin.observe.tracing import links_to, traceparent_of

_BUSY = {
    ClaimState.REATTACHING: "is being re-attached",
    ClaimState.RELEASING: "is being released",
    ClaimState.LOST: "has lost its lock",
}


AllocateOutcome = Callable[[DeviceKey, PluginError | None, float], None]
"""Callback for the outcome of an Allocate for one device: its error, None if it succeeded, and the seconds it took."""


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """One device that an Allocate asks for, as it was offered to the kubelet under its ID.

    usb_id: the USB ID that the device must have.
    resource: the resource's name without the domain.
    children, children_timeout, container_indexes: see Claim.
    serial: the serial number in its selector, None if there is none.
    identity: what its server's list contains about it, to be written to its lock.
    """

    key: DeviceKey
    usb_id: UsbId
    resource: str
    children: tuple[str, ...] | None = None
    children_timeout: float = DEFAULT_CHILDREN_TIMEOUT_S
    serial: str | None = None
    container_indexes: tuple[int, ...] = ()
    identity: Identity | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one device of an Allocate.

    newly_attached: whether this Allocate attached it, so that the attach is undone if another device fails.
    """

    attachment: Attachment
    newly_attached: bool


class Attacher:
    """Attaches the devices of each Allocate: all of them, or none. All methods belong to one event loop."""

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        specs: CdiSpecs,
        tasks: DeviceTasks,
        pipeline: Pipeline,
        releaser: Releaser,
        on_outcome: AllocateOutcome,
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._locks = locks
        self._specs = specs
        self._tasks = tasks
        self._book = tasks.book
        self._pipeline = pipeline
        self._releaser = releaser
        self._on_outcome = on_outcome

    async def allocate(
        self, wanted: Sequence[DeviceRequest], timeout: float, accept: Callable[[Sequence[Attachment]], None]
    ) -> tuple[Attachment, ...]:
        """Attaches all devices, in sorted order, or none, within timeout seconds.

        Returns the attachments in the order of wanted. A device that is attached already keeps its live attachment.
        Raises AllocateTimeout, ClaimBusy, LockError, UsbipError, VhciError or CdiError.
        Cancel-safe: an attach that has begun runs to its end, and the device is released once no pod has it.

        accept: called with the answer. It may raise a PluginError, which is passed on; then none is newly attached.
        """
        deadline = self._clock.monotonic() + timeout
        done: dict[str, Outcome] = {}
        try:
            for item in sorted(wanted, key=lambda w: w.key):
                if item.key.id not in done:
                    done[item.key.id] = await self._one(item, deadline, timeout)
            answer = tuple(self._current(item, done) for item in wanted)
            accept(answer)
        except BaseException:
            for device_id, outcome in done.items():
                if outcome.newly_attached and (claim := self._book.get(device_id)) is not None:
                    same = partial(_same_allocate, claim)
                    self._tasks.spawn(self._releaser.release_if(device_id, same), f"undo {claim.key}")
            raise
        return answer

    def _current(self, wanted: DeviceRequest, done: Mapping[str, Outcome]) -> Attachment:
        """Returns a device's attachment once all devices of the Allocate are attached.

        An earlier one may have been re-attached since, with other device nodes. Raises ClaimBusy if it was lost.
        ALLOCATION_GRACE begins again, because the kubelet lists the devices only after the answer.
        """
        claim = self._book.get(wanted.key.id)
        if claim is None or claim.state is not ClaimState.ATTACHED or claim.attachment is None:
            others = ", ".join(sorted(str(outcome.attachment.key) for i, outcome in done.items() if i != wanted.key.id))
            raise ClaimBusy(f"{wanted.key} was lost during the attach of {others or 'it'}; try again in a few seconds")
        self._book.put(
            replace(claim, allocated_at=self._clock.monotonic(), missed_polls=0, allocated_as=claim.attachment)
        )
        return claim.attachment

    async def _one(self, wanted: DeviceRequest, deadline: float, timeout: float) -> Outcome:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        task = self._tasks.spawn(self._obtain(wanted, deadline, timeout, answer), f"allocate {wanted.key}")
        # only a cancelled task, in a plugin that stops, ends without an answer
        stopped = ClaimBusy(f"{wanted.key}: the plugin on this node is stopping; try again")
        task.add_done_callback(lambda _task: _settle(answer, stopped))
        return await asyncio.shield(answer)

    async def _obtain(
        self, wanted: DeviceRequest, deadline: float, timeout: float, answer: asyncio.Future[Outcome]
    ) -> None:
        """Obtains one device of an Allocate under its mutex, and sets `answer` as soon as the result is known.

        After a failure, undoes the finished steps once `answer` is set.
        """
        began = self._clock.monotonic()
        progress = Progress("waiting for the list of all locks (API server)")
        mutex = self._tasks.mutex(wanted.key.id)
        held = False
        failure: PluginError | None = None
        try:
            try:
                async with self._clock.timeout(max(0.0, deadline - self._clock.monotonic())):
                    await self._tasks.until_adopted()
                    progress.doing = "waiting for another task of this device"
                    held = await mutex.acquire()
                    outcome = await self._obtain_locked(wanted, deadline, progress)
                self._on_outcome(wanted.key, None, self._clock.monotonic() - began)
                _settle(answer, outcome)
            except TimeoutError:
                text = f"{wanted.key}: {timeout:g} s passed (allocateTimeout) while {progress.doing}"
                failure = AllocateTimeout(text, at_device=progress.at_device)
            except PluginError as error:
                failure = error
            if failure is not None:
                self._on_outcome(wanted.key, failure, self._clock.monotonic() - began)
                _settle(answer, failure)
            if held and answer.exception() is not None:
                await self._undo(wanted.key.id, failed=failure is not None and is_device_failure(failure))
        finally:
            if held:
                mutex.release()

    async def _obtain_locked(self, wanted: DeviceRequest, deadline: float, progress: Progress) -> Outcome:
        now = self._clock.monotonic()
        live = self._book.get(wanted.key.id)
        if live is not None:
            if live.state is not ClaimState.ATTACHED or live.attachment is None:
                doing = _BUSY.get(live.state, "is being allocated")
                raise ClaimBusy(f"{wanted.key} {doing} on this node; try again in a few seconds")
            if not serves(live, wanted.resource, wanted.usb_id):
                through = f"resource {live.resource or 'unknown'}, as device {live.usb_id}"
                raise ClaimBusy(f"{wanted.key} is in use on this node through {through}")
            attachment = live.attachment
            indexes = tuple(sorted({*(live.container_indexes or ()), *wanted.container_indexes}))
            live = replace(
                allocated(live, now), resource=wanted.resource, container_indexes=indexes, allocated_as=attachment
            )
            self._specs.write(live, attachment)
            self._book.put(live)
            for key in live.locked:
                lock = self._locks.locks.get(key.id)
                if lock is not None and lock.pod is not None:
                    self._tasks.spawn(self._tasks.note_pod(key, None), f"note another pod of {key}")
            allocate = trace.get_current_span()
            allocate.set_attribute("usbip.reused", value=True)
            for link in links_to(live.traceparent):
                allocate.add_link(link.context)
            return Outcome(attachment, newly_attached=False)
        if (other := self._book.moved_here(wanted.key.id)) is not None:
            raise ClaimBusy(f"{wanted.key} is in use on this node: it is the device that was allocated as {other.key}")
        claim = Claim(
            wanted.key,
            wanted.usb_id,
            resource=wanted.resource,
            children=wanted.children,
            children_timeout=wanted.children_timeout,
            traceparent=traceparent_of(trace.get_current_span()),
            allocated_at=now,
            serial=wanted.serial,
            container_indexes=wanted.container_indexes,
        )
        return Outcome(await self._pipeline.attach_new(claim, wanted.identity, deadline, progress), newly_attached=True)

    async def _undo(self, device_id: str, *, failed: bool) -> None:
        """Detaches and releases the device of a failed Allocate. The caller holds the mutex.

        A claim that is not Locking, Importing or Attaching was not made by this Allocate, and stays.
        """
        claim = self._book.get(device_id)
        if claim is None or claim.state not in (ClaimState.LOCKING, ClaimState.IMPORTING, ClaimState.ATTACHING):
            return
        lock = self._locks.locks.get(device_id)
        taken = lock is not None and lock.holder not in ("", self._me.node)
        self._book.move(
            claim, ClaimEvent.LOCK_LOST if taken and claim.state is not ClaimState.LOCKING else ClaimEvent.FAILED
        )
        await self._releaser.detach_and_release(device_id, failed=failed)


def _same_allocate(before: Claim, now: Claim) -> bool:
    return now.allocated_at == before.allocated_at  # each Allocate for the device sets it


def _settle(answer: asyncio.Future[Outcome], result: Outcome | PluginError) -> None:
    if answer.done():
        return
    if isinstance(result, Outcome):
        answer.set_result(result)
    else:
        answer.set_exception(result)
        answer.exception()  # the caller may have hung up: then nobody else retrieves the exception
