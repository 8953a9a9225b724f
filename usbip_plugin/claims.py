"""From Allocate to release: the states of one device on this node, as pure functions.

One transition table says what may follow what; nothing else in the project holds a flag about a device's progress.
`attacher.py` does the work and reports each result here as an Event.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from usbip_plugin.config.schema import DEFAULT_CHILDREN_TIMEOUT_S, OnLoss
from usbip_plugin.model import Attachment, DeviceKey, Lock, NodeIdentity, PodRef, UsbId
from usbip_plugin.vhci.driver import PortState
from usbip_plugin.vhci.sysfs import PortStatus

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


class State(enum.Enum):
    """Where a device stands on this node. FREE is the absence of a claim."""

    FREE = "Free"
    LOCKING = "Locking"
    IMPORTING = "Importing"
    ATTACHING = "Attaching"
    ATTACHED = "Attached"
    REATTACHING = "Reattaching"
    RELEASING = "Releasing"
    LOST = "Lost"


class Event(enum.Enum):
    """What can happen to a claim."""

    ALLOCATE = "Allocate"
    LOCKED = "lock written"
    DENIED = "lock not obtained"
    IMPORTED = "imported"
    ATTACHED = "attached"
    STUCK = "attach stuck, port freed"
    FAILED = "failed"
    ADOPTED = "adopted from the previous process"
    ORPHANED = "lock found without attachment, pod still there"
    UNUSED = "lock found, nobody uses the device"
    PORT_LOST = "port lost"
    POD_GONE = "pod gone"
    LOCK_LOST = "lock lost"
    LOCK_FREE = "lock free again, pod still there"
    DEPRIVED = "a pod has it, its lock is not this node's"
    RELEASED = "released"


TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.FREE, Event.ALLOCATE): State.LOCKING,
        (State.FREE, Event.ADOPTED): State.ATTACHED,
        (State.FREE, Event.ORPHANED): State.REATTACHING,
        (State.FREE, Event.UNUSED): State.RELEASING,
        (State.FREE, Event.DEPRIVED): State.LOST,
        (State.LOCKING, Event.LOCKED): State.IMPORTING,
        (State.LOCKING, Event.DENIED): State.FREE,
        (State.LOCKING, Event.FAILED): State.RELEASING,
        (State.IMPORTING, Event.IMPORTED): State.ATTACHING,
        (State.IMPORTING, Event.FAILED): State.RELEASING,
        (State.IMPORTING, Event.LOCK_LOST): State.LOST,
        (State.ATTACHING, Event.ATTACHED): State.ATTACHED,
        (State.ATTACHING, Event.STUCK): State.IMPORTING,
        (State.ATTACHING, Event.FAILED): State.RELEASING,
        (State.ATTACHING, Event.LOCK_LOST): State.LOST,
        (State.ATTACHED, Event.PORT_LOST): State.REATTACHING,
        (State.ATTACHED, Event.POD_GONE): State.RELEASING,
        (State.ATTACHED, Event.LOCK_LOST): State.LOST,
        (State.REATTACHING, Event.ATTACHED): State.ATTACHED,
        (State.REATTACHING, Event.POD_GONE): State.RELEASING,
        (State.REATTACHING, Event.LOCK_LOST): State.LOST,
        (State.RELEASING, Event.LOCK_LOST): State.LOST,
        (State.RELEASING, Event.RELEASED): State.FREE,
        (State.LOST, Event.LOCK_FREE): State.REATTACHING,
        (State.LOST, Event.POD_GONE): State.RELEASING,
        (State.LOST, Event.RELEASED): State.FREE,
    }
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One device on this node. Times are seconds on the node's monotonic clock.

    resource is None while it is not known, after an adoption. port is set from the moment the kernel has the socket;
    attachment is the last one seen, whether it still stands is what the state says; traceparent is the Allocate's, so
    that all that follows joins its trace; absent counts the polls in a row that did not list the device, the first of
    them begun at absent_since.

    serial: as the device told it to this kernel, None if it never did. moved_to: where its server lists the device now,
    None while that is its own bus id; set from before the lock there is taken until it is released. hindrance: why a
    lost device is not attached again, "" if there is nothing to say.
    numbers: those its containers know the device by, where it is handed out by CDI; None if that is not known, after an
    adoption. children, children_timeout: see ResourceConfig; as the configuration had them when it was attached last.
    given: the attachment whose nodes its containers were given last, by an Allocate or, with CDI, at a start; as far as
    this process knows. handed_back: the kubelet has offered the device to another pod, so that its own has ended.
    """

    key: DeviceKey
    usb_id: UsbId
    state: State = State.FREE
    resource: str | None = None
    children: tuple[str, ...] | None = None
    children_timeout: float = DEFAULT_CHILDREN_TIMEOUT_S
    port: int | None = None
    attachment: Attachment | None = None
    traceparent: str | None = None
    allocated_at: float = 0.0
    pod: PodRef | None = None
    absent: int = 0
    absent_since: float = 0.0
    serial: str | None = None
    moved_to: DeviceKey | None = None
    hindrance: str = ""
    numbers: tuple[int, ...] | None = ()
    given: Attachment | None = None
    handed_back: bool = False

    @property
    def id(self) -> str:
        return self.key.id

    @property
    def place(self) -> DeviceKey:
        """Where the device is imported from: what servers, kernel and port records know it by."""
        return self.moved_to or self.key

    @property
    def more_time(self) -> float:
        """Seconds that an attach may take beyond its usual time, because its children may."""
        return max(0.0, self.children_timeout - DEFAULT_CHILDREN_TIMEOUT_S)


def place_of(claim: Claim) -> str:
    """Where it is imported from, for people: the bus id, and the server if that is another than its own."""
    return claim.place.busid if claim.place.server == claim.key.server else str(claim.place)


IN_USE = (State.ATTACHED, State.REATTACHING, State.LOST)
"""States in which a pod has the device, or is to have it again."""


class IllegalTransition(AssertionError):
    """An event that the table does not allow: a bug in this project, never the outside's doing."""


def step(claim: Claim, event: Event) -> Claim:
    """The claim after the event. IllegalTransition if the table has no such arrow."""
    try:
        state = TRANSITIONS[claim.state, event]
    except KeyError:
        raise IllegalTransition(f"{claim.key}: {event.name} in state {claim.state.value}") from None
    return replace(claim, state=state)


def allocated(claim: Claim, now: float) -> Claim:
    """An Allocate has just asked for the device (again): who uses it is to be seen anew."""
    return replace(claim, allocated_at=now, pod=None, absent=0, handed_back=False)


class ClaimBook:
    """The claims of one node, by device ID. on_change(device_id) is called, synchronously, after every change."""

    def __init__(self, on_change: Callable[[str], None]) -> None:
        self._claims: dict[str, Claim] = {}
        self._moved: dict[str, str] = {}
        self._on_change = on_change
        self.view: Mapping[str, Claim] = MappingProxyType(self._claims)

    def get(self, device_id: str) -> Claim | None:
        return self._claims.get(device_id)

    def __getitem__(self, device_id: str) -> Claim:
        return self._claims[device_id]

    def moved_here(self, device_id: str) -> Claim | None:
        """The claim on another device that is imported from this one's place."""
        return self._claims.get(self._moved.get(device_id, ""))

    def concerns(self, device_id: str) -> bool:
        """Whether there is a claim on this device, or one that is imported from its place."""
        return device_id in self._claims or device_id in self._moved

    def put(self, claim: Claim) -> None:
        """Notes what is newly known of a claim, without a change of state."""
        self._forget_place(claim.id)
        self._claims[claim.id] = claim
        if claim.moved_to is not None:
            self._moved[claim.moved_to.id] = claim.id
        self._on_change(claim.id)

    def move(self, claim: Claim, event: Event) -> None:
        """The claim, after the event, takes the place of what was known; a claim that becomes Free is forgotten."""
        after = step(claim, event)
        if after.state is State.FREE:
            self._forget_place(claim.id)
            self._claims.pop(claim.id, None)
            self._on_change(claim.id)
        else:
            self.put(after)

    def _forget_place(self, device_id: str) -> None:
        before = self._claims.get(device_id)
        if before is not None and before.moved_to is not None:
            self._moved.pop(before.moved_to.id, None)


@dataclass(frozen=True, slots=True)
class User:
    """Who has a device on this node, by pod-resources. resource: its name without the domain."""

    pod: PodRef
    resource: str


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


def same_pod(one: PodRef, other: PodRef) -> bool:
    """By name, and by uid where both are known."""
    if (one.namespace, one.name) != (other.namespace, other.name):
        return False
    return one.uid is None or other.uid is None or one.uid == other.uid


def serves(claim: Claim, resource: str, usb_id: UsbId) -> bool:
    """Whether the claim is one on this device as this resource; where the resource is not known, the ids tell."""
    return claim.usb_id == usb_id if claim.resource is None else claim.resource == resource


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


class AfterReattach(enum.Enum):
    """What a re-attach means for the pod."""

    GOES_ON = "attached again with the same device nodes"
    CHILDREN_GO_ON = "attached again with the same device nodes, but for its USB node"
    STALE = "attached again with other device nodes: the pod has them only when it is created anew"
    RENEWED = "attached again with other device nodes: a container has them when it is started the next time"
    RESTART = "attached again with other device nodes: the container must end, and has them when it is started again"
    EVICT = "attached again with other device nodes: the pod is evicted"


def after_reattach(
    before: Attachment | None,
    after: Attachment,
    on_loss: OnLoss,
    pod: PodRef | None,
    *,
    by_cdi: bool = False,
    children: tuple[str, ...] | None = None,
) -> AfterReattach:
    """Same paths and numbers: a pod that opens the device anew goes on. before is None where it is not known.

    The kernel numbers a USB node anew at each attach. children: the kinds of child nodes that the resource names; where
    it names some, they are what the pod uses, and it goes on with these alone.
    Only a pod known by its uid is evicted: a name may be another pod's by now. by_cdi: its containers were given CDI
    names, whose spec has the nodes of after by now; any other container keeps the paths of its Allocate.
    """
    if before is not None and before.nodes == after.nodes:
        return AfterReattach.GOES_ON
    if before is not None and children:
        had, has = (tuple(node for node in one.nodes if node.kind in children) for one in (before, after))
        if had and had == has:
            return AfterReattach.CHILDREN_GO_ON
    if on_loss is OnLoss.EVICT and pod is not None and pod.uid is not None:
        return AfterReattach.EVICT
    if not by_cdi:
        return AfterReattach.STALE
    return AfterReattach.RESTART if on_loss is OnLoss.RESTART else AfterReattach.RENEWED


def own_port(place: DeviceKey, ports: Sequence[PortState], number: int | None) -> PortState | None:
    """The port that carries the device of this place by its record, in use or stuck; number narrows it, if it is known.

    A port without our record is not ours, whatever stands on it: in kind several nodes share one kernel, and people
    attach devices by hand.
    """
    for port in ports:
        if port.record == place and number in (None, port.number) and port.status is not PortStatus.NULL:
            return port
    return None


class Adoption(enum.Enum):
    """What to do at start with a lock that names this node."""

    ADOPT = "the port still carries it"
    REATTACH = "no attachment, but a pod has it"
    RELEASE = "no attachment, nobody uses it"


def decide_adoption(
    lock: Lock, me: NodeIdentity, *, attached: bool, used: bool | None, orphan: bool = False
) -> Adoption:
    """For a lock whose holder is this node. used is None when pod-resources could not be read: then nothing is let go.

    An attachment made under another boot id is gone with the old kernel, whatever the port records say. orphan: the
    lock was taken in place of a device that is not to be had from here, or is not this node's any more.
    """
    if orphan:
        return Adoption.RELEASE
    if attached and lock.boot_id == me.boot_id:
        return Adoption.ADOPT
    return Adoption.RELEASE if used is False else Adoption.REATTACH
