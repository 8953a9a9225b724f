"""Watches this node's own pods, to learn at once that a pod has ended and which pods must be using devices.

A pod's absence from the kubelet's pod-resources list is not enough: for about a second after its start, a kubelet
answers with a list without pods while all of them run.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeError
from usbip_plugin.kube.client import Api
from usbip_plugin.kube.reflector import Reflector
from usbip_plugin.kube.responses import mapping
from usbip_plugin.model import PodRef

log = logging.getLogger(__name__)

PODS_PATH = "/api/v1/pods"
PODS = "pods"
# Pods in one page of the list. A pod has 10 to 30 KB, of which nearly all is dropped.
LIST_PAGE = 20
# Seconds before the first and, at most, before a later retry.
RETRY_S = (0.5, 30.0)
MANY = 1 << 20
"""Replaces a number of devices that cannot be read. No node has so many."""
MAX_RESOURCES = 64
"""Extended resources kept of one pod. Its author chooses how many there are."""

PodKey = tuple[str, str]
"""Namespace and name of a pod."""


class PodPhase(enum.Enum):
    """Step of a pod towards its end."""

    RUNNING = "running"
    """The pod is neither marked for deletion nor ended. It may still be waiting for its start."""
    TERMINATING = "terminating"
    """The pod is marked for deletion. Its containers may still run."""
    ENDED = "ended"
    """The phase is Succeeded or Failed, so all containers have ended, or the pod was deleted or replaced."""


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod as far as the plugin needs it.

    resources: how many of each extended resource (a name with a domain) the kubelet allocates for it, until it ends.
    Init containers count even after they have ended: they run again if the kubelet makes the pod's sandbox anew.
    deleted: whether it is marked for deletion.
    """

    uid: str
    phase: PodPhase
    resources: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    deleted: bool = False


PodCallback = Callable[[PodRef, PodPhase], None]
"""Called with a pod, uid included, and TERMINATING or ENDED. Must be synchronous and quick."""


class PodView(Protocol):
    """This node's pods, uids included, as the API server has them. synced is False while the view may be old."""

    synced: bool

    def find(self, namespace: str, name: str) -> PodRef | None:
        """Returns the pod of that name, or None if it is unknown or has ended."""

    def ended(self, namespace: str, name: str) -> bool:
        """Returns whether the containers of this pod have all ended. False for an unknown pod and while not synced."""

    def completed(self, pod: PodRef) -> bool:
        """Returns whether this pod has ended by itself: nobody has deleted it. False while not synced."""

    def wanting(self, domain: str) -> Mapping[PodRef, Mapping[str, int]]:
        """Returns the pods that have or will have resources of this domain, with the number of each, by its name."""


def read_pod(obj: object) -> tuple[PodKey, PodState] | None:
    """Returns the key and the state of a pod object, or None if the object is not a pod."""
    pod = mapping(obj)
    metadata = mapping(pod.get("metadata"))
    namespace, name, uid = metadata.get("namespace"), metadata.get("name"), metadata.get("uid")
    if not (isinstance(namespace, str) and isinstance(name, str) and isinstance(uid, str)):
        return None
    deleted = metadata.get("deletionTimestamp") is not None
    if mapping(pod.get("status")).get("phase") in ("Succeeded", "Failed"):
        return (namespace, name), PodState(uid, PodPhase.ENDED, deleted=deleted)
    phase = PodPhase.TERMINATING if deleted else PodPhase.RUNNING
    resources = dict(itertools.islice(_allocated(pod.get("spec")).items(), MAX_RESOURCES))
    return (namespace, name), PodState(uid, phase, MappingProxyType(resources), deleted)


def _allocated(spec: object) -> dict[str, int]:
    """Returns how many of each extended resource the kubelet allocates for a pod with this spec.

    An init container that ends passes its devices on. The count is therefore the highest number in use at one time.
    """
    total, most = Counter[str](), Counter[str]()
    for kind in ("initContainers", "containers"):
        listed = mapping(spec).get(kind)
        for container in map(mapping, listed if isinstance(listed, list) else ()):
            limits = dict(_extended_resources(container))
            if kind == "containers" or container.get("restartPolicy") == "Always":
                total.update(limits)
            else:
                most |= total + Counter(limits)
    return dict(most | total)


def _extended_resources(container: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, count in mapping(mapping(container.get("resources")).get("limits")).items():
        if isinstance(name, str) and "/" in name:
            yield name, int(count) if isinstance(count, str) and count.isascii() and count.isdigit() else MANY


def of_domain(resources: Mapping[str, int], domain: str) -> dict[str, int]:
    """Returns the resources of a domain whose count is above 0, by their names without the domain."""
    prefix = domain + "/"
    return {name.removeprefix(prefix): n for name, n in resources.items() if name.startswith(prefix) and n > 0}


class OwnPods(Reflector[dict[str, Any]]):
    """View of the pods of one node. A PodView. Works only while run() runs.

    Calls callback once for each step of a pod towards its end. A pod that was deleted, or replaced by one of the same
    name, has ended. After a gap in the watch, this includes the pods that vanished meanwhile.
    """

    def __init__(self, api: Api, node: str, clock: Clock, rng: random.Random, callback: PodCallback) -> None:
        super().__init__(PODS, clock, rng, RETRY_S)
        self._api = api
        self._selector = {"fieldSelector": f"spec.nodeName={node}"}
        self._callback = callback
        self._pods: dict[PodKey, PodState] = {}
        self.synced = False

    def find(self, namespace: str, name: str) -> PodRef | None:
        state = self._pods.get((namespace, name))
        if state is None or state.phase is PodPhase.ENDED:
            return None
        return PodRef(namespace, name, state.uid)

    def wanting(self, domain: str) -> Mapping[PodRef, Mapping[str, int]]:
        found = {PodRef(*key, state.uid): of_domain(state.resources, domain) for key, state in self._pods.items()}
        return {pod: counts for pod, counts in found.items() if counts}

    def ended(self, namespace: str, name: str) -> bool:
        state = self._pods.get((namespace, name))
        return self.synced and state is not None and state.phase is PodPhase.ENDED

    def completed(self, pod: PodRef) -> bool:
        state = self._pods.get((pod.namespace, pod.name))
        if state is None or state.uid != pod.uid or not self.synced:
            return False
        return state.phase is PodPhase.ENDED and not state.deleted

    async def _list(self) -> str:
        pods: dict[PodKey, PodState] = {}
        version: object = None
        listed = self._api.pages(PODS_PATH, resource=PODS, params=self._selector, size=LIST_PAGE)
        async with contextlib.aclosing(listed) as pages:
            async for page in pages:
                pods.update(found for item in page["items"] if (found := read_pod(item)) is not None)
                version = page["metadata"].get("resourceVersion")
        for key in [key for key in self._pods if key not in pods]:
            self._forget(key)
        for key, state in pods.items():
            self._learn(key, state)
        return str(version or "")

    def _watch(self, version: str) -> AsyncGenerator[dict[str, Any], None]:
        return self._api.watch(PODS_PATH, resource=PODS, params={**self._selector, "resourceVersion": version})

    def apply(self, event: dict[str, Any]) -> str | None:
        kind, obj = event.get("type"), event.get("object")
        found = read_pod(obj)
        if found is not None and kind == "DELETED":
            self._forget(found[0])
        elif found is not None and kind in {"ADDED", "MODIFIED"}:
            self._learn(*found)
        version = mapping(mapping(obj).get("metadata")).get("resourceVersion")
        return version if isinstance(version, str) else None

    def _up(self) -> None:
        self.synced = True

    def _down(self, error: KubeError, *, first: bool) -> None:
        self.synced = False
        if first:
            log.warning("pod watch failed, will retry", extra={"cause": str(error)})

    def _learn(self, key: PodKey, state: PodState) -> None:
        old = self._pods.get(key)
        if old is not None and old.uid != state.uid:
            self._forget(key)
            old = None
        self._pods[key] = state
        if state.phase is not PodPhase.RUNNING and (old is None or old.phase is not state.phase):
            self._callback(PodRef(*key, state.uid), state.phase)

    def _forget(self, key: PodKey) -> None:
        old = self._pods.pop(key, None)
        if old is not None and old.phase is not PodPhase.ENDED:
            self._callback(PodRef(*key, old.uid), PodPhase.ENDED)
