"""Records on the claims which pods use the devices of this node, and releases devices whose pods are gone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from usbip_plugin.attach.events import DeviceEvent, EventKind, EventSink
from usbip_plugin.attach.reattach import Reattacher
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import IN_USE, Claim, ClaimState, DeviceUser
from usbip_plugin.context import NodeContext
from usbip_plugin.model import PodRef, described, same_pod

log = logging.getLogger(__name__)

ALLOCATION_GRACE = 15.0
"""Seconds after an Allocate in which a pod that pod-resources does not list does not count as gone.

The kubelet lists a pod only after the Allocates of all its containers.
"""

ABSENT_POLLS = 2
"""Polls of pod-resources in a row without the device before its claim ends."""

BOUND_POD_S = 2.0
"""Seconds for which a device whose pod has ended is kept for a pod that is bound to this node and not listed yet.

A pod that waits for the device is bound once the API server shows the end. It gets the device as it is attached.
"""

COMPLETED_POD_S = 1.25
"""Seconds for which the device of a pod that has ended by itself is kept for the next pod of its controller.

The job controller makes it up to 1 s later, and a busy scheduler needs 0.2 s. A pod that is deleted has its successor
before it ends.
"""

UNCONFIRMED_ABSENCE = 15.0
"""Seconds without the device in pod-resources before its claim ends where the API server does not confirm it.

A kubelet that has just started lists no pods for about a second, while they run.
"""


@dataclass(frozen=True, slots=True)
class Unlisted:
    """Pods and resources that the API server shows and one list of pod-resources lacks.

    pods: pods that request devices of this plugin and have not ended. The kubelet does not list pods before admission,
        during init containers, or just after its own restart.
    resources: those (without the domain) of which a pod that has not ended may have a device that is not in the list.
    completed: pods of claims that have ended by themselves.
    certain: whether the API server's data is fresh.
    """

    pods: frozenset[PodRef] = frozenset()
    resources: frozenset[str] = frozenset()
    completed: frozenset[PodRef] = frozenset()
    certain: bool = False


def observe_usage(claim: Claim, user: DeviceUser | None, listed_at: float, unlisted: Unlisted) -> Claim:
    """Returns a claim as it is after one poll of pod-resources.

    user: the pod that has the device by this poll; None if the poll does not list the device.
    listed_at: when the poll began, in seconds on the monotonic clock. The absence of a device counts only in a poll
        that began after the Allocate, and only if the API server does not show the pod as running.
    """
    if user is not None:
        known = claim.pod is not None and user.pod.uid is None and same_pod(user.pod, claim.pod)
        pod = claim.pod if known else user.pod
        return replace(claim, pod=pod, resource=claim.resource or user.resource, missed_polls=0, pod_ended=False)
    if listed_at <= claim.allocated_at:
        return claim
    if claim.pod is not None and any(same_pod(claim.pod, other) for other in unlisted.pods):
        return replace(claim, missed_polls=0)
    since = claim.missing_since if claim.missed_polls else listed_at
    return replace(claim, missed_polls=claim.missed_polls + 1, missing_since=since)


def not_in_list(
    users: Mapping[str, DeviceUser],
    wanting: Mapping[PodRef, Mapping[str, int]],
    completed: frozenset[PodRef] = frozenset(),
    *,
    certain: bool,
) -> Unlisted:
    """Returns what a list of pod-resources, given as users by device ID, lacks. wanting: see PodView.wanting()."""
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
        completed,
        certain,
    )


def usage_ended(claim: Claim, now: float, unlisted: Unlisted) -> bool:
    """Returns whether the claim's pod is gone, so that the claim must end.

    The pod must be absent in ABSENT_POLLS polls; if it was never seen, ALLOCATION_GRACE must be over, too. If the API
    server's data is not certain, the absence must last UNCONFIRMED_ABSENCE. If another pod is bound here or about to
    be made, it must last BOUND_POD_S or COMPLETED_POD_S.

    now: seconds on the monotonic clock.
    """
    if claim.state not in IN_USE or claim.missed_polls < ABSENT_POLLS:
        return False
    pod = claim.pod
    bound = bool(unlisted.resources) if claim.resource is None else claim.resource in unlisted.resources
    if pod is None:
        gone = not bound and now - claim.allocated_at > ALLOCATION_GRACE
        certain = unlisted.certain
    else:
        completed = pod in unlisted.completed
        gone = now - claim.missing_since >= (BOUND_POD_S if bound else COMPLETED_POD_S if completed else 0.0)
        # the API server has not shown a pod without a uid to this node yet
        certain = unlisted.certain and pod.uid is not None
    return gone and (certain or now - claim.missing_since >= UNCONFIRMED_ABSENCE)


class UsageTracker:
    """Records on the claims which pods use their devices, and releases the devices that no pod uses.

    The caller passes what the kubelet listed. All methods belong to one event loop.
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
        """Records the pods of one poll, and begins to release the devices that no pod uses.

        users: the users that the poll listed, by device ID.
        listed_at: when the poll began, in seconds on the monotonic clock.
        """

        def unused(claim: Claim) -> bool:
            return usage_ended(claim, self._clock.monotonic(), unlisted)

        for device_id, claim in list(self._book.view.items()):
            if claim.state in IN_USE and unused(self._observe(claim, users, listed_at, unlisted)):
                self._reattacher.look_again(device_id)
                self._tasks.spawn(self._releaser.release_if(device_id, unused), f"release {claim.key}")

    def record_users(self, users: Mapping[str, DeviceUser], listed_at: float) -> None:
        """Records the pods of a list that is not one of the regular polls. Never counts a device as missing."""
        for claim in list(self._book.view.values()):
            if claim.state in IN_USE and claim.id in users:
                self._observe(claim, users, listed_at, Unlisted())

    def pod_ended(self, device_id: str) -> None:
        """Records that the pod of this device has ended: the kubelet has allocated the device to another pod."""
        claim = self._book.get(device_id)
        if claim is not None and claim.state in IN_USE:
            self._book.put(replace(claim, pod_ended=True))

    def _observe(self, claim: Claim, users: Mapping[str, DeviceUser], listed_at: float, unlisted: Unlisted) -> Claim:
        after = observe_usage(claim, users.get(claim.id), listed_at, unlisted)
        if after != claim:
            self._book.put(after)
        if after.pod is not None and after.pod != claim.pod:
            for key in claim.locked:
                self._tasks.spawn(self._tasks.note_pod(key, after.pod), f"note pod {after.pod}")
            # `kubectl describe pod` does not show an Event without the pod's uid, so the Event waits for it
            if after.pod.uid is not None and not (claim.pod and claim.pod.uid and same_pod(claim.pod, after.pod)):
                self._report_to(after.pod, after)
                self._reattacher.pod_known(after)
        return after

    def _report_to(self, pod: PodRef, claim: Claim) -> None:
        """Reports on a newly known pod what has happened to its device so far: an Allocate does not name the pod."""
        if claim.state is ClaimState.ATTACHED:
            nodes = claim.attachment.nodes if claim.attachment is not None else ()
            where = f"vhci port {claim.port}" + (f" as {nodes[0].path}" if nodes else "")
            self._events(DeviceEvent(EventKind.ATTACHED, claim.key, f"attached on {where}", pod))
            if claim.attachment is not None and (names := claim.attachment.net):
                extra = {"device": str(claim.key), "interfaces": list(names)}
                log.info("network interface stays on the node", extra=extra)
                text = f"network interface {', '.join(names)} stays on the node, because it is not a device node"
                self._events(DeviceEvent(EventKind.NETWORK, claim.key, text, pod))
            if claim.attachment is not None and (withheld := claim.attachment.withheld):
                text = f"{' and '.join(map(described, withheld))} withheld, because the resource does not allow it"
                self._events(DeviceEvent(EventKind.WITHHELD, claim.key, text, pod))
        elif claim.state is ClaimState.REATTACHING:
            self._events(DeviceEvent(EventKind.LOST, claim.key, "lost before its pod was known; re-attaching", pod))
