"""Every device this node does something with: what an Allocate asks for, who uses it, and how it ends.

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

from usbip_plugin.attach.events import Notice, What, attached, network, taken_over
from usbip_plugin.attach.monitor import Keeper
from usbip_plugin.attach.pipeline import Means, Progress, Wanted
from usbip_plugin.attach.reattach import Wishes
from usbip_plugin.attach.release import Unlisted, observe_usage, usage_ended
from usbip_plugin.attach.tasks import DeviceWork
from usbip_plugin.claims import IN_USE, Claim, Event, State, User, allocated, same_pod, serves
from usbip_plugin.errors import AllocateTimeout, ClaimBusy, PluginError
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Identity, Lock, PodRef
from usbip_plugin.observe.tracing import links_to, traceparent_of
from usbip_plugin.usbip.poller import ServerView

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one device of an Allocate. fresh: attached by this very call, so to be undone if another fails."""

    attachment: Attachment
    fresh: bool


class Attacher:
    """The claims of one node. `run` must be running; all methods belong to its event loop.

    on_change(device_id) is called, synchronously, after every change of a claim.
    """

    def __init__(
        self,
        means: Means,
        *,
        on_change: Callable[[str], None],
        on_step: Callable[[str, float], None],
        wishes: Wishes,
    ) -> None:
        self._me = means.me
        self._locks = means.locks
        self._specs = means.specs
        self._clock = means.clock
        self._on_notice = wishes.on_notice
        self._work = DeviceWork(means, on_change=on_change, on_step=on_step, on_takeover=self._taken_over)
        self._keeper = Keeper(means, self._work, wishes)
        self._book, self._pipeline = self._work.book, self._work.pipeline

    @property
    def claims(self) -> Mapping[str, Claim]:
        """Every device this node is doing something with, by device ID. A live, read-only view."""
        return self._book.view

    def concerns(self, device_id: str) -> bool:
        """Whether there is a claim on this device, or one on another that is attached from its place."""
        return self._book.concerns(device_id)

    def moved_here(self, device_id: str) -> Claim | None:
        """The latter."""
        return self._book.moved_here(device_id)

    async def run(self) -> None:
        """Owns all work on devices until cancelled. Cancellation leaves attachments and locks for the next process."""
        await self._work.run(self._keeper.run())

    async def started(self) -> None:
        """Returns once `run` takes work."""
        await self._work.started()

    async def adopt(self, used: Mapping[str, User], *, complete: bool, deprived: bool) -> None:
        """See Adopter.adopt."""
        await self._keeper.adopter.adopt(used, complete=complete, deprived=deprived)

    def server_changed(self, view: ServerView) -> None:
        """For the poller. See Reattacher.server_changed."""
        self._keeper.reattacher.server_changed(view)

    # Allocate

    async def allocate(
        self, wanted: Sequence[Wanted], timeout: float, accept: Callable[[Sequence[Attachment]], None]
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
                if outcome.fresh and (claim := self._book.get(device_id)) is not None:
                    self._work.spawn(self._work.let_go(device_id, partial(_same_allocate, claim)), f"undo {claim.key}")
            raise
        return answer

    def _as_it_stands(self, wanted: Wanted, done: Mapping[str, Outcome]) -> Attachment:
        """A device of several, when the last is attached: the first may have been lost, or is back under other nodes.

        From now on the kubelet lists it: the grace begins.
        """
        if len(done) == 1:
            return done[wanted.key.id].attachment
        claim = self._book.get(wanted.key.id)
        if claim is None or claim.state is not State.ATTACHED or claim.attachment is None:
            state = claim.state.value if claim is not None else State.FREE.value
            others = ", ".join(sorted(str(outcome.attachment.key) for i, outcome in done.items() if i != wanted.key.id))
            raise ClaimBusy(f"{wanted.key} was lost while {others} was attached, and is {state}; try again")
        self._book.put(replace(claim, allocated_at=self._clock.monotonic(), absent=0, given=claim.attachment))
        return claim.attachment

    async def _one(self, wanted: Wanted, deadline: float, timeout: float) -> Outcome:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        task = self._work.spawn(self._obtain(wanted, deadline, timeout, answer), f"allocate {wanted.key}")
        # of no effect once it is settled: only a cancelled task, that is, a plugin that ends, is done without
        stopped = ClaimBusy(f"{wanted.key}: the plugin on this node is being stopped; try again")
        task.add_done_callback(lambda _task: _settle(answer, stopped))
        return await asyncio.shield(answer)

    async def _obtain(self, wanted: Wanted, deadline: float, timeout: float, answer: asyncio.Future[Outcome]) -> None:
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

    async def _obtain_locked(self, wanted: Wanted, deadline: float, progress: Progress) -> Outcome:
        now = self._clock.monotonic()
        live = self._book.get(wanted.key.id)
        if live is not None:
            if live.state is not State.ATTACHED or live.attachment is None:
                raise ClaimBusy(f"{wanted.key} is {live.state.value} on this node; the next try may find it ready")
            if not serves(live, wanted.resource, wanted.usb_id):
                raise ClaimBusy(f"{wanted.key} is in use on this node as a {live.usb_id} of {live.resource}")
            attachment, numbers = live.attachment, tuple(sorted({*(live.numbers or ()), *wanted.numbers}))
            live = replace(allocated(live, now), resource=wanted.resource, numbers=numbers, given=attachment)
            self._specs.write(live, attachment)
            self._book.put(live)
            allocate = trace.get_current_span()
            allocate.set_attribute("usbip.reused", value=True)
            for link in links_to(live.traceparent):
                allocate.add_link(link.context)
            return Outcome(attachment, fresh=False)
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
            numbers=wanted.numbers,
        )
        return Outcome(await self._pipeline.attach_new(claim, wanted, deadline, progress), fresh=True)

    async def prepare(self, device_id: str, resource: str, number: int | None) -> bool:
        """Before a container starts. True if the device is attached, and its spec, where one is to be, is true.

        resource: by its name without the domain; number: what the container knows the device by, None if it was not
        handed out by CDI. Waits while the device is on its way (back) here; the caller bounds that. Raises VhciError
        and CdiError. Cancel-safe.
        """
        await self._keeper.verify(device_id)
        await self._work.changed.until(lambda: not self._coming(device_id))
        claim = self._book.get(device_id)
        if claim is None or claim.state is not State.ATTACHED or claim.attachment is None:
            return False
        attachment = claim.attachment
        if number is not None and claim.numbers != ():
            # after a reboot no spec tells what the container was given, and it starts before its kubelet lists it
            numbers = tuple(sorted({*(claim.numbers or ()), number}))
            claim = replace(claim, resource=claim.resource or resource, numbers=numbers, given=attachment)
        self._specs.write(claim, attachment)
        self._book.put(claim)
        return True

    def _coming(self, device_id: str) -> bool:
        claim = self._book.get(device_id)
        if claim is None:  # not adopted yet, perhaps
            return not self._locks.ready.is_set() or self._pipeline.is_mine(device_id)
        return claim.state in (State.LOCKING, State.IMPORTING, State.ATTACHING, State.REATTACHING)

    def _taken_over(self, key: DeviceKey, former: Lock) -> None:
        log.warning("taken over", extra={"device": str(key), "former_holder": former.holder})
        self._on_notice(taken_over(key, former, self._me.node))

    # letting go

    async def _undo(self, device_id: str) -> None:
        """After a failed Allocate. The mutex is held; a claim in a settled state was not this Allocate's doing."""
        claim = self._book.get(device_id)
        if claim is None or claim.state not in (State.LOCKING, State.IMPORTING, State.ATTACHING):
            return
        lock = self._locks.locks.get(device_id)
        taken = lock is not None and lock.holder not in ("", self._me.node)
        self._book.move(claim, Event.LOCK_LOST if taken and claim.state is not State.LOCKING else Event.FAILED)
        await self._work.finish(device_id)

    # usage, as pod-resources tells it

    def usage(self, users: Mapping[str, User], listed_at: float, unlisted: Unlisted) -> None:
        """One poll of pod-resources, begun at listed_at (seconds, monotonic): notes pods, ends claims nobody uses.

        unlisted: see claims.usage_ended.
        """
        unused = partial(self._unused, unlisted=unlisted)
        for device_id, claim in list(self._book.view.items()):
            if claim.state in IN_USE and unused(self._observe(claim, users, listed_at)):
                self._keeper.reattacher.look_again(device_id)
                self._work.spawn(self._work.let_go(device_id, unused), f"release {claim.key}")

    def glance(self, users: Mapping[str, User], listed_at: float) -> None:
        """The same of a look out of turn: notes pods, and no absences."""
        for claim in list(self._book.view.values()):
            if claim.state in IN_USE and claim.id in users:
                self._observe(claim, users, listed_at)

    def handed_back(self, device_id: str) -> None:
        """Its kubelet offers the device to another pod, which does not get it."""
        claim = self._book.get(device_id)
        if claim is not None and claim.state in IN_USE:
            self._book.put(replace(claim, handed_back=True))

    def _observe(self, claim: Claim, users: Mapping[str, User], listed_at: float) -> Claim:
        after = observe_usage(claim, users.get(claim.id), listed_at)
        if after != claim:
            self._book.put(after)
        if after.pod is not None and after.pod != claim.pod:
            self._work.spawn(self._work.note_pod(claim.key, after.pod), f"note pod {after.pod}")
            # without its uid an Event does not show where people look for it: then it waits for that
            if after.pod.uid is not None and not (claim.pod and claim.pod.uid and same_pod(claim.pod, after.pod)):
                self._tell_new_pod(after, after.pod)
                self._keeper.reattacher.pod_known(after)
        return after

    def _tell_new_pod(self, claim: Claim, pod: PodRef) -> None:
        """What has become of its device so far: an Allocate does not name the pod."""
        if claim.state is State.ATTACHED:
            self._on_notice(attached(claim.key, claim.attachment, claim.port, pod))
            self._tell_network(claim, pod)
        elif claim.state is State.REATTACHING:
            self._on_notice(Notice(What.LOST, claim.key, "lost before its pod was known, re-attaching", pod))

    def _tell_network(self, claim: Claim, pod: PodRef) -> None:
        """What the device has that no container gets."""
        if claim.attachment is not None and (names := claim.attachment.net):
            log.info("network interface stays on the node", extra={"device": str(claim.key), "interfaces": list(names)})
            self._on_notice(network(claim.key, names, pod))

    def _unused(self, claim: Claim, *, unlisted: Unlisted) -> bool:
        return usage_ended(claim, self._clock.monotonic(), unlisted)

    async def probe(self, key: DeviceKey, descriptor: Descriptor) -> Identity:
        """See Seeker.probe."""
        return await self._keeper.reattacher.seeker.probe(key, descriptor)


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
