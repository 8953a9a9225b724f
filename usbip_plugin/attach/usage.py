"""Which pods use the devices of this node: notes them on the claims, and releases devices whose pods are gone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from usbip_plugin.attach.events import DeviceEvent, EventKind, EventSink, attached, network
from usbip_plugin.attach.reattach import Reattacher
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import IN_USE, Claim, ClaimState, DeviceUser, same_pod
from usbip_plugin.context import NodeContext
from usbip_plugin.model import PodRef

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


class UsageTracker:
    """Records on the claims which pods use their devices, and releases the devices that no pod uses any more.

    Knows no kubelet: the caller passes what was listed. All methods belong to one event loop.
    """

    def __init__(
        self,
        context: NodeContext,
        *,
        tasks: DeviceTasks,
        releaser: Releaser,
        reattacher: Reattacher,
        events: EventSink,
    ) -> None:
        self._clock = context.clock
        self._tasks = tasks
        self._book = tasks.book
        self._releaser = releaser
        self._reattacher = reattacher
        self._events = events

    def apply_poll(self, users: Mapping[str, DeviceUser], listed_at: float, unlisted: Unlisted) -> None:
        """Applies one poll of the users: records pods, and begins to release the devices that no pod uses any more.

        users: the users that the poll listed, by device ID.
        listed_at: when the poll began, in seconds on the monotonic clock.
        unlisted: what the API server knows beyond that list, see usage_ended().
        """
        unused = partial(self._unused, unlisted=unlisted)
        for device_id, claim in list(self._book.view.items()):
            if claim.state in IN_USE and unused(self._observe(claim, users, listed_at)):
                self._reattacher.look_again(device_id)
                self._tasks.spawn(self._releaser.release_if(device_id, unused), f"release {claim.key}")

    def record_users(self, users: Mapping[str, DeviceUser], listed_at: float) -> None:
        """Records the pods of a list that is not one of the regular polls. Never counts a device as missing."""
        for claim in list(self._book.view.values()):
            if claim.state in IN_USE and claim.id in users:
                self._observe(claim, users, listed_at)

    def pod_ended(self, device_id: str) -> None:
        """Records that the pod of this device has ended: the kubelet has offered the device to another pod.

        That other pod does not get the device.
        """
        claim = self._book.get(device_id)
        if claim is not None and claim.state in IN_USE:
            self._book.put(replace(claim, pod_ended=True))

    def _observe(self, claim: Claim, users: Mapping[str, DeviceUser], listed_at: float) -> Claim:
        after = observe_usage(claim, users.get(claim.id), listed_at)
        if after != claim:
            self._book.put(after)
        if after.pod is not None and after.pod != claim.pod:
            self._tasks.spawn(self._tasks.note_pod(claim.key, after.pod), f"note pod {after.pod}")
            # an Event without the pod's uid does not show where people look for it, so the Event waits for the uid
            if after.pod.uid is not None and not (claim.pod and claim.pod.uid and same_pod(claim.pod, after.pod)):
                self._report_to(after.pod, after)
                self._reattacher.pod_known(after)
        return after

    def _report_to(self, pod: PodRef, claim: Claim) -> None:
        """Reports on a newly known pod what has happened to its device so far: an Allocate does not name the pod."""
        if claim.state is ClaimState.ATTACHED:
            self._events(attached(claim.key, claim.attachment, claim.port, pod))
            if claim.attachment is not None and (names := claim.attachment.net):
                extra = {"device": str(claim.key), "interfaces": list(names)}
                log.info("network interface stays on the node", extra=extra)
                self._events(network(claim.key, names, pod))
        elif claim.state is ClaimState.REATTACHING:
            self._events(DeviceEvent(EventKind.LOST, claim.key, "lost before its pod was known, re-attaching", pod))

    def _unused(self, claim: Claim, *, unlisted: Unlisted) -> bool:
        return usage_ended(claim, self._clock.monotonic(), unlisted)
