"""Release of devices: the decision, by pod-resources and the API server, that a pod is gone, and the release itself.

R5 is the rule for a release, see docs/architecture.md.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from opentelemetry.trace import Link

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.tasks import RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT, DeviceTasks
from usbip_plugin.claims import IN_USE, Claim, ClaimEvent, ClaimState, DeviceUser, same_pod
from usbip_plugin.clock import backoff
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import KubeError, LockError, LockLost, VhciError
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import PodRef
from usbip_plugin.observe.spans import Tries, device_attributes, pod_attributes, span
from usbip_plugin.observe.tracing import links_to, remote_parent

log = logging.getLogger(__name__)

ALLOCATION_GRACE = 15.0
"""Seconds after an Allocate in which a pod that is not (yet) listed does not count as gone.

The kubelet hides an Allocate in flight from pod-resources, and admission of the pod's other containers comes after it.
"""

ABSENT_POLLS = 2
"""Polls of pod-resources in a row without the device before its claim ends."""

UNCONFIRMED_ABSENCE = 15.0
"""Seconds without the device in pod-resources before its claim ends where the API server does not confirm it.

A kubelet that has just started lists no pods for about a second, while they run.
"""


def observe_usage(claim: Claim, user: DeviceUser | None, listed_at: float) -> Claim:
    """Returns a claim as it is after one poll of pod-resources.

    user: the pod that has the device by this poll; None if the poll does not list the device.
    listed_at: when the poll began, in seconds on the monotonic clock. The absence of a device counts only in a poll
        that began after the Allocate.
    """
    if user is not None:
        known = claim.pod is not None and user.pod.uid is None and same_pod(user.pod, claim.pod)
        pod = claim.pod if known else user.pod
        return replace(claim, pod=pod, resource=claim.resource or user.resource, missed_polls=0, pod_ended=False)
    if listed_at <= claim.allocated_at:
        return claim
    since = claim.missing_since if claim.missed_polls else listed_at
    return replace(claim, missed_polls=claim.missed_polls + 1, missing_since=since)


@dataclass(frozen=True, slots=True)
class Unlisted:
    """What the API server knows beyond one list of pod-resources.

    pods: those that have not ended, want our devices, and are not in the list. They run init containers, or the kubelet
        does not know them yet, or does not know them again yet.
    resources: those (without the domain) of which some pod that has not ended may have a device that is not in the
        list. This includes devices of init containers.
    certain: whether the API server's data is fresh.
    """

    pods: frozenset[PodRef] = frozenset()
    resources: frozenset[str] = frozenset()
    certain: bool = False


def not_in_list(
    users: Mapping[str, DeviceUser], wanting: Mapping[PodRef, Mapping[str, int]], *, certain: bool
) -> Unlisted:
    """Returns what the API server knows beyond one list of pod-resources.

    users: the list of pod-resources, by device ID.
    wanting: the pods that have not ended, with their numbers of devices by resource, see PodView.wanting().
    certain: whether the API server's data is fresh.
    """
    listed = Counter((user.pod.namespace, user.pod.name, user.resource) for user in users.values())
    pods = {(namespace, name) for namespace, name, _ in listed}
    return Unlisted(
        frozenset(pod for pod in wanting if (pod.namespace, pod.name) not in pods),
        frozenset(
            resource
            for pod, counts in wanting.items()
            for resource, count in counts.items()
            if count > listed[pod.namespace, pod.name, resource]
        ),
        certain,
    )


def usage_ended(claim: Claim, now: float, unlisted: Unlisted) -> bool:
    """Returns whether the claim's pod is gone, so that its claim ends.

    The pod must be absent in ABSENT_POLLS polls; if it was never seen, ALLOCATION_GRACE must be over, too. The absence
    counts only if the API server does not know the pod as living. If the API server's data is not certain, the absence
    must last UNCONFIRMED_ABSENCE.

    now: seconds on the monotonic clock.
    """
    if claim.state not in IN_USE or claim.missed_polls < ABSENT_POLLS:
        return False
    pod = claim.pod
    if pod is None:
        somebodys = bool(unlisted.resources) if claim.resource is None else claim.resource in unlisted.resources
        gone = not somebodys and now - claim.allocated_at > ALLOCATION_GRACE
        certain = unlisted.certain
    else:
        gone = not any(same_pod(pod, other) for other in unlisted.pods)
        # a pod without a uid is one that the API server has not shown to this node yet
        certain = unlisted.certain and pod.uid is not None
    return gone and (certain or now - claim.missing_since >= UNCONFIRMED_ABSENCE)


class Releaser:
    """Ends claims: detaches their devices and releases the locks, with retries until both are done."""

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        specs: CdiSpecs,
        work: DeviceTasks,
        pipeline: Pipeline,
        on_step: Callable[[str, float], None],
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._rng = context.rng
        self._tracer = context.tracer
        self._locks = locks
        self._specs = specs
        self._work = work
        self._book = work.book
        self._pipeline = pipeline
        self._on_step = on_step

    async def release_if(self, device_id: str, still: Callable[[Claim], bool]) -> None:
        """Ends a claim in use if still(claim) is true when the device's mutex has been acquired."""
        async with self._work.mutex(device_id):
            claim = self._book.get(device_id)
            if claim is not None and claim.state in IN_USE and still(claim):
                self._book.move(claim, ClaimEvent.POD_GONE)
                await self.detach_and_release(device_id)

    async def detach_and_release(self, device_id: str, *, keep: bool = False) -> None:
        """Detaches the device, then releases its lock (R5), and retries until both are done.

        The claim must be Releasing or Lost, and the caller must hold the device's mutex.

        keep: whether a Lost claim stays, for the pod that has lost its device.
        """
        claim = self._book[device_id]
        began = self._clock.monotonic()
        waits = backoff(self._rng, RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT)
        attributes = device_attributes(claim.key) | pod_attributes(claim.pod)
        context, links = remote_parent(claim.traceparent), self._new_holder(claim)
        with span(self._tracer, "release", attributes, context=context, links=links) as release:
            tries = Tries(release)
            while True:
                try:
                    with tries.one():
                        await self._pipeline.detach(device_id)
                        await self._pipeline.detach_from_location(device_id)
                        self._specs.remove(self._book[device_id])
                        if self._book[device_id].state is ClaimState.RELEASING:
                            await self._locks.release(claim.key)
                    break
                except LockLost:
                    self._book.move(self._book[device_id], ClaimEvent.LOCK_LOST)
                except (VhciError, LockError, KubeError) as error:
                    if tries.failed(error):
                        extra = {"device": str(claim.key), "cause": str(error)}
                        log.warning("release failed, will retry", extra=extra)
                    await self._work.until_api_returns(next(waits))
            if self._book[device_id].state is ClaimState.LOST:
                release.set_attribute("usbip.lock.lost", value=True)
                if keep:
                    return
            self._book.move(self._book[device_id], ClaimEvent.RELEASED)
            log.info("released", extra={"device": str(claim.key), "pod": str(claim.pod) if claim.pod else None})
        self._on_step("release", self._clock.monotonic() - began)

    def _new_holder(self, claim: Claim) -> list[Link]:
        """Returns a link to the trace of the lock's present holder, or nothing if that is this node or nobody."""
        lock = self._locks.locks.get(claim.id)
        return links_to(lock.traceparent) if lock is not None and lock.holder not in ("", self._me.node) else []

    async def finish_locked(self, device_id: str, state: ClaimState) -> None:
        """Detaches and releases a device under its mutex, if its claim is in this state then. A Lost claim stays."""
        async with self._work.mutex(device_id):
            claim = self._book.get(device_id)
            if claim is not None and claim.state is state:
                await self.detach_and_release(device_id, keep=state is ClaimState.LOST)
