"""Records Kubernetes Events about pods and this node. Events are for people: a lost Event is never an error."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeConflict, KubeError
from usbip_plugin.kube.client import Api
from usbip_plugin.kube.retry import api_write
from usbip_plugin.model import NodeIdentity, PodRef
from usbip_plugin.observe.redaction import redacted

CONTROLLER = "usbip.dev/usbip-plugin"
WHOLE_TIMEOUT_S = 10.0
"""Seconds for writing one Event, retries included."""
REPEAT_S = 300.0
"""Seconds before an equal Event about the same object is recorded again."""
BURST = 250
"""Events that one plugin may record at once: all devices of a node may be lost together."""
REFILL_S = 2.0
"""Seconds after which one more Event of BURST may be recorded."""
FOR_WARNINGS = 50
"""Events of BURST that are reserved for warnings, so that Normal Events cannot use up their room."""
OBJECT_BURST = 25
"""Events about one object that may be recorded at once. A pod whose device comes and goes cannot silence others."""
OBJECT_REFILL_S = 10.0
"""Seconds after which one more Event of OBJECT_BURST may be recorded."""
QUEUE_LENGTH = 300
"""Events that wait to be written, at most."""
KEPT_EVENTS = 50
"""Events that are kept in memory for the status page."""
MAX_NOTE_BYTES = 1000
"""Bytes of an Event's note. The API accepts 1024."""
MAX_INSTANCE = 128
"""Characters that the API accepts in reportingInstance. The name of a node has up to 253."""
_INSTANCE_END = 55
"""Characters of each end of a long node name that instance_of() keeps."""
_MAX_ABOUT = 200
"""Characters of the object's name in an Event's name."""
_REMEMBERED = 512
"""Entries that an EventRecorder remembers, for recorded Events and for objects each."""

K = TypeVar("K")
V = TypeVar("V")

NORMAL = "Normal"
WARNING = "Warning"

_log = logging.getLogger(__name__)


def _remember(known: OrderedDict[K, V], key: K, value: V) -> None:
    """Stores a value, and forgets the entry that was not stored for longest if there are too many."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class EventText:
    """The text of a Kubernetes Event, in the fields of events.k8s.io/v1.

    type: NORMAL or WARNING. note: a sentence for people.
    reason, action (what was being done): each one of a small fixed set, in UpperCamelCase.
    """

    type: str
    reason: str
    action: str
    note: str


def event_body(identity: NodeIdentity, text: EventText, pod: PodRef | None, name: str, when: str) -> dict[str, Any]:
    """Returns an events.k8s.io/v1 Event about the pod, or about the node if pod is None.

    when: RFC 3339 with microseconds. A node name that is too long for reportingInstance ends the note of a pod's Event.
    """
    instance, about_node = instance_of(identity.node), ""
    if pod is None:
        # the uid of an Event about a Node is the node's name: the kubelet writes it so, and kubectl searches for it
        regarding = {"kind": "Node", "apiVersion": "v1", "name": identity.node, "uid": identity.node}
    else:
        regarding = {"kind": "Pod", "apiVersion": "v1", "name": pod.name, "namespace": pod.namespace}
        if pod.uid:
            regarding["uid"] = pod.uid
        if instance != identity.node:
            about_node = f" (node {identity.node})"
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace_of(pod)},
        "eventTime": when,
        "type": text.type,
        "reason": text.reason,
        "action": text.action,
        "note": _cut(text.note, MAX_NOTE_BYTES - len(about_node)) + about_node,
        "regarding": regarding,
        "reportingController": CONTROLLER,
        "reportingInstance": instance,
    }


def instance_of(node: str) -> str:
    """Returns the reportingInstance of a node: its name, or both ends and a digest of a name beyond MAX_INSTANCE.

    The admission policy (rbac/40-admission.yaml) computes the ends again and cannot compute digests. No node name has
    a "~", so a shortened name never equals another node's name.
    """
    if len(node) <= MAX_INSTANCE:
        return node
    digest = hashlib.sha256(node.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{node[:_INSTANCE_END]}~{node[-_INSTANCE_END:]}~{digest}"


def event_name(about: str, mark: int) -> str:
    """Returns the name of a new Event: its object's name, cut to _MAX_ABOUT, and mark, 64 random bits."""
    return f"{about[:_MAX_ABOUT].rstrip('.-')}.{mark:016x}"


def namespace_of(pod: PodRef | None) -> str:
    """Returns the namespace of an Event. Events about cluster-scoped objects belong in default."""
    return pod.namespace if pod else "default"


def _cut(note: str, most: int) -> str:
    note = redacted(note, most)
    data = note.encode("utf-8", "replace")
    return note if len(data) <= most else data[:most].decode("utf-8", "ignore") + "..."


@dataclass(frozen=True, slots=True)
class Allowance:
    """A token bucket: how many Events are left at a moment, `at` (monotonic seconds)."""

    left: float
    at: float

    def after(self, now: float, most: int, refill: float) -> Allowance:
        """Returns the allowance at now: one Event more for each refill seconds since `at`, up to most."""
        return Allowance(min(most, self.left + (now - self.at) / refill), now)

    def spent(self) -> Allowance:
        return Allowance(self.left - 1, self.at)


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An Event that was recorded: when, by the wall clock, and about which pod, None for the node."""

    at: datetime
    text: EventText
    pod: PodRef | None


class EventRecorder:
    """Recorder of Events, which run() writes in the background. record() never blocks and never raises.

    Drops an equal Event within REPEAT_S, and Events beyond BURST, OBJECT_BURST or QUEUE_LENGTH. `dropped` counts these
    (not the equal ones), and those that the API server did not accept. `recent` has the last KEPT_EVENTS.
    """

    def __init__(self, api: Api, identity: NodeIdentity, clock: Clock, rng: random.Random) -> None:
        self._api = api
        self._identity = identity
        self._clock = clock
        self._rng = rng
        self._queue: asyncio.Queue[tuple[EventText, PodRef | None]] = asyncio.Queue(QUEUE_LENGTH)
        self._recorded: OrderedDict[tuple[EventText, PodRef | None], float] = OrderedDict()
        self._overall = Allowance(BURST, clock.monotonic())
        self._objects: OrderedDict[PodRef | None, Allowance] = OrderedDict()
        self.recent: deque[RecordedEvent] = deque(maxlen=KEPT_EVENTS)
        self.dropped = 0

    def record(self, text: EventText, pod: PodRef | None = None) -> None:
        """Queues an Event about the pod, or about this node if pod is None."""
        key = (text, pod)
        now = self._clock.monotonic()
        last = self._recorded.get(key)
        if last is not None and now - last < REPEAT_S:
            return
        overall = self._overall.after(now, BURST, REFILL_S)
        about = self._objects.get(pod, Allowance(OBJECT_BURST, now)).after(now, OBJECT_BURST, OBJECT_REFILL_S)
        reserved = 0 if text.type == WARNING else FOR_WARNINGS
        if overall.left < 1 + reserved or about.left < 1 or self._queue.full():
            self.dropped += 1
            return
        self._overall = overall.spent()
        _remember(self._objects, pod, about.spent())
        _remember(self._recorded, key, now)
        self._queue.put_nowait(key)
        self.recent.append(RecordedEvent(self._clock.now(), text, pod))

    async def run(self) -> None:
        """Writes queued Events until cancelled. Cancel-safe; Events that still wait are lost."""
        while True:
            text, pod = await self._queue.get()
            try:
                async with self._clock.timeout(WHOLE_TIMEOUT_S):
                    await self._write(text, pod)
            except KubeConflict:
                continue  # success: the name is random, so an earlier try that seemed to fail has created the Event
            except (KubeError, TimeoutError) as error:
                self.dropped += 1
                _log.warning(
                    "event not recorded",
                    extra={"reason": text.reason, "note": text.note, "cause": str(error) or "timeout"},
                )

    async def _write(self, text: EventText, pod: PodRef | None) -> None:
        name = event_name(pod.name if pod else self._identity.node, self._rng.getrandbits(64))
        when = self._clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body = event_body(self._identity, text, pod, name, when)
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace_of(pod)}/events"
        async for attempt in api_write(self._clock, self._rng):
            with attempt:
                await self._api.request("create", path, resource="events.events.k8s.io", body=body)
