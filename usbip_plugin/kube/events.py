"""Kubernetes Events about pods and this node. They are for people: losing one is never an error."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeConflict, KubeError
from usbip_plugin.kube.client import api_write
from usbip_plugin.model import NodeIdentity, PodRef
from usbip_plugin.observe.redaction import redacted

CONTROLLER = "usbip.dev/usbip-plugin"
REQUEST_TIMEOUT_S = 5.0
WHOLE_TIMEOUT_S = 10.0
"""For one event, retries included."""
REPEAT_S = 300.0
"""The same thing about the same object is said again only after this time."""
BURST = 250
REFILL_S = 2.0
"""What one plugin says: so many at once (all devices of a node may be lost together), then one per REFILL_S seconds."""
FOR_WARNINGS = 50
"""Of BURST, what is kept for warnings: what goes well must not use up what tells that something does not."""
OBJECT_BURST = 25
OBJECT_REFILL_S = 10.0
"""The same for each object: a pod whose device comes and goes does not silence the others."""
QUEUE_LENGTH = 300
MAX_NOTE_BYTES = 1000
"""The API takes 1024."""
MAX_INSTANCE = 128
"""Characters the API takes for who reports; a node's name has up to 253."""
_INSTANCE_END = 55
_MAX_ABOUT = 200
_REMEMBERED = 512

K = TypeVar("K")
V = TypeVar("V")

NORMAL = "Normal"
WARNING = "Warning"

_log = logging.getLogger(__name__)


def _remember(known: OrderedDict[K, V], key: K, value: V) -> None:
    """What has not been touched for longest is forgotten."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)


class KubeRequests(Protocol):
    """What is needed of the API client. Raises the KubeError family."""

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout: float,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class EventText:
    """type: NORMAL or WARNING; reason: UpperCamelCase, one of few; action: what was being done, also UpperCamelCase."""

    type: str
    reason: str
    action: str
    note: str


def event_body(identity: NodeIdentity, text: EventText, pod: PodRef | None, name: str, when: str) -> dict[str, Any]:
    """An events.k8s.io/v1 Event about the pod, or about the node if pod is None. when: RFC 3339 with microseconds.

    The node's whole name is in every one: of a node that is too long for reportingInstance, at the end of the note.
    """
    instance, told = instance_of(identity.node), ""
    if pod is None:
        # the uid of a Node event is the node's name: that is how the kubelet writes them and kubectl finds them
        regarding = {"kind": "Node", "apiVersion": "v1", "name": identity.node, "uid": identity.node}
    else:
        regarding = {"kind": "Pod", "apiVersion": "v1", "name": pod.name, "namespace": pod.namespace}
        if pod.uid:
            regarding["uid"] = pod.uid
        if instance != identity.node:
            told = f" (node {identity.node})"
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace_of(pod)},
        "eventTime": when,
        "type": text.type,
        "reason": text.reason,
        "action": text.action,
        "note": _cut(text.note, MAX_NOTE_BYTES - len(told)) + told,
        "regarding": regarding,
        "reportingController": CONTROLLER,
        "reportingInstance": instance,
    }


def instance_of(node: str) -> str:
    """Who reports, in MAX_INSTANCE characters at most: the node, or both ends of its name and a digest.

    The admission policy works the ends out again and has no digests (rbac/40-admission.yaml). "~" is in no node's name,
    so that none is taken for another whose name is short.
    """
    if len(node) <= MAX_INSTANCE:
        return node
    digest = hashlib.sha256(node.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{node[:_INSTANCE_END]}~{node[-_INSTANCE_END:]}~{digest}"


def event_name(about: str, mark: int) -> str:
    """A new Event's name: what it is about, as far as there is room, and a random mark of 64 bits."""
    return f"{about[:_MAX_ABOUT].rstrip('.-')}.{mark:016x}"


def namespace_of(pod: PodRef | None) -> str:
    """Where the Event goes: events about cluster-wide objects belong into default."""
    return pod.namespace if pod else "default"


def _cut(note: str, most: int) -> str:
    note = redacted(note, most)
    data = note.encode("utf-8", "replace")
    return note if len(data) <= most else data[:most].decode("utf-8", "ignore") + "..."


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many events may be said at a moment (seconds, monotonic): most of them, and one more per refill seconds."""

    left: float
    at: float

    def after(self, now: float, most: int, refill: float) -> Allowance:
        return Allowance(min(most, self.left + (now - self.at) / refill), now)

    def spent(self) -> Allowance:
        return Allowance(self.left - 1, self.at)


class EventRecorder:
    """Records events in the background. record() never blocks and never raises; run() writes them.

    What comes too fast is dropped: the same again within REPEAT_S, more than BURST at once or OBJECT_BURST about one
    object, more than QUEUE_LENGTH waiting. dropped counts all but repetitions, and what the API server did not take.
    """

    def __init__(self, kube: KubeRequests, identity: NodeIdentity, clock: Clock, rng: random.Random) -> None:
        self._kube = kube
        self._identity = identity
        self._clock = clock
        self._rng = rng
        self._queue: asyncio.Queue[tuple[EventText, PodRef | None]] = asyncio.Queue(QUEUE_LENGTH)
        self._said: OrderedDict[tuple[EventText, PodRef | None], float] = OrderedDict()
        self._all = Allowance(BURST, clock.monotonic())
        self._about: OrderedDict[PodRef | None, Allowance] = OrderedDict()
        self.dropped = 0

    def record(self, text: EventText, pod: PodRef | None = None) -> None:
        """About the pod, or about this node."""
        key = (text, pod)
        now = self._clock.monotonic()
        last = self._said.get(key)
        if last is not None and now - last < REPEAT_S:
            return
        in_all = self._all.after(now, BURST, REFILL_S)
        about = self._about.get(pod, Allowance(OBJECT_BURST, now)).after(now, OBJECT_BURST, OBJECT_REFILL_S)
        kept = 0 if text.type == WARNING else FOR_WARNINGS
        if in_all.left < 1 + kept or about.left < 1 or self._queue.full():
            self.dropped += 1
            return
        self._all = in_all.spent()
        _remember(self._about, pod, about.spent())
        _remember(self._said, key, now)
        self._queue.put_nowait(key)

    async def run(self) -> None:
        """Until cancelled; cancel-safe. Events that wait then are lost."""
        while True:
            text, pod = await self._queue.get()
            try:
                async with self._clock.timeout(WHOLE_TIMEOUT_S):
                    await self._write(text, pod)
            except KubeConflict:
                continue  # the name is ours alone: a try that seemed to fail had gone through
            except (KubeError, TimeoutError) as error:
                self.dropped += 1
                _log.warning(
                    "event not recorded",
                    extra={"reason": text.reason, "note": text.note, "cause": str(error) or "timeout"},
                )

    async def _write(self, text: EventText, pod: PodRef | None) -> None:
        namespace = namespace_of(pod)
        about = pod.name if pod else self._identity.node
        body = event_body(
            self._identity,
            text,
            pod,
            event_name(about, self._rng.getrandbits(64)),
            self._clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        )
        async for attempt in api_write(self._clock, self._rng):
            with attempt:
                await self._kube.request(
                    "create",
                    f"/apis/events.k8s.io/v1/namespaces/{namespace}/events",
                    resource="events.events.k8s.io",
                    body=body,
                    timeout=REQUEST_TIMEOUT_S,
                )
