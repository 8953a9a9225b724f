"""What all work on devices shares: the claims, a mutex for each device, the tasks, and how a device is let go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine

from opentelemetry.trace import Link

from usbip_plugin.attach.pipeline import Means, Pipeline
from usbip_plugin.claims import IN_USE, Claim, ClaimBook, Event, State
from usbip_plugin.clock import backoff
from usbip_plugin.errors import ClaimBusy, KubeError, LockError, LockLost, VhciError
from usbip_plugin.model import DeviceKey, Identity, Lock, PodRef
from usbip_plugin.observe.spans import Tries, device_attributes, failed, pod_attributes, span
from usbip_plugin.observe.tracing import links_to, remote_parent
from usbip_plugin.sync import Broadcast

log = logging.getLogger(__name__)


RELEASE_FIRST_WAIT = 0.2
RELEASE_MAX_WAIT = 5.0
"""Seconds between tries to let a device go while the kernel or the API server does not do its part."""


class DeviceWork:
    """The claims of one node and the tasks that work on them. All methods belong to one event loop.

    Work on a device is done under its mutex, in tasks that outlive the caller that asked for it.
    """

    def __init__(
        self,
        means: Means,
        *,
        on_change: Callable[[str], None],
        on_step: Callable[[str, float], None],
        on_takeover: Callable[[DeviceKey, Lock], None],
    ) -> None:
        self._me = means.me
        self._locks = means.locks
        self._specs = means.specs
        self._clock = means.clock
        self._rng = means.rng
        self._tracer = means.tracer
        self._on_step = on_step
        self.changed = Broadcast()
        """Fires after every change of a claim."""

        def changed(device_id: str) -> None:
            on_change(device_id)
            self.changed.fire()

        self.book = ClaimBook(changed)
        self.pipeline = Pipeline(
            means,
            book=self.book,
            note_port=self._note_port,
            note_told=self._note_told,
            on_step=on_step,
            on_takeover=on_takeover,
        )
        self._mutexes: dict[str, asyncio.Lock] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._running = asyncio.Event()
        self._api = Broadcast()

    async def run(self, main: Coroutine[object, object, None]) -> None:
        """Owns the tasks for as long as main runs. Cancellation leaves attachments and locks for the next process."""
        unsubscribe = self._locks.subscribe_api(lambda _state: self._api.fire())
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._running.set()
                await main
        finally:
            self._tasks = None
            unsubscribe()

    async def started(self) -> None:
        """Returns once work is taken."""
        await self._running.wait()

    def spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Runs work in a task of its own. ClaimBusy if the plugin is being stopped."""
        try:
            if self._tasks is not None:
                return self._tasks.create_task(work, name=name)
        except RuntimeError:  # the group takes no more
            log.debug("not begun, stopping", extra={"work": name})
        work.close()
        raise ClaimBusy("the plugin on this node is being stopped; try again")

    def mutex(self, device_id: str) -> asyncio.Lock:
        """The one lock under which work on this device is done."""
        return self._mutexes.setdefault(device_id, asyncio.Lock())

    async def let_go(self, device_id: str, still: Callable[[Claim], bool]) -> None:
        """Ends a claim unless, by the time its mutex is had, it is no longer so that it should end."""
        async with self.mutex(device_id):
            claim = self.book.get(device_id)
            if claim is not None and claim.state in IN_USE and still(claim):
                self.book.move(claim, Event.POD_GONE)
                await self.finish(device_id)

    async def finish(self, device_id: str, *, keep: bool = False) -> None:
        """Detach, then (R5) release the lock, again and again until both are done. The claim is Releasing or Lost.

        keep: a Lost claim stays, for the pod that has lost its device.
        """
        claim = self.book[device_id]
        began = self._clock.monotonic()
        waits = backoff(self._rng, RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT)
        attributes = device_attributes(claim.key) | pod_attributes(claim.pod)
        context, links = remote_parent(claim.traceparent), self._new_holder(claim)
        with span(self._tracer, "release", attributes, context=context, links=links) as release:
            tries = Tries(release)
            while True:
                try:
                    with tries.one():
                        await self.pipeline.detach(device_id)
                        await self.pipeline.leave(device_id)
                        self._specs.remove(self.book[device_id])
                        if self.book[device_id].state is State.RELEASING:
                            await self._locks.release(claim.key)
                    break
                except LockLost:
                    self.book.move(self.book[device_id], Event.LOCK_LOST)
                except (VhciError, LockError, KubeError) as error:
                    if tries.failed(error):
                        extra = {"device": str(claim.key), "cause": str(error)}
                        log.warning("release failed, will retry", extra=extra)
                    await self._until_api_returns(next(waits))
            if self.book[device_id].state is State.LOST:
                release.set_attribute("usbip.lock.lost", value=True)
                if keep:
                    return
            self.book.move(self.book[device_id], Event.RELEASED)
            log.info("released", extra={"device": str(claim.key), "pod": str(claim.pod) if claim.pod else None})
        self._on_step("release", self._clock.monotonic() - began)

    def _new_holder(self, claim: Claim) -> list[Link]:
        """To the trace of the node that has the lock now, if it is not this one."""
        lock = self._locks.locks.get(claim.id)
        return links_to(lock.traceparent) if lock is not None and lock.holder not in ("", self._me.node) else []

    async def _until_api_returns(self, seconds: float) -> None:
        """At most so long; all of it if the API server is there, and so not what it fails of."""
        if self._locks.api.reachable:
            await self._clock.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(seconds):
                await self._api.until(lambda: self._locks.api.reachable)

    async def finish_locked(self, device_id: str, state: State) -> None:
        """finish() of a claim, when its mutex can be had and it is in this state then; a Lost one is kept."""
        async with self.mutex(device_id):
            claim = self.book.get(device_id)
            if claim is not None and claim.state is state:
                await self.finish(device_id, keep=state is State.LOST)

    async def note_pod(self, key: DeviceKey, pod: PodRef) -> None:
        """The pod onto the lock, for people; a failure is logged and changes nothing."""
        claim = self.book.get(key.id)
        context = remote_parent(claim.traceparent if claim is not None else None)
        with span(self._tracer, "pod", device_attributes(key) | pod_attributes(pod), context=context) as noted:
            try:
                await self._locks.annotate(key, pod=pod)
            except (LockError, KubeError) as error:
                failed(noted, error)
                extra = {"device": str(key), "pod": str(pod), "cause": str(error)}
                log.warning("pod not noted on the lock", extra=extra)

    def _note_port(self, key: DeviceKey, port: int) -> None:
        self.spawn(self._write_port(key, port), f"note port {port}")

    async def _write_port(self, key: DeviceKey, port: int) -> None:
        try:
            await self._locks.annotate(key, port=port)
        except (LockError, KubeError) as error:
            # for people and for adoption; the port record says the same, so the attachment does not depend on it
            log.warning("port not noted on the lock", extra={"device": str(key), "port": port, "cause": str(error)})

    def _note_told(self, key: DeviceKey, told: Identity) -> None:
        self.spawn(self._keep_writing_told(key, told), f"note serial number of {key}")

    async def _keep_writing_told(self, key: DeviceKey, told: Identity) -> None:
        """A successor that finds the device lost knows it by this: until written, or nobody here has the device."""
        waits = backoff(self._rng, RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT)
        while not await self.pipeline.write_told(key, told) and self.book.concerns(key.id):
            await self._until_api_returns(next(waits))
