"""The watch on this node's own pods: a hint, at once, that a pod has ended, and which pods must be using devices.

The second is what makes an absence from pod-resources mean something: a kubelet that has just started answers with a
list without pods for about a second, while they all run.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeError, KubeGone
from usbip_plugin.model import PodRef

log = logging.getLogger(__name__)


PODS_PATH = "/api/v1/pods"
PODS = "pods"
LIST_TIMEOUT_S = 10.0
WATCH_TIMEOUT_S = 300.0
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
# A watch that stood this long was a good one: the next follows at once.
STABLE_S = 5.0
MANY = 1 << 20
"""For a count that cannot be read: more than a node has."""

PodKey = tuple[str, str]


class PodApi(Protocol):
    """What is used of the API client. Raises the KubeError family."""

    async def list(self, path: str, *, resource: str, params: Mapping[str, str], timeout: float) -> dict[str, Any]: ...

    def watch(
        self, path: str, *, resource: str, params: Mapping[str, str], timeout: float
    ) -> AsyncGenerator[dict[str, Any], None]: ...


class PodPhase(enum.Enum):
    """How far a pod has come. RUNNING stands for everything before its end."""

    RUNNING = "running"
    TERMINATING = "terminating"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class PodState:
    """resources: how many of each extended resource (a name with a domain) its kubelet allocates for it, until it ends.

    What init containers have counts, also when they have ended: they are run again if the pod's sandbox is made anew.
    """

    uid: str
    phase: PodPhase
    resources: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


PodCallback = Callable[[PodRef, PodPhase], None]


class PodView(Protocol):
    """What the API server says of this node's pods. synced is false while it may be old."""

    synced: bool

    def find(self, namespace: str, name: str) -> PodRef | None:
        """The pod of that name with its uid, if it is known and has not ended."""
        ...

    def ended(self, namespace: str, name: str) -> bool:
        """True if the API says that this pod's containers have all ended. False for a pod it does not know."""
        ...

    def wanting(self, domain: str) -> Mapping[PodRef, Mapping[str, int]]:
        """The pods, with their uids, that have not ended and have resources of this domain, or will have.

        With how many of each, by its name without the domain.
        """
        ...


def read_pod(obj: object) -> tuple[PodKey, PodState] | None:
    """What counts of a pod object, nothing else is kept. None for what is not a pod.

    TERMINATING: marked for deletion, containers may still run. ENDED: phase Succeeded or Failed.
    """
    if not isinstance(obj, dict):
        return None
    metadata, status = obj.get("metadata"), obj.get("status")
    if not isinstance(metadata, dict):
        return None
    namespace, name, uid = metadata.get("namespace"), metadata.get("name"), metadata.get("uid")
    if not (isinstance(namespace, str) and isinstance(name, str) and isinstance(uid, str)):
        return None
    reached = status.get("phase") if isinstance(status, dict) else None
    ended = reached in ("Succeeded", "Failed")
    terminating = metadata.get("deletionTimestamp") is not None
    phase = PodPhase.ENDED if ended else PodPhase.TERMINATING if terminating else PodPhase.RUNNING
    spec = None if ended else obj.get("spec")
    return (namespace, name), PodState(uid, phase, MappingProxyType(_allocated(spec)))


def _allocated(spec: object) -> dict[str, int]:
    """What the kubelet allocates of each extended resource: an init container that ends passes its devices on, so the
    most that is in use at one time."""
    total, most = Counter[str](), Counter[str]()
    for kind in ("initContainers", "containers"):
        for container in _containers(spec, kind):
            limits = dict(_extended_resources(container))
            if kind == "containers" or container.get("restartPolicy") == "Always":
                total.update(limits)
            else:
                most |= total + Counter(limits)
    return dict(most | total)


def _containers(spec: object, kind: str) -> Iterator[dict[str, Any]]:
    containers = spec.get(kind) if isinstance(spec, dict) else None
    yield from (one for one in (containers if isinstance(containers, list) else ()) if isinstance(one, dict))


def _extended_resources(container: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Names with a domain among the limits, with their counts."""
    resources = container.get("resources")
    limits = resources.get("limits") if isinstance(resources, dict) else None
    for name, count in limits.items() if isinstance(limits, dict) else ():
        if isinstance(name, str) and "/" in name:
            yield name, int(count) if isinstance(count, str) and count.isascii() and count.isdigit() else MANY


def of_domain(resources: Mapping[str, int], domain: str) -> dict[str, int]:
    """Those of a domain that are wanted at all, by their names without it."""
    prefix = domain + "/"
    return {name.removeprefix(prefix): n for name, n in resources.items() if name.startswith(prefix) and n > 0}


class OwnPods:
    """Keeps (namespace, name) -> PodState of the pods of one node. A PodView.

    callback(pod with uid, TERMINATING or ENDED) is called once for each step of a pod towards its end; a pod that was
    deleted, or replaced by one of the same name, has ENDED. It is synchronous and quick. After a gap in the watch the
    pods that vanished meanwhile are reported too.
    """

    def __init__(self, api: PodApi, node: str, clock: Clock, rng: random.Random, callback: PodCallback) -> None:
        self._api = api
        self._selector = {"fieldSelector": f"spec.nodeName={node}"}
        self._clock = clock
        self._rng = rng
        self._callback = callback
        self._pods: dict[PodKey, PodState] = {}
        self._complaint = ""
        self.synced = False

    def find(self, namespace: str, name: str) -> PodRef | None:
        """See PodView.find."""
        state = self._pods.get((namespace, name))
        if state is None or state.phase is PodPhase.ENDED:
            return None
        return PodRef(namespace, name, state.uid)

    def wanting(self, domain: str) -> Mapping[PodRef, Mapping[str, int]]:
        """See PodView.wanting."""
        found = {PodRef(*key, state.uid): of_domain(state.resources, domain) for key, state in self._pods.items()}
        return {pod: counts for pod, counts in found.items() if counts}

    def ended(self, namespace: str, name: str) -> bool:
        """See PodView.ended."""
        state = self._pods.get((namespace, name))
        return self.synced and state is not None and state.phase is PodPhase.ENDED

    async def run(self) -> None:
        """Until cancelled. API errors are logged and retried; `synced` is false while the view may be old."""
        waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
        version: str | None = None
        while True:
            started = self._clock.monotonic()
            try:
                if version is None:
                    version = await self._list()
                    self.synced = True
                async with contextlib.aclosing(self._watch(version)) as events:
                    async for event in events:
                        version = self.apply(event) or version
            except KubeGone:
                version = None
            except KubeError as error:
                self.synced = False
                version = None
                # the same again soon is no news
                if self._clock.monotonic() - started >= STABLE_S or self._complaint != str(error):
                    log.warning("own-node pod watch failed, trying again", extra={"cause": str(error)})
                self._complaint = str(error)
            if self._clock.monotonic() - started >= STABLE_S:
                waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
            else:
                await self._clock.sleep(next(waits))

    def apply(self, event: Mapping[str, Any]) -> str | None:
        """Takes in one watch event; returns its resourceVersion, None if it has none."""
        obj = event.get("object")
        if event.get("type") == "DELETED":
            found = read_pod(obj)
            if found is not None:
                self._forget(found[0])
        elif event.get("type") in {"ADDED", "MODIFIED"}:
            found = read_pod(obj)
            if found is not None:
                self._learn(*found)
        metadata = obj.get("metadata") if isinstance(obj, dict) else None
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        return version if isinstance(version, str) else None

    def replace(self, pods: Mapping[PodKey, PodState]) -> None:
        """Takes in a whole list."""
        for key in [key for key in self._pods if key not in pods]:
            self._forget(key)
        for key, state in pods.items():
            self._learn(key, state)

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

    async def _list(self) -> str:
        answer = await self._api.list(PODS_PATH, resource=PODS, params=self._selector, timeout=LIST_TIMEOUT_S)
        self.replace(dict(found for item in answer.get("items") or () if (found := read_pod(item)) is not None))
        return str((answer.get("metadata") or {}).get("resourceVersion") or "")

    def _watch(self, version: str) -> AsyncGenerator[dict[str, Any], None]:
        params = {**self._selector, "resourceVersion": version}
        return self._api.watch(PODS_PATH, resource=PODS, params=params, timeout=WATCH_TIMEOUT_S)
