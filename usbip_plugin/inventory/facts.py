"""What is known: all that decides what is advertised, and the devices that were learnt from it."""

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
    """A device a resource offers, as last seen. descriptor is None while only its lock is known.

    configured: some selector of the resource names it. One that none names any more is offered to whoever has it only.
    """

    key: DeviceKey
    usb_id: UsbId
    selector: DeviceSelector
    descriptor: Descriptor | None = None
    identity: Identity = UNKNOWN_IDENTITY
    configured: bool = True


OfferedDevices = Mapping[str, Mapping[str, OfferedDevice]]
"""resource name -> device ID -> Seen. Carried from one evaluation to the next."""


@dataclass(frozen=True, slots=True)
class PortSummary:
    """This node's vhci_hcd. error is None while it can attach; free and used ports by hub."""

    error: str | None = None
    free_hs: int = 1
    free_ss: int = 1
    used_hs: int = 0
    used_ss: int = 0

    def hinders_as(self, other: PortSummary) -> bool:
        """Whether the same devices could be attached: how many ports are free matters for people only."""
        mine, others = ((one.error, one.free_hs == 0, one.free_ss == 0) for one in (self, other))
        return mine == others


@dataclass(frozen=True, slots=True)
class ApiStatus:
    """The API server as the lock watch sees it. unreachable_for: seconds, None while it answers."""

    unreachable_for: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that decides what is advertised. Mappings by device ID, servers by key.

    released: devices let go by their holder, whose server has not been asked since its reset. moved_here(device_id):
    the claim on another device that is attached from this one's place. restless: see handover.ProbeLimiter; suspect:
    see handover.ReplacedDevices.
    """

    me: str
    config: Config
    servers: Mapping[ServerKey, ServerView]
    locks: Mapping[str, Lock]
    standings: Mapping[str, LockStatus]
    claims: Mapping[str, Claim]
    driver: PortSummary = field(default_factory=PortSummary)
    api: ApiStatus = field(default_factory=ApiStatus)
    released: frozenset[str] = frozenset()
    moved_here: Callable[[str], Claim | None] = lambda _device_id: None
    probe_limited: frozenset[str] = frozenset()
    suspect: frozenset[str] = frozenset()

    def identity_of(self, device_id: str, descriptor: Descriptor) -> Identity:
        """What the device that is listed so has told: nothing, if what its lock says is of another."""
        lock = self.locks.get(device_id)
        if lock is None or device_id in self.suspect or lock.usb_id not in (None, descriptor.usb_id):
            return UNKNOWN_IDENTITY
        if lock.read_from != descriptor.devid and device_id not in self.probe_limited:
            return UNKNOWN_IDENTITY
        return lock.identity
