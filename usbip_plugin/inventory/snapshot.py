"""The snapshot from which the health of devices is computed, and the devices that a resource offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from usbip_plugin.claims import Claim
from usbip_plugin.config.schema import Config, DeviceSelector
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import UNKNOWN_IDENTITY, Descriptor, DeviceKey, Identity, Lock, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerView


@dataclass(frozen=True, slots=True)
class OfferedDevice:
    """A device that a resource offers, as last seen.

    descriptor: None while the device is known only from its lock or claim.
    configured: whether a selector of the resource matches the device. If none does, only its present pod may have it.
    """

    key: DeviceKey
    usb_id: UsbId
    selector: DeviceSelector
    descriptor: Descriptor | None = None
    identity: Identity = UNKNOWN_IDENTITY
    configured: bool = True

    @property
    def serial(self) -> str | None:
        """The serial number by which the device is selected, None if its selector has none."""
        return self.selector.selector.serial


OfferedDevices = Mapping[str, Mapping[str, OfferedDevice]]
"""Devices by resource name (without the domain), then by device ID. Carried from one evaluation to the next."""


@dataclass(frozen=True, slots=True)
class PortSummary:
    """State of this node's vhci_hcd driver and the number of its ports.

    error: why the driver cannot attach devices; None while it can.
    free_hs, free_ss, used_hs, used_ss: free and used ports of the high-speed (hs) and SuperSpeed (ss) hubs.
    module: for programs: "loaded", "missing", or "unusable" if another error keeps it from attaching devices.
    """

    error: str | None = None
    free_hs: int = 1
    free_ss: int = 1
    used_hs: int = 0
    used_ss: int = 0
    module: str = "loaded"

    def has_same_obstacles(self, other: PortSummary) -> bool:
        """Returns whether the same devices can be attached in both states, however many ports are free."""
        obstacles, others = ((one.error, one.free_hs == 0, one.free_ss == 0) for one in (self, other))
        return obstacles == others


@dataclass(frozen=True, slots=True)
class ApiStatus:
    """Reachability of the API server for the lock watch. unreachable_for: seconds; None while it is reachable."""

    unreachable_for: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything on which the health of devices depends. Mappings and sets are by device ID, `servers` is by server.

    me: the Kubernetes name of this node.
    released: devices that their holder has released and whose server has not been polled since the device's reset.
    awaited: released devices that other nodes offer before this one, see turns.Turns.
    moved_here(device_id): the claim on another device that is attached from this device's bus ID.
    probe_limited: devices that handover.ProbeLimiter keeps from being probed again for now.
    paused: devices that are not offered for a time because Allocates failed, with the cause, see inventory/failures.py.
    replaced: devices whose lock may have the identity of an earlier device, see handover.ReplacedDevices.
    forgotten: devices that have been absent for members.FORGET_AFTER, unless they are listed or held again.
    """

    me: str
    config: Config
    servers: Mapping[ServerKey, ServerView]
    locks: Mapping[str, Lock]
    lock_statuses: Mapping[str, LockStatus]
    claims: Mapping[str, Claim]
    driver: PortSummary = field(default_factory=PortSummary)
    api: ApiStatus = field(default_factory=ApiStatus)
    released: frozenset[str] = frozenset()
    awaited: frozenset[str] = frozenset()
    moved_here: Callable[[str], Claim | None] = lambda _device_id: None
    probe_limited: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    paused: Mapping[str, str] = field(default_factory=dict)
    forgotten: frozenset[str] = frozenset()

    def identity_of(self, device_id: str, descriptor: Descriptor) -> Identity:
        """Returns the identity on the lock of the device that its server lists with this descriptor.

        UNKNOWN_IDENTITY if there is no lock, or if its identity may belong to another device. Another devid counts as
        another device, unless the device is in `probe_limited`.
        """
        lock = self.locks.get(device_id)
        if lock is None or device_id in self.replaced or lock.usb_id not in (None, descriptor.usb_id):
            return UNKNOWN_IDENTITY
        if lock.read_from != descriptor.devid and device_id not in self.probe_limited:
            return UNKNOWN_IDENTITY
        return lock.identity
