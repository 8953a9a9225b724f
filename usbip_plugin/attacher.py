"""Every device this node does something with: allocated, adopted, watched, re-attached, let go.

Each device has its own mutex, so nothing here waits for another device but for the driver's short sysfs writes. Work
on a device runs in tasks of one TaskGroup and outlives the caller that asked for it: an Allocate that gives up, or a
kubelet that hangs up, never leaves a half-done attachment, because the task that began it also undoes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode, Tracer

from usbip_plugin import retry
from usbip_plugin.attaching import Pipeline, Progress, Wanted
from usbip_plugin.claims import (
    Adoption,
    Claim,
    ClaimBook,
    Event,
    State,
    allocated,
    decide_adoption,
    observe_usage,
    own_port,
    usage_ended,
)
from usbip_plugin.clock import Clock
from usbip_plugin.errors import (
    AllocateTimeout,
    ClaimBusy,
    KubeError,
    LockError,
    LockLost,
    PluginError,
    UsbipError,
    VhciError,
)
from usbip_plugin.inventory import key_of, parse_usb_id
from usbip_plugin.locks.manager import LockChange, LockManager
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Lock, NodeIdentity, PodRef, UsbId
from usbip_plugin.notices import Notice, What
from usbip_plugin.observe.tracing import context_from, traceparent_of
from usbip_plugin.usbip.client import UsbipClient
from usbip_plugin.vhci.driver import PortState, VhciDriver

log = logging.getLogger(__name__)

RELEASE_FIRST_WAIT = 0.2
RELEASE_MAX_WAIT = 5.0
"""Seconds between tries to let a device go while the kernel or the API server does not do its part."""
REATTACH_FIRST_WAIT = 0.2
REATTACH_MAX_WAIT = 5.0
"""Seconds between tries to attach a lost device again."""
REATTACH_TIMEOUT = 10.0
"""Seconds one such try may take."""
PORT_CHECK_INTERVAL = 15.0
"""Seconds between looks at the ports when no uevent says to look: uevents can be dropped under memory pressure."""


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
        *,
        me: NodeIdentity,
        client: UsbipClient,
        driver: VhciDriver,
        locks: LockManager,
        clock: Clock,
        rng: random.Random,
        tracer: Tracer,
        on_change: Callable[[str], None],
        on_step: Callable[[str, float], None],
        on_notice: Callable[[Notice], None],
    ) -> None:
        self._me = me
        self._on_notice = on_notice
        self._driver = driver
        self._locks = locks
        self._clock = clock
        self._rng = rng
        self._tracer = tracer
        self._book = ClaimBook(on_change)
        self._pipeline = Pipeline(
            me=me,
            client=client,
            driver=driver,
            locks=locks,
            clock=clock,
            tracer=tracer,
            book=self._book,
            note_port=self._note_port,
            on_step=on_step,
        )
        self._mutexes: dict[str, asyncio.Lock] = {}
        self._ports_event = asyncio.Event()
        self._gone: dict[str, asyncio.Event] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._running = asyncio.Event()

    @property
    def claims(self) -> Mapping[str, Claim]:
        """Every device this node is doing something with, by device ID. A live, read-only view."""
        return self._book.view

    async def run(self) -> None:
        """Owns all work on devices until cancelled. Cancellation leaves attachments and locks for the next process."""
        unsubscribe = [self._locks.subscribe(self._lock_changed), self._driver.subscribe(self._ports_event.set)]
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._running.set()
                await self._watch_ports()
        finally:
            self._tasks = None
            for undo in unsubscribe:
                undo()

    async def started(self) -> None:
        """Returns once `run` takes work."""
        await self._running.wait()

    # Allocate

    async def allocate(self, wanted: Sequence[Wanted], timeout: float) -> tuple[Attachment, ...]:
        """Attaches all devices, in sorted order, or none; answers in the order asked, within timeout seconds.

        The same device again returns the live attachment. Raises AllocateTimeout, ClaimBusy, LockError, UsbipError or
        VhciError. Cancel-safe: what was begun runs to its end and is let go by the usual rules.
        """
        deadline = self._clock.monotonic() + timeout
        done: dict[str, Outcome] = {}
        try:
            for item in sorted(wanted, key=lambda w: w.key):
                if item.key.id not in done:
                    done[item.key.id] = await self._one(item, deadline, timeout)
        except BaseException:
            for device_id, outcome in done.items():
                if outcome.fresh and (claim := self._book.get(device_id)) is not None:
                    self._spawn(self._let_go(device_id, partial(_same_allocate, claim)), f"undo {claim.key}")
            raise
        return tuple(done[item.key.id].attachment for item in wanted)

    async def _one(self, wanted: Wanted, deadline: float, timeout: float) -> Outcome:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._spawn(self._obtain(wanted, deadline, timeout, answer), f"allocate {wanted.key}")
        return await asyncio.shield(answer)

    async def _obtain(self, wanted: Wanted, deadline: float, timeout: float, answer: asyncio.Future[Outcome]) -> None:
        """Owns one device of an Allocate: answers as soon as it is known how it ends, then undoes what is to be."""
        progress = Progress("waiting for earlier work on this device")
        mutex = self._mutex(wanted.key.id)
        held = False
        try:
            try:
                async with self._clock.timeout(max(0.0, deadline - self._clock.monotonic())):
                    held = await mutex.acquire()
                    outcome = await self._obtain_locked(wanted, deadline, progress)
                _settle(answer, outcome)
            except TimeoutError:
                words = f"{wanted.key}: allocateTimeout of {timeout:g} s passed while {progress.doing}"
                _settle(answer, AllocateTimeout(words))
            except PluginError as error:
                _settle(answer, error)
            finally:
                # of no effect once it is settled: only a cancelled task, that is, a plugin that ends, gets here without
                _settle(answer, ClaimBusy(f"{wanted.key}: the plugin on this node is being stopped; try again"))
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
            self._book.put(allocated(live, now))
            trace.get_current_span().set_attribute("usbip.reused", value=True)
            return Outcome(live.attachment, fresh=False)
        claim = Claim(
            wanted.key,
            wanted.usb_id,
            resource=wanted.resource,
            children=wanted.children,
            traceparent=traceparent_of(trace.get_current_span()),
            allocated_at=now,
        )
        return Outcome(await self._pipeline.attach_new(claim, wanted, deadline, progress), fresh=True)

    # letting go

    async def _undo(self, device_id: str) -> None:
        """After a failed Allocate. The mutex is held; a claim in a settled state was not this Allocate's doing."""
        claim = self._book.get(device_id)
        if claim is None or claim.state not in (State.LOCKING, State.IMPORTING, State.ATTACHING):
            return
        lock = self._locks.locks.get(device_id)
        taken = lock is not None and lock.holder not in ("", self._me.node)
        self._book.move(claim, Event.LOCK_LOST if taken and claim.state is not State.LOCKING else Event.FAILED)
        await self._finish(device_id)

    async def _let_go(self, device_id: str, still: Callable[[Claim], bool]) -> None:
        """Ends a claim unless, by the time its mutex is had, it is no longer so that it should end."""
        async with self._mutex(device_id):
            claim = self._book.get(device_id)
            if claim is not None and claim.state in (State.ATTACHED, State.REATTACHING) and still(claim):
                self._book.move(claim, Event.POD_GONE)
                await self._finish(device_id)

    async def _finish(self, device_id: str) -> None:
        """Detach, then (R5) release the lock, again and again until both are done. The claim is Releasing or Lost."""
        claim = self._book[device_id]
        waits = retry.backoff(self._rng, RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT)
        with self._tracer.start_as_current_span("release", context=context_from(claim.traceparent)) as span:
            span.set_attribute("usbip.device", str(claim.key))
            while True:
                try:
                    await self._pipeline.detach(device_id)
                    if self._book[device_id].state is State.RELEASING:
                        await self._locks.release(claim.key)
                    break
                except LockLost:
                    self._book.move(self._book[device_id], Event.LOCK_LOST)
                except (VhciError, LockError, KubeError) as error:
                    _record(span, error)
                    log.warning("release failed, will retry", extra={"device": str(claim.key), "cause": str(error)})
                    await self._clock.sleep(next(waits))
            self._book.move(self._book[device_id], Event.RELEASED)
        log.info("released", extra={"device": str(claim.key), "pod": str(claim.pod) if claim.pod else None})

    async def _finish_locked(self, device_id: str) -> None:
        async with self._mutex(device_id):
            claim = self._book.get(device_id)
            if claim is not None and claim.state in (State.RELEASING, State.LOST):
                await self._finish(device_id)

    # usage, as pod-resources tells it

    def usage(self, users: Mapping[str, PodRef], listed_at: float, *, unseen_users: bool = False) -> None:
        """One poll of pod-resources, begun at listed_at (seconds, monotonic): notes pods, ends claims nobody uses.

        unseen_users: see claims.usage_ended.
        """
        unused = partial(self._unused, unseen_users=unseen_users)
        for device_id, claim in list(self._book.view.items()):
            if claim.state not in (State.ATTACHED, State.REATTACHING):
                continue
            after = observe_usage(claim, users.get(device_id), listed_at)
            if after != claim:
                self._book.put(after)
            if after.pod is not None and after.pod != claim.pod:
                self._spawn(self._note_pod(claim.key, after.pod), f"note pod {after.pod}")
            if unused(after):
                if (gone := self._gone.get(device_id)) is not None:
                    gone.set()
                self._spawn(self._let_go(device_id, unused), f"release {claim.key}")

    def _unused(self, claim: Claim, *, unseen_users: bool) -> bool:
        return usage_ended(claim, self._clock.monotonic(), unseen_users=unseen_users)

    async def _note_pod(self, key: DeviceKey, pod: PodRef) -> None:
        try:
            await self._locks.annotate(key, pod=pod)
        except (LockError, KubeError) as error:
            log.warning("pod not noted on the lock", extra={"device": str(key), "pod": str(pod), "cause": str(error)})

    def _note_port(self, key: DeviceKey, port: int) -> None:
        self._spawn(self._write_port(key, port), f"note port {port}")

    async def _write_port(self, key: DeviceKey, port: int) -> None:
        try:
            await self._locks.annotate(key, port=port)
        except (LockError, KubeError) as error:
            # for people and for adoption; the port record says the same, so the attachment does not depend on it
            log.warning("port not noted on the lock", extra={"device": str(key), "port": port, "cause": str(error)})

    # what the previous process left

    async def adopt(self, used: Mapping[str, PodRef] | None) -> None:
        """Takes over what locks and ports say is this node's. used: device ID -> pod by pod-resources, None if unknown.

        Idempotent; to be called when the locks are known, and again whenever the API server is back.
        """
        try:
            ports = await self._driver.ports()
        except VhciError as error:
            log.warning("cannot read vhci ports", extra={"cause": str(error)})
            ports = ()
        for lock in self._locks.mine():
            key = key_of(lock)
            if key is None or self._mutex(lock.device_id).locked():
                continue  # at work on it already
            async with self._mutex(lock.device_id):
                if self._book.get(lock.device_id) is None and self._pipeline.is_mine(lock.device_id):
                    await self._adopt_one(key, lock, ports, None if used is None else lock.device_id in used)

    async def _adopt_one(self, key: DeviceKey, lock: Lock, ports: Sequence[PortState], used: bool | None) -> None:
        port = own_port(key, ports, lock.port) if lock.boot_id == self._me.boot_id else None
        attachment = await self._driver.inspect(key, port.number) if port is not None else None
        usb_id = parse_usb_id(lock.usb_id) or (attachment.usb_id if attachment is not None else UsbId(0, 0))
        if attachment is not None and attachment.usb_id != usb_id:
            attachment, port = None, None  # a stale record: what stands there is somebody else's
        claim = Claim(
            key,
            usb_id,
            port=port.number if port is not None else None,
            attachment=attachment,
            traceparent=lock.traceparent,
            allocated_at=self._clock.monotonic(),
            pod=lock.pod,
        )
        match decide_adoption(lock, self._me, attached=attachment is not None, used=used):
            case Adoption.ADOPT:
                self._book.move(claim, Event.ADOPTED)
                log.info("adopted", extra={"device": str(key), "port": claim.port})
            case Adoption.REATTACH:
                self._book.move(claim, Event.ORPHANED)
                self._spawn(self._reattach(key.id), f"re-attach {key}")
            case Adoption.RELEASE:
                self._book.move(claim, Event.UNUSED)
                self._spawn(self._finish_locked(key.id), f"release {key}")

    # losing the port, losing the lock

    async def _watch_ports(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(PORT_CHECK_INTERVAL):
                    await self._ports_event.wait()
            self._ports_event.clear()
            if not any(claim.state is State.ATTACHED for claim in self.claims.values()):
                continue
            try:
                ports = await self._driver.ports()
                for device_id in list(self.claims):
                    await self._check_port(device_id, ports)
            except VhciError as error:
                log.warning("cannot read vhci ports", extra={"cause": str(error)})

    async def _check_port(self, device_id: str, ports: Sequence[PortState]) -> None:
        claim = self._book.get(device_id)
        if claim is None or claim.state is not State.ATTACHED or await self._pipeline.stands(claim, ports):
            return
        now = self._book.get(device_id)
        if now is None or now.state is not State.ATTACHED or now.attachment != claim.attachment:
            return
        # the state moves here and now, so that the withdrawal does not wait for the mutex
        self._book.move(now, Event.PORT_LOST)
        log.warning("attachment lost", extra={"device": str(claim.key), "port": claim.port})
        self._on_notice(Notice(What.LOST, claim.key, f"vhci port {claim.port} fell free, re-attaching", claim.pod))
        self._spawn(self._reattach(device_id), f"re-attach {claim.key}")

    async def _reattach(self, device_id: str) -> None:
        """Until the device is attached again, its pod is gone, or its lock is."""
        waits = retry.backoff(self._rng, REATTACH_FIRST_WAIT, REATTACH_MAX_WAIT)
        gone = self._gone[device_id] = asyncio.Event()
        claim = self._book[device_id]
        try:
            with self._tracer.start_as_current_span("re-attach", context=context_from(claim.traceparent)) as span:
                span.set_attribute("usbip.device", str(claim.key))
                while await self._reattach_once(device_id, span):
                    with contextlib.suppress(TimeoutError):
                        async with self._clock.timeout(next(waits)):
                            await gone.wait()
        finally:
            if self._gone.get(device_id) is gone:
                del self._gone[device_id]

    async def _reattach_once(self, device_id: str, span: Span) -> bool:
        """True if it should be tried again."""
        async with self._mutex(device_id):
            claim = self._book.get(device_id)
            if claim is None or claim.state is not State.REATTACHING:
                return False
            try:
                async with self._clock.timeout(REATTACH_TIMEOUT):
                    after = await self._pipeline.reattach(device_id, self._clock.monotonic() + REATTACH_TIMEOUT)
            except LockLost as error:
                _record(span, error)
                if self._book[device_id].state is State.REATTACHING:
                    self._book.move(self._book[device_id], Event.LOCK_LOST)
                await self._finish(device_id)
                return False
            except (TimeoutError, LockError, KubeError, UsbipError, VhciError) as error:
                span.record_exception(error)
                log.debug("re-attach failed, will retry", extra={"device": str(claim.key), "cause": str(error)})
                return True
        same = claim.attachment is not None and claim.attachment.nodes == after.nodes
        span.set_attribute("usbip.same_nodes", same)
        log.info("re-attached", extra={"device": str(claim.key), "port": after.port, "same_nodes": same})
        words = "the same device nodes" if same else "other device nodes: restart the container to use it"
        self._on_notice(Notice(What.REATTACHED, claim.key, f"attached again with {words}", claim.pod))
        return False

    def _lock_changed(self, change: LockChange) -> None:
        """R6: the watch shows another holder of a device that is attached here."""
        claim = self._book.get(change.device_id)
        if claim is None or claim.state not in (State.ATTACHED, State.REATTACHING):
            return
        holder = change.new.holder if change.new is not None else ""
        if holder == self._me.node:
            return
        # also when the Lease was deleted or emptied by hand: without a lock naming this node nothing may stay attached
        self._book.move(claim, Event.LOCK_LOST)
        log.error("lock lost", extra={"device": str(claim.key), "holder": holder})
        text = f"node {holder} holds it now" if holder else "its lock no longer names this node"
        self._on_notice(Notice(What.LOCK_LOST, claim.key, text + "; it is detached here", claim.pod))
        if (gone := self._gone.get(change.device_id)) is not None:
            gone.set()
        self._spawn(self._finish_locked(change.device_id), f"withdraw {claim.key}")

    async def probe(self, key: DeviceKey, descriptor: Descriptor) -> str:
        """Reads a device's serial number once for all nodes. As Pipeline.probe; ClaimBusy if it is in use here."""
        async with self._mutex(key.id):
            if self._book.get(key.id) is not None:
                raise ClaimBusy(f"{key} is in use on this node")
            return await self._pipeline.probe(key, descriptor)

    # small things

    def _mutex(self, device_id: str) -> asyncio.Lock:
        return self._mutexes.setdefault(device_id, asyncio.Lock())

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        if self._tasks is None:
            work.close()
            raise ClaimBusy("the plugin is shutting down")
        self._tasks.create_task(work, name=name)


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


def _record(span: Span, error: BaseException) -> None:
    span.record_exception(error)
    span.set_status(StatusCode.ERROR, str(error))
