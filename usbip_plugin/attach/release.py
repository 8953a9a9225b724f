"""Releases devices: detaches them, then releases their locks (rule R5 of docs/internals/architecture.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.tasks import RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT, DeviceTasks
from usbip_plugin.claims import IN_USE, Claim, ClaimEvent, ClaimState
from usbip_plugin.clock import backoff
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import KubeError, LockError, LockHeld, LockLost, VhciError
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.observe.spans import Tries, device_attributes, pod_attributes, span
from usbip_plugin.observe.tracing import links_to, remote_parent

log = logging.getLogger(__name__)


class Releaser:
    """Ends claims: detaches their devices and releases their locks."""

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        specs: CdiSpecs,
        tasks: DeviceTasks,
        pipeline: Pipeline,
        on_step: Callable[[str, float], None],
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._rng = context.rng
        self._tracer = context.tracer
        self._locks = locks
        self._specs = specs
        self._tasks = tasks
        self._book = tasks.book
        self._pipeline = pipeline
        self._on_step = on_step

    async def release_if(self, device_id: str, still: Callable[[Claim], bool]) -> None:
        """Ends a claim in use if still(claim) is true when the device's mutex has been acquired."""
        async with self._tasks.mutex(device_id):
            claim = self._book.get(device_id)
            if claim is not None and claim.state in IN_USE and still(claim):
                self._book.move(claim, ClaimEvent.POD_GONE)
                await self.detach_and_release(device_id)

    async def detach_and_release(self, device_id: str, *, keep: bool = False, failed: bool = False) -> None:
        """Detaches the device, then releases its lock (R5), and retries until both are done.

        The claim must be Releasing or Lost, and the caller must hold the device's mutex.

        keep: whether a Lost claim stays, for the pod that has lost its device.
        failed: whether the claim's Allocate failed because of the device, for the record on the lock.
        """
        claim = self._book[device_id]
        outcome = failed if failed or claim.allocated_as is not None else None
        began = self._clock.monotonic()
        waits = backoff(self._rng, RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT)
        attributes = device_attributes(claim.key) | pod_attributes(claim.pod)
        lock = self._locks.locks.get(claim.id)
        taken = lock is not None and lock.holder not in ("", self._me.node)
        links = links_to(lock.traceparent) if lock is not None and taken else []
        context = remote_parent(claim.traceparent)
        with span(self._tracer, "release", attributes, context=context, links=links) as release:
            tries, detached = Tries(release), False
            while True:
                try:
                    with tries.one():
                        detached = await self._pipeline.detach(device_id) or detached
                        await self._pipeline.detach_from_location(device_id, detached=detached)
                        self._specs.remove(self._book[device_id])
                        if self._book[device_id].state is ClaimState.RELEASING:
                            left = self._pipeline.is_left(device_id, detached=detached)
                            await self._locks.release(claim.key, failed=outcome, left=left)
                    break
                except LockHeld:
                    break  # another boot has the lock: adopt() releases it when its server answers (R3)
                except LockLost:
                    self._book.move(self._book[device_id], ClaimEvent.LOCK_LOST)
                except (VhciError, LockError, KubeError) as error:
                    if tries.failed(error):
                        extra = {"device": str(claim.key), "cause": str(error)}
                        log.warning("release failed, will retry", extra=extra)
                    await self._tasks.until_api_returns(next(waits))
            if self._book[device_id].state is ClaimState.LOST:
                release.set_attribute("usbip.lock.lost", value=True)
                if keep:
                    return
            self._book.move(self._book[device_id], ClaimEvent.RELEASED)
            log.info("device released", extra={"device": str(claim.key), "pod": str(claim.pod) if claim.pod else None})
        self._on_step("release", self._clock.monotonic() - began)

    async def finish_locked(self, device_id: str, state: ClaimState) -> None:
        """Detaches and releases a device under its mutex, if its claim is in this state then. A Lost claim stays."""
        async with self._tasks.mutex(device_id):
            claim = self._book.get(device_id)
            if claim is not None and claim.state is state:
                await self.detach_and_release(device_id, keep=state is ClaimState.LOST)
