"""From Allocate to release: the states of one device on this node, as pure functions.

One transition table says what may follow what; nothing else in the project holds a flag about a device's progress.
Whoever does the work, in attach/, reports each result here as an Event.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from usbip_plugin.config.schema import DEFAULT_CHILDREN_TIMEOUT_S, Config, ResourceConfig
from usbip_plugin.model import Attachment, DeviceKey, PodRef, UsbId
from usbip_plugin.sync import Broadcast


class ClaimState(enum.Enum):
    """Where a device stands on this node. FREE is the absence of a claim."""

    FREE = "Free"
    LOCKING = "Locking"
    IMPORTING = "Importing"
    ATTACHING = "Attaching"
    ATTACHED = "Attached"
    REATTACHING = "Reattaching"
    RELEASING = "Releasing"
    LOST = "Lost"


class ClaimEvent(enum.Enum):
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


TRANSITIONS: Mapping[tuple[ClaimState, ClaimEvent], ClaimState] = MappingProxyType(
    {
        (ClaimState.FREE, ClaimEvent.ALLOCATE): ClaimState.LOCKING,
        (ClaimState.FREE, ClaimEvent.ADOPTED): ClaimState.ATTACHED,
        (ClaimState.FREE, ClaimEvent.ORPHANED): ClaimState.REATTACHING,
        (ClaimState.FREE, ClaimEvent.UNUSED): ClaimState.RELEASING,
        (ClaimState.FREE, ClaimEvent.DEPRIVED): ClaimState.LOST,
        (ClaimState.LOCKING, ClaimEvent.LOCKED): ClaimState.IMPORTING,
        (ClaimState.LOCKING, ClaimEvent.DENIED): ClaimState.FREE,
        (ClaimState.LOCKING, ClaimEvent.FAILED): ClaimState.RELEASING,
        (ClaimState.IMPORTING, ClaimEvent.IMPORTED): ClaimState.ATTACHING,
        (ClaimState.IMPORTING, ClaimEvent.FAILED): ClaimState.RELEASING,
        (ClaimState.IMPORTING, ClaimEvent.LOCK_LOST): ClaimState.LOST,
        (ClaimState.ATTACHING, ClaimEvent.ATTACHED): ClaimState.ATTACHED,
        (ClaimState.ATTACHING, ClaimEvent.STUCK): ClaimState.IMPORTING,
        (ClaimState.ATTACHING, ClaimEvent.FAILED): ClaimState.RELEASING,
        (ClaimState.ATTACHING, ClaimEvent.LOCK_LOST): ClaimState.LOST,
        (ClaimState.ATTACHED, ClaimEvent.PORT_LOST): ClaimState.REATTACHING,
        (ClaimState.ATTACHED, ClaimEvent.POD_GONE): ClaimState.RELEASING,
        (ClaimState.ATTACHED, ClaimEvent.LOCK_LOST): ClaimState.LOST,
        (ClaimState.REATTACHING, ClaimEvent.ATTACHED): ClaimState.ATTACHED,
        (ClaimState.REATTACHING, ClaimEvent.POD_GONE): ClaimState.RELEASING,
        (ClaimState.REATTACHING, ClaimEvent.LOCK_LOST): ClaimState.LOST,
        (ClaimState.RELEASING, ClaimEvent.LOCK_LOST): ClaimState.LOST,
        (ClaimState.RELEASING, ClaimEvent.RELEASED): ClaimState.FREE,
        (ClaimState.LOST, ClaimEvent.LOCK_FREE): ClaimState.REATTACHING,
        (ClaimState.LOST, ClaimEvent.POD_GONE): ClaimState.RELEASING,
        (ClaimState.LOST, ClaimEvent.RELEASED): ClaimState.FREE,
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
    state: ClaimState = ClaimState.FREE
    resource: str | None = None
    children: tuple[str, ...] | None = None
    children_timeout: float = DEFAULT_CHILDREN_TIMEOUT_S
    port: int | None = None
    attachment: Attachment | None = None
    traceparent: str | None = None
    allocated_at: float = 0.0
    pod: PodRef | None = None
    missed_polls: int = 0
    missing_since: float = 0.0
    serial: str | None = None
    moved_to: DeviceKey | None = None
    blocked_by: str = ""
    container_indexes: tuple[int, ...] | None = ()
    allocated_as: Attachment | None = None
    pod_ended: bool = False

    @property
    def id(self) -> str:
        return self.key.id

    @property
    def location(self) -> DeviceKey:
        """Where the device is imported from: what servers, kernel and port records know it by."""
        return self.moved_to or self.key

    @property
    def extra_timeout(self) -> float:
        """Seconds that an attach may take beyond its usual time, because its children may."""
        return max(0.0, self.children_timeout - DEFAULT_CHILDREN_TIMEOUT_S)


def place_of(claim: Claim) -> str:
    """Where it is imported from, for people: the bus id, and the server if that is another than its own."""
    return claim.location.busid if claim.location.server == claim.key.server else str(claim.location)


IN_USE = (ClaimState.ATTACHED, ClaimState.REATTACHING, ClaimState.LOST)
"""States in which a pod has the device, or is to have it again."""


class IllegalTransition(AssertionError):
    """An event that the table does not allow: a bug in this project, never the outside's doing."""


def step(claim: Claim, event: ClaimEvent) -> Claim:
    """The claim after the event. IllegalTransition if the table has no such arrow."""
    try:
        state = TRANSITIONS[claim.state, event]
    except KeyError:
        raise IllegalTransition(f"{claim.key}: {event.name} in state {claim.state.value}") from None
    return replace(claim, state=state)


def allocated(claim: Claim, now: float) -> Claim:
    """An Allocate has just asked for the device (again): who uses it is to be seen anew."""
    return replace(claim, allocated_at=now, pod=None, missed_polls=0, pod_ended=False)


class ClaimBook:
    """The claims of one node, by device ID. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        self._moved: dict[str, str] = {}
        self._subscribers: list[Callable[[str], None]] = []
        self.view: Mapping[str, Claim] = MappingProxyType(self._claims)
        """Live and read-only."""
        self.changed = Broadcast()
        """Fires after every change, when all subscribers have been called."""

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Calls callback(device_id), synchronously, after every change of a claim. Returns the way to unsubscribe."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def get(self, device_id: str) -> Claim | None:
        return self._claims.get(device_id)

    def __getitem__(self, device_id: str) -> Claim:
        return self._claims[device_id]

    def moved_here(self, device_id: str) -> Claim | None:
        """The claim on another device that is imported from this one's place."""
        return self._claims.get(self._moved.get(device_id, ""))

    def in_use(self, device_id: str) -> bool:
        """Whether there is a claim on this device, or one that is imported from its place."""
        return device_id in self._claims or device_id in self._moved

    def put(self, claim: Claim) -> None:
        """Notes what is newly known of a claim, without a change of state."""
        self._forget_place(claim.id)
        self._claims[claim.id] = claim
        if claim.moved_to is not None:
            self._moved[claim.moved_to.id] = claim.id
        self._tell(claim.id)

    def move(self, claim: Claim, event: ClaimEvent) -> None:
        """The claim, after the event, takes the place of what was known; a claim that becomes Free is forgotten."""
        after = step(claim, event)
        if after.state is ClaimState.FREE:
            self._forget_place(claim.id)
            self._claims.pop(claim.id, None)
            self._tell(claim.id)
        else:
            self.put(after)

    def _tell(self, device_id: str) -> None:
        for callback in tuple(self._subscribers):
            callback(device_id)
        self.changed.fire()

    def _forget_place(self, device_id: str) -> None:
        before = self._claims.get(device_id)
        if before is not None and before.moved_to is not None:
            self._moved.pop(before.moved_to.id, None)


class Resources(Protocol):
    """The resources of the configuration, as far as devices in use depend on them."""

    @property
    def config(self) -> Config:
        """The configuration in force."""
        ...

    def resource_named(self, name: str) -> ResourceConfig | None:
        """Returns a resource by its name without the domain, also one that was taken out while a pod has its device."""
        ...

    def resource_of(self, claim: Claim) -> ResourceConfig:
        """Returns the resource by which the claim was made; one with the defaults if there is none any more."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceUser:
    """Who has a device on this node, by pod-resources. resource: its name without the domain."""

    pod: PodRef
    resource: str


def same_pod(one: PodRef, other: PodRef) -> bool:
    """By name, and by uid where both are known."""
    if (one.namespace, one.name) != (other.namespace, other.name):
        return False
    return one.uid is None or other.uid is None or one.uid == other.uid


def serves(claim: Claim, resource: str, usb_id: UsbId) -> bool:
    """Whether the claim is one on this device as this resource; where the resource is not known, the ids tell."""
    return claim.usb_id == usb_id if claim.resource is None else claim.resource == resource
