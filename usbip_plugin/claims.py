"""The states of one device on this node, from Allocate to release, as pure functions.

TRANSITIONS is the one table of what may follow what; nothing else holds a flag about a device's progress. The code that
works on a device, in attach/, reports each result as a ClaimEvent:

    state         leaves to
    Free          Locking (Allocate); by adoption Attached, Reattaching, Releasing or Lost
    Locking       Importing; Free if another node has the lock; Releasing if the outcome is unknown
    Importing     Attaching; Releasing after a failure; Lost
    Attaching     Attached; Importing if the port stuck; Releasing after a failure; Lost
    Attached      Reattaching when the port falls free; Releasing when the pod has ended; Lost
    Reattaching   Attached; Releasing when the pod has ended; Lost
    Releasing     Free; Lost
    Lost          Reattaching when the lock is free again; Releasing when the pod has ended; Free
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from usbip_plugin.config.schema import DEFAULT_CHILDREN_TIMEOUT_S, Config, ResourceConfig
from usbip_plugin.model import Attachment, DeviceKey, Endpoint, PodRef, UsbId
from usbip_plugin.sync import Broadcast


class ClaimState(enum.Enum):
    """How far a device has come on this node."""

    FREE = "Free"
    """There is no claim. Nothing of the device is locked, imported or attached here."""
    LOCKING = "Locking"
    """An Allocate asked for the device. The write of its lock is under way; the device is untouched."""
    IMPORTING = "Importing"
    """The lock names this node. The server is being asked for the device; no port of vhci_hcd is used."""
    ATTACHING = "Attaching"
    """The server has handed the device over. The kernel enumerates it, or is about to."""
    ATTACHED = "Attached"
    """The device is enumerated and authorised, and its pod has its device nodes or is about to get them."""
    REATTACHING = "Reattaching"
    """The attachment broke while the pod has the device. The lock still names this node; the plugin attaches again."""
    RELEASING = "Releasing"
    """No pod has the device now. It is being detached; then the lock is released."""
    LOST = "Lost"
    """The lock no longer names this node. The device is being detached, or is, and its pod may still run."""


class ClaimEvent(enum.Enum):
    """What can happen to a claim."""

    ALLOCATE = "Allocate"
    """A kubelet asks for the device, and there is no claim on it."""
    LOCKED = "lock written"
    """The API server has accepted the write that names this node as holder."""
    DENIED = "lock not obtained"
    """Another node holds the lock. Nothing was touched."""
    IMPORTED = "imported"
    """The server exports the device to this node's connection."""
    ATTACHED = "attached"
    """The device is enumerated, verified and authorised, and its CDI spec, if it has one, is written."""
    STUCK = "attach stuck, port freed"
    """The device did not enumerate, and its port is free again. The plugin imports and attaches once more."""
    FAILED = "failed"
    """A step of the Allocate failed. The steps before it must be undone."""
    ADOPTED = "adopted from the previous process"
    """The lock names this node, and the port has the device as the previous process attached it."""
    ORPHANED = "lock found without attachment, pod still there"
    """The lock names this node and a pod has the device, but it is not attached as it should be."""
    UNUSED = "lock found, nobody uses the device"
    """The lock names this node, and no pod has the device."""
    PORT_LOST = "port lost"
    """The port became free or has another device, without this node's doing."""
    POD_GONE = "pod gone"
    """The pod that has the device has ended, or was never admitted."""
    LOCK_LOST = "lock lost"
    """The lock names another holder, or nobody, without this node's doing."""
    LOCK_FREE = "lock free again, pod still there"
    """A lost lock is free, and the pod that lost the device still runs."""
    DEPRIVED = "a pod has it, its lock is not this node's"
    """Found at start: a pod has the device or it is attached, but the lock names another holder or nobody."""
    RELEASED = "released"
    """The device is detached, and the lock no longer names this node."""


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
    """One device on this node, as far as this process knows. Times are seconds on the node's monotonic clock.

    resource: the resource by which it was allocated, without the domain; None if unknown, after an adoption.
    children, children_timeout: see ResourceConfig; as configured at the last attach.
    port: the vhci port, from the moment the kernel has the socket.
    attachment: the last one seen. `state` shows whether the device is still attached.
    traceparent: the trace of the Allocate, which all later spans join.
    allocated_at: when an Allocate asked for it last.
    pod: the pod that has it, None while unknown.
    missed_polls: polls of pod-resources in a row that did not list it; missing_since: when the first of them began.
    usb_id: changes if the device comes back with another USB ID that its resource selects, too.
    serial: the serial number that the kernel has read or a selector names, None if unknown.
    moved_to: the server and bus ID where it is plugged in now, None if at `key`. Set before the lock of that bus ID is
        taken.
    blocked_by: what keeps a lost device from being re-attached, "" if unknown.
    container_indexes: the numbers by which its containers know it, with CDI; None if unknown, after an adoption.
    allocated_as: the attachment whose nodes its containers got last, by an Allocate or, with CDI, at their start.
    import_from: this node's end of the last connection by which it was imported, None if unknown.
    pod_ended: whether the kubelet has allocated the device to another pod, so that its own has ended.
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
    import_from: Endpoint | None = None
    pod_ended: bool = False

    @property
    def id(self) -> str:
        return self.key.id

    @property
    def location(self) -> DeviceKey:
        """The key by which servers, the kernel and port records identify the device now."""
        return self.moved_to or self.key

    @property
    def locked(self) -> tuple[DeviceKey, ...]:
        """The keys of the claim's locks: that of its device and, if the device has moved, that of its location."""
        return (self.key,) if self.location == self.key else (self.key, self.location)

    @property
    def extra_timeout(self) -> float:
        """Seconds by which childrenTimeout lets an attach take longer than usual."""
        return max(0.0, self.children_timeout - DEFAULT_CHILDREN_TIMEOUT_S)


def place_of(claim: Claim) -> str:
    """Returns for people where a device is imported from: the bus ID, with the server if it is not its own server."""
    return claim.location.busid if claim.location.server == claim.key.server else str(claim.location)


IN_USE = (ClaimState.ATTACHED, ClaimState.REATTACHING, ClaimState.LOST)
"""States in which a pod has the device, or is to have it again."""


class IllegalTransition(AssertionError):
    """TRANSITIONS does not have this event for the claim's state: a bug of this project."""


def step(claim: Claim, event: ClaimEvent) -> Claim:
    """Returns the claim after an event. Raises IllegalTransition if TRANSITIONS does not have it for its state."""
    try:
        state = TRANSITIONS[claim.state, event]
    except KeyError:
        raise IllegalTransition(f"{claim.key}: {event.name} in state {claim.state.value}") from None
    return replace(claim, state=state)


def allocated(claim: Claim, now: float) -> Claim:
    """Returns the claim after another Allocate for it: its pod is unknown until pod-resources lists it."""
    return replace(claim, allocated_at=now, pod=None, missed_polls=0, pod_ended=False)


class ClaimBook:
    """The claims of one node, by device ID. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        self._moved: dict[str, str] = {}
        self._subscribers: list[Callable[[str], None]] = []
        self.view: Mapping[str, Claim] = MappingProxyType(self._claims)
        """All claims by device ID, live and read-only."""
        self.changed = Broadcast()
        """Fires after every change, after all subscribers."""

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Calls callback(device_id) synchronously after every change of a claim. Returns a function to unsubscribe."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def get(self, device_id: str) -> Claim | None:
        return self._claims.get(device_id)

    def __getitem__(self, device_id: str) -> Claim:
        return self._claims[device_id]

    def moved_here(self, device_id: str) -> Claim | None:
        """Returns the claim on another device that is attached from this device's bus ID, or None."""
        return self._claims.get(self._moved.get(device_id, ""))

    def in_use(self, device_id: str) -> bool:
        """Returns whether this device has a claim, or another claim's device is attached from its bus ID."""
        return device_id in self._claims or device_id in self._moved

    def put(self, claim: Claim) -> None:
        """Replaces a claim by a newer version of it in the same state."""
        self._forget_location(claim.id)
        self._claims[claim.id] = claim
        if claim.moved_to is not None:
            self._moved[claim.moved_to.id] = claim.id
        self._notify(claim.id)

    def move(self, claim: Claim, event: ClaimEvent) -> None:
        """Replaces a claim by the claim after an event, and removes it if that is Free. Raises IllegalTransition."""
        after = step(claim, event)
        if after.state is ClaimState.FREE:
            self._forget_location(claim.id)
            self._claims.pop(claim.id, None)
            self._notify(claim.id)
        else:
            self.put(after)

    def _notify(self, device_id: str) -> None:
        for callback in tuple(self._subscribers):
            callback(device_id)
        self.changed.fire()

    def _forget_location(self, device_id: str) -> None:
        before = self._claims.get(device_id)
        if before is not None and before.moved_to is not None:
            self._moved.pop(before.moved_to.id, None)


class Resources(Protocol):
    """The resources of the configuration that is in force, as far as devices in use depend on them."""

    @property
    def config(self) -> Config: ...

    def resource_named(self, name: str) -> ResourceConfig | None:
        """Returns a resource by its name without the domain, also a removed one while a pod has its device."""

    def resource_of(self, claim: Claim) -> ResourceConfig:
        """Returns the resource by which the claim was made, or one with the defaults if it is gone."""


@dataclass(frozen=True, slots=True)
class DeviceUser:
    """A pod that has a device, as pod-resources lists it. resource: the resource's name without the domain."""

    pod: PodRef
    resource: str


def serves(claim: Claim, resource: str, usb_id: UsbId) -> bool:
    """Returns whether a claim was made by this resource. If its resource is unknown, compares the USB IDs."""
    return claim.usb_id == usb_id if claim.resource is None else claim.resource == resource
