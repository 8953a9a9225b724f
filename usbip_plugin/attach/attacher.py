"""Attaching what an Allocate asks for.

Each device has its own mutex, so nothing here waits for another device but for the driver's short sysfs writes. Work
on a device runs in tasks of one TaskGroup and outlives the caller that asked for it: an Allocate that gives up, or a
kubelet that hangs up, never leaves a half-done attachment, because the task that began it also undoes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from opentelemetry import trace

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.pipeline import DeviceRequest, Pipeline, Progress
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimEvent, ClaimState, allocated, serves
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import AllocateTimeout, ClaimBusy, PluginError
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import Attachment
from usbip_plugin.observe.tracing import links_to, traceparent_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one device of an Allocate. fresh: attached by this very call, so to be undone if another fails."""

    attachment: Attachment
    newly_attached: bool


class Attacher:
    """Attaches the devices of Allocates: all of one, or none. All methods belong to one event loop."""

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        specs: CdiSpecs,
        work: DeviceTasks,
        pipeline: Pipeline,
        releaser: Releaser,
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._locks = locks
        self._specs = specs
        self._work = work
        self._book = work.book
        self._pipeline = pipeline
        self._releaser = releaser

    async def allocate(
        self, wanted: Sequence[DeviceRequest], timeout: float, accept: Callable[[Sequence[Attachment]], None]
    ) -> tuple[Attachment, ...]:
        """Attaches all devices, in sorted order, or none; answers in the order asked, within timeout seconds.

        The same device again returns the live attachment. accept, called with the answer, may raise a PluginError:
        then none is attached. Raises that, AllocateTimeout, ClaimBusy, LockError, UsbipError, VhciError or CdiError.
        Cancel-safe: what was begun runs to its end and is let go by the usual rules.
        """
        deadline = self._clock.monotonic() + timeout
        done: dict[str, Outcome] = {}
        try:
            for item in sorted(wanted, key=lambda w: w.key):
                if item.key.id not in done:
                    done[item.key.id] = await self._one(item, deadline, timeout)
            answer = tuple(self._as_it_stands(item, done) for item in wanted)
            accept(answer)
        except BaseException:
            for device_id, outcome in done.items():
                if outcome.newly_attached and (claim := self._book.get(device_id)) is not None:
                    self._work.spawn(
                        self._releaser.release_if(device_id, partial(_same_allocate, claim)), f"undo {claim.key}"
                    )
            raise
        return answer

    def _as_it_stands(self, wanted: DeviceRequest, done: Mapping[str, Outcome]) -> Attachment:
        """A device of several, when the last is attached: the first may have been lost, or is back under other nodes.

        From now on the kubelet lists it: the grace begins.
        """
        if len(done) == 1:
            return done[wanted.key.id].attachment
        claim = self._book.get(wanted.key.id)
        if claim is None or claim.state is not ClaimState.ATTACHED or claim.attachment is None:
            state = claim.state.value if claim is not None else ClaimState.FREE.value
            others = ", ".join(sorted(str(outcome.attachment.key) for i, outcome in done.items() if i != wanted.key.id))
            raise ClaimBusy(f"{wanted.key} was lost while {others} was attached, and is {state}; try again")
        self._book.put(
            replace(claim, allocated_at=self._clock.monotonic(), missed_polls=0, allocated_as=claim.attachment)
        )
        return claim.attachment

    async def _one(self, wanted: DeviceRequest, deadline: float, timeout: float) -> Outcome:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        task = self._work.spawn(self._obtain(wanted, deadline, timeout, answer), f"allocate {wanted.key}")
        # of no effect once it is settled: only a cancelled task, that is, a plugin that ends, is done without
        stopped = ClaimBusy(f"{wanted.key}: the plugin on this node is being stopped; try again")
        task.add_done_callback(lambda _task: _settle(answer, stopped))
        return await asyncio.shield(answer)

    async def _obtain(
        self, wanted: DeviceRequest, deadline: float, timeout: float, answer: asyncio.Future[Outcome]
    ) -> None:
        """Owns one device of an Allocate: answers as soon as it is known how it ends, then undoes what is to be."""
        progress = Progress("waiting for earlier work on this device")
        mutex = self._work.mutex(wanted.key.id)
        held = False
        try:
            try:
                async with self._clock.timeout(max(0.0, deadline - self._clock.monotonic())):
                    held = await mutex.acquire()
                    outcome = await self._obtain_locked(wanted, deadline, progress)
                _settle(answer, outcome)
            except TimeoutError:
                words = f"{wanted.key}: {timeout:g} s passed (allocateTimeout) while {progress.doing}"
                _settle(answer, AllocateTimeout(words))
            except PluginError as error:
                _settle(answer, error)
            if held and answer.exception() is not None:
                await self._undo(wanted.key.id)
        finally:
            if held:
                mutex.release()

    async def _obtain_locked(self, wanted: DeviceRequest, deadline: float, progress: Progress) -> Outcome:
        now = self._clock.monotonic()
        live = self._book.get(wanted.key.id)
        if live is not None:
            if live.state is not ClaimState.ATTACHED or live.attachment is None:
                raise ClaimBusy(f"{wanted.key} is {live.state.value} on this node; the next try may find it ready")
            if not serves(live, wanted.resource, wanted.usb_id):
                raise ClaimBusy(f"{wanted.key} is in use on this node as a {live.usb_id} of {live.resource}")
            attachment, numbers = (
                live.attachment,
                tuple(sorted({*(live.container_indexes or ()), *wanted.container_indexes})),
            )
            live = replace(
                allocated(live, now), resource=wanted.resource, container_indexes=numbers, allocated_as=attachment
            )
            self._specs.write(live, attachment)
            self._book.put(live)
            allocate = trace.get_current_span()
            allocate.set_attribute("usbip.reused", value=True)
            for link in links_to(live.traceparent):
                allocate.add_link(link.context)
            return Outcome(attachment, newly_attached=False)
        if (other := self._book.moved_here(wanted.key.id)) is not None:
            raise ClaimBusy(f"{wanted.key} is in use on this node: it is what was {other.key}")
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
        return Outcome(await self._pipeline.attach_new(claim, wanted, deadline, progress), newly_attached=True)

    async def _undo(self, device_id: str) -> None:
        """After a failed Allocate. The mutex is held; a claim in a settled state was not this Allocate's doing."""
        claim = self._book.get(device_id)
        if claim is None or claim.state not in (ClaimState.LOCKING, ClaimState.IMPORTING, ClaimState.ATTACHING):
            return
        lock = self._locks.locks.get(device_id)
        taken = lock is not None and lock.holder not in ("", self._me.node)
        self._book.move(
            claim, ClaimEvent.LOCK_LOST if taken and claim.state is not ClaimState.LOCKING else ClaimEvent.FAILED
        )
        await self._releaser.detach_and_release(device_id)


def _same_allocate(before: Claim, now: Claim) -> bool:
    """Nobody has asked for the device again meanwhile."""
    return now.allocated_at == before.allocated_at


def _settle(answer: asyncio.Future[Outcome], result: Outcome | PluginError) -> None:
    if answer.done():
        return
    if isinstance(result, Outcome):
        answer.set_result(result)
    else:
        answer.set_exception(result)
        answer.exception()  # the caller may have hung up: then nobody else looks at it
