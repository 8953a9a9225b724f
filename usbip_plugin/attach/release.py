"""When a device is let go: what pod-resources and the API server say of its pod, as pure rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from usbip_plugin.claims import IN_USE, Claim, User, same_pod
from usbip_plugin.model import PodRef

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


def observe_usage(claim: Claim, user: User | None, listed_at: float) -> Claim:
    """What one poll of pod-resources, begun at listed_at, says of a claim; one older than the Allocate: nothing."""
    if user is not None:
        known = claim.pod is not None and user.pod.uid is None and same_pod(user.pod, claim.pod)
        pod = claim.pod if known else user.pod
        return replace(claim, pod=pod, resource=claim.resource or user.resource, absent=0, handed_back=False)
    if listed_at <= claim.allocated_at:
        return claim
    since = claim.absent_since if claim.absent else listed_at
    return replace(claim, absent=claim.absent + 1, absent_since=since)


@dataclass(frozen=True, slots=True)
class Unlisted:
    """What the API server says beyond one list of pod-resources.

    pods: those that have not ended, want our devices, and are not in the list. They run init containers, or the kubelet
    does not know them yet, or again. resources: those (without the domain) of which some pod that has not ended may
    have a device that is not in the list, be it an init container's. certain: the API server's word is fresh.
    """

    pods: frozenset[PodRef] = frozenset()
    resources: frozenset[str] = frozenset()
    certain: bool = False


def not_in_list(users: Mapping[str, User], wanting: Mapping[PodRef, Mapping[str, int]], *, certain: bool) -> Unlisted:
    """users: one list of pod-resources, by device ID; wanting: see PodView."""
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
    """True when the claim's pod is gone: seen and absent in two polls, or never seen and the grace is over.

    A list without the pod counts only if the API server does not say that it lives; and where that is not known for
    certain, only after UNCONFIRMED_ABSENCE.
    """
    if claim.state not in IN_USE or claim.absent < ABSENT_POLLS:
        return False
    pod = claim.pod
    if pod is None:
        somebodys = bool(unlisted.resources) if claim.resource is None else claim.resource in unlisted.resources
        gone = not somebodys and now - claim.allocated_at > ALLOCATION_GRACE
        certain = unlisted.certain
    else:
        gone = not any(same_pod(pod, other) for other in unlisted.pods)
        # a pod without a uid is one that the API server has not told of
        certain = unlisted.certain and pod.uid is not None
    return gone and (certain or now - claim.absent_since >= UNCONFIRMED_ABSENCE)
