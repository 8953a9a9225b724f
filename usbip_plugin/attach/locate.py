"""Locates a lost device by its USB ID and serial number among the devices that servers list.

DEVLIST has no serial numbers, and a lock may have the serial number of a device that had its bus ID before. So a device
found by a lock is verified after it enumerated, and a device counts as not found only after all candidates were probed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimState, Resources
from usbip_plugin.config.schema import Config, Selector
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import (
    ClaimBusy,
    DeviceUnknown,
    ImportRefused,
    LockHeld,
    PluginError,
    ServerUnreachable,
    UsbipError,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import Descriptor, DeviceKey, Identity, Lock, NodeIdentity, ServerKey
from usbip_plugin.sync import Broadcast
from usbip_plugin.usbip.poller import ServerPoller, ServerState, ServerView

log = logging.getLogger(__name__)


def possible_servers(config: Config, claims: Iterable[Claim]) -> frozenset[ServerKey]:
    """Returns the servers where the devices of these claims may be.

    These are their own servers and, for a claim with a serial number, all servers of its resource. An unknown resource
    counts as all resources.
    """
    found = set()
    for claim in claims:
        found.add(claim.key.server)
        for resource in config.resources:
            if claim.serial and claim.resource in (resource.name, None):
                found.update(selector.target for selector in resource.devices)
    return frozenset(found)


def may_be_lost_device(config: Config, claim: Claim, key: DeviceKey, descriptor: Descriptor) -> bool:
    """Returns whether the configuration allows a listed device to be the lost one of this claim.

    On the claim's own server, some resource must select it. On another server, or with another USB ID, the claim's
    resource must select it by its serial number. Device classes are not compared: the server may not list them yet.
    False for a claim without a serial number.
    """
    identity = Identity(serial=claim.serial)

    def follows(resource: str, selector: Selector) -> bool:
        like_before = key.server == claim.key.server and descriptor.usb_id == claim.usb_id
        return like_before or (claim.resource in (None, resource) and selector.serial == claim.serial)

    return claim.serial is not None and any(
        device.target == key.server
        and follows(resource.name, device.selector)
        and matches(replace(device.selector, class_=None), descriptor, identity) is Match.YES
        for resource in config.resources
        for device in resource.devices
    )


@dataclass(frozen=True, slots=True)
class SerialReading:
    """The serial number that was read from the device at one location.

    devid: the Descriptor.devid of the device that was read; None for any device that is listed at that location.
    serial: the serial number; "" if the device has none or was not read.
    until: when the reading expires, in seconds on the monotonic clock. Not every server gives a new device a new devid.
    """

    devid: int | None
    serial: str
    until: float

    def holds(self, descriptor: Descriptor, now: float) -> bool:
        """Returns whether the reading is still valid at this time, and is of the device with this descriptor."""
        return now < self.until and self.devid in (None, descriptor.devid)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A listed device that may be a lost one.

    serial: the serial number, None if it is not known.
    probed: whether `serial` is from a probe of this device ("" after a failed one). Otherwise it is from the lock.
    """

    key: DeviceKey
    descriptor: Descriptor
    serial: str | None
    probed: bool


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Several devices with the serial number of the lost one."""

    keys: tuple[DeviceKey, ...]


@dataclass(frozen=True, slots=True)
class NeedsProbe:
    """Candidates whose serial numbers must be read before the lost device can be located."""

    candidates: tuple[Candidate, ...]


Verdict = DeviceKey | Ambiguous | NeedsProbe | None
"""The result of a search: the location of the lost device, or None if no listed device is the lost one."""


def decide(serial: str, candidates: Sequence[Candidate]) -> Verdict:
    """Decides which of these candidates is the device with this serial number, or which must be probed first."""
    same = [candidate for candidate in candidates if candidate.serial == serial]
    match len(same):
        case 0:
            unknown = [candidate for candidate in candidates if not candidate.probed]
        case 1:
            unknown = [candidate for candidate in candidates if candidate.serial is None]
        case _:
            unknown = [candidate for candidate in same if not candidate.probed]
    if unknown:
        return NeedsProbe(tuple(unknown))
    if len(same) > 1:
        return Ambiguous(tuple(sorted(candidate.key for candidate in same)))
    return same[0].key if same else None


READING_LASTS = 3600.0
"""Seconds for which a serial number is valid after it was read, while its server lists the same device."""
RETRY_AFTER = 3.0
"""Seconds for which a device is left alone after it could not be probed, or not be attached from its location."""
MAX_PROBES = 4
"""Maximum number of devices that this node probes at the same time while it looks for lost devices."""
UNLISTED_AFTER_PROBE = 2.0
"""Seconds after a probe for which a device counts as listed, until its reset ends and its server is polled again."""
LOSS_DETECTION = 15.0
"""Longest time in seconds until the loss of a device is noticed, also if the server's host froze.

A device that another server lists since then may be the lost one.
"""


def is_taken(lock: Lock, claim: Claim, me: NodeIdentity) -> bool:
    """Returns whether another node holds this lock, or an earlier boot of this node does for another claim.

    The kubelet may have yet to name the pod that has the device since before a reboot.
    """
    return lock.holder != "" and not lock.names(me) and (lock.holder != me.node or lock.in_place_of != claim.id)


class DeviceLocator:
    """Locates lost devices by their serial numbers. All methods belong to one event loop."""

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        poller: ServerPoller,
        resources: Resources,
        tasks: DeviceTasks,
        pipeline: Pipeline,
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._locks = locks
        self._poller = poller
        self._resources = resources
        self._tasks = tasks
        self._pipeline = pipeline
        self.probe_ended = Broadcast()
        """Fires when the probe of a candidate has ended, with or without success."""
        self._lost_at: dict[str, float] = {}
        self._readings: dict[DeviceKey, SerialReading] = {}
        self._probing: dict[str, Candidate] = {}
        self._failures: dict[DeviceKey, str] = {}
        self._unlisted: dict[str, tuple[Candidate, float]] = {}
        tasks.book.subscribe(self._claim_changed)

    def _claim_changed(self, _device_id: str) -> None:
        lost = [claim for claim in self._tasks.book.view.values() if claim.state is ClaimState.REATTACHING]
        self._poller.poll_eagerly(possible_servers(self._resources.config, lost))

    def server_changed(self, view: ServerView) -> None:
        """Forgets what is known of devices that a server does not list now. To be called at each change of a view.

        Devices that this node is probing, or has just probed, count as listed.
        """
        if view.state is not ServerState.REACHABLE:
            return
        present = {*view.exported, *self._hidden_by_probe(view.server)}
        self._readings = {
            key: reading
            for key, reading in self._readings.items()
            if key.server != view.server or key in present or reading.devid is None
        }
        self._failures = {
            key: text for key, text in self._failures.items() if key.server != view.server or key in present
        }

    def lost(self, device_id: str) -> None:
        """Records that the connection of an attached device was found broken just now."""
        self._lost_at = {i: at for i, at in self._lost_at.items() if self._tasks.book.get(i) is not None}
        self._lost_at[device_id] = self._clock.monotonic()

    def may_be_listed(self, claim: Claim, server: ServerKey) -> bool:
        """Returns whether this server lists a device that is worth a try to re-attach the claim's device."""
        listed = self._poller.view(server).exported
        return claim.location in listed or any(
            descriptor.usb_id == claim.usb_id
            and (server == claim.key.server or may_be_lost_device(self._resources.config, claim, key, descriptor))
            for key, descriptor in listed.items()
        )

    def server_error(self, claim: Claim) -> ServerUnreachable | None:
        """Returns why the claim's own server does not answer, or None.

        None also if the claim has no serial number, or is to be attached from another location already.
        """
        error = self._poller.view(claim.key.server).error
        if error is None or claim.moved_to is not None or not claim.serial:
            return None
        return ServerUnreachable(claim.key.server, error)

    def find(self, claim: Claim) -> Verdict:
        """Returns where the claim's device is, if not at its own bus ID. Starts the probes that the answer needs.

        None if the claim has no serial number, or if such a device is listed at the claim's own bus ID. A device
        on another server counts only if it came there since the loss: two devices may have one serial number.
        """
        listed = self._poller.view(claim.key.server).find(claim.key.busid)
        if not claim.serial or (
            listed is not None and listed.usb_id == claim.usb_id and self.serial_mismatch(claim) is None
        ):
            return None
        verdict = decide(claim.serial, tuple(self._candidates(claim)))
        if isinstance(verdict, NeedsProbe):
            for candidate in verdict.candidates:
                if candidate.key.id not in self._probing and len(self._probing) < MAX_PROBES:
                    self._probing[candidate.key.id] = candidate
                    self._tasks.spawn(self._probe(candidate), f"read serial number of {candidate.key}")
        return verdict

    def listed(self, claim: Claim) -> Descriptor | None:
        """Returns the device that is listed now at the claim's location, or None."""
        return self._poller.view(claim.location.server).find(claim.location.busid)

    def may_answer(self, server: ServerKey) -> bool:
        """Returns whether a list of this server can be expected: its last poll did not fail."""
        return self._poller.view(server).state is not ServerState.UNREACHABLE

    def replaced(self, claim: Claim) -> WrongDevice | None:
        """Returns WrongDevice if a device with another USB ID is at the claim's own bus ID, else None.

        None also if the claim's device is not known to be, and after all probes cannot be, anywhere else: then it may
        itself have another USB ID now. None also if the claim is to be attached from another location.
        """
        listed = self.listed(claim)
        if listed is None or listed.usb_id == claim.usb_id or claim.moved_to is not None or self.find(claim) is None:
            return None
        return WrongDevice(claim.key, claim.usb_id, listed.usb_id)

    def serial_mismatch(self, claim: Claim) -> WrongSerial | None:
        """Returns WrongSerial if another device is known to be at the claim's own bus ID, else None.

        None also if the claim is to be attached from another location.
        """
        listed = self._poller.view(claim.key.server).find(claim.key.busid)
        if listed is None or not claim.serial or claim.moved_to is not None:
            return None
        reading = self._reading(claim.key, listed)
        if reading is None or reading.devid is None or reading.serial == claim.serial:
            return None
        return WrongSerial(claim.key, claim.serial, reading.serial, listed.devid)

    def unlisted(self, claim: Claim) -> DeviceUnknown | None:
        """Returns DeviceUnknown if the claim's device is, or may be, at another bus ID than its own, else None.

        None unless the claim's own bus ID was refused less than RETRY_AFTER seconds ago. A device that is not listed
        may be one whose connection is half-open at the server, and only an import from its own bus ID ends that.
        """
        refused = self._readings.get(claim.key)
        if refused is None or refused.devid is not None or refused.until <= self._clock.monotonic():
            return None
        if claim.moved_to is not None or self.listed(claim) is not None or self.find(claim) is None:
            return None
        return DeviceUnknown(claim.key)

    def attach_failed(self, location: DeviceKey, error: PluginError) -> None:
        """Records that an attach from this location has failed with this error.

        After WrongSerial the serial number found there is kept. After any other error the location is left alone for
        RETRY_AFTER seconds. A server that has answered although its last poll failed is polled again.
        """
        answered = isinstance(error, ImportRefused | WrongDevice | WrongSerial)
        if answered and not self.may_answer(location.server):
            self._poller.poll_soon(location.server)
        if isinstance(error, WrongSerial):
            self._remember(location, error.devid, error.found, READING_LASTS)
        else:
            self._remember(location, None, "", RETRY_AFTER)

    async def probe(self, key: DeviceKey, descriptor: Descriptor) -> None:
        """Reads a device's serial number and interfaces under its mutex, and remembers the serial number.

        Waits until the previous process's devices are adopted. Reads nothing if another call has read the device while
        this one waited. Raises the errors of Pipeline.probe, and ClaimBusy if the device is in use on this node.
        """
        await self._tasks.until_adopted()
        called_at = self._clock.monotonic()
        async with self._tasks.mutex(key.id):
            if self._tasks.book.in_use(key.id):
                raise ClaimBusy(f"{key} is in use on this node")
            last = self._reading(key, descriptor)
            if last is not None and last.until > called_at + READING_LASTS:
                return
            identity = await self._pipeline.probe(key, descriptor)
            self._remember(key, identity.devid, identity.serial or "", READING_LASTS)

    async def _probe(self, candidate: Candidate) -> None:
        key = candidate.key
        try:
            await self.probe(key, candidate.descriptor)
        except LockHeld:
            return  # another node has it, perhaps only to read it; its lock says when that is over
        except PluginError as error:
            # each try to find the lost device probes this one again: the same failure is logged once
            if isinstance(error, UsbipError) and self._failures.get(key) != str(error):
                self._failures[key] = str(error)
                log.info("serial number not read", extra={"device": str(key), "cause": str(error)})
            self._remember(key, None, "", RETRY_AFTER)
        finally:
            del self._probing[key.id]
        self._unlisted[key.id] = candidate, self._clock.monotonic() + UNLISTED_AFTER_PROBE
        self.probe_ended.fire()

    def _candidates(self, claim: Claim) -> Iterator[Candidate]:
        for server, view in self._poller.views.items():
            if view.state is not ServerState.REACHABLE:
                continue
            for key, descriptor in {**self._hidden_by_probe(server), **view.exported}.items():
                lock = self._locks.locks.get(key.id)
                another = descriptor.usb_id != claim.usb_id
                if (
                    # without this, the loss of one device would make this node probe all others of its server
                    (another and (lock is None or lock.serial != claim.serial))
                    or key == claim.key
                    or self._tasks.book.in_use(key.id)
                    or (lock is not None and is_taken(lock, claim, self._me))
                    or not may_be_lost_device(self._resources.config, claim, key, descriptor)
                    or not self._may_have_come(claim, key)
                ):
                    continue
                reading = self._reading(key, descriptor)
                if reading is not None:
                    yield Candidate(key, descriptor, reading.serial, probed=True)
                else:
                    yield Candidate(key, descriptor, lock.serial if lock is not None else None, probed=False)

    def _may_have_come(self, claim: Claim, key: DeviceKey) -> bool:
        if key.server == claim.key.server:
            return True
        lost_at = self._lost_at.get(claim.id)
        if (
            lost_at is None
        ):  # this process did not see the loss: it is enough that its server answers without listing it
            return self._poller.view(claim.key.server).state is ServerState.REACHABLE
        stay = self._poller.view(key.server).stays.get(key.busid)
        return stay is not None and stay.since > lost_at - LOSS_DETECTION

    def _hidden_by_probe(self, server: ServerKey) -> dict[DeviceKey, Descriptor]:
        """Returns the server's devices that usbipd may not list because this node probes, or has just probed, them."""
        now = self._clock.monotonic()
        self._unlisted = {i: (one, until) for i, (one, until) in self._unlisted.items() if now < until}
        hidden = [*self._probing.values(), *(candidate for candidate, _until in self._unlisted.values())]
        return {candidate.key: candidate.descriptor for candidate in hidden if candidate.key.server == server}

    def _reading(self, key: DeviceKey, descriptor: Descriptor) -> SerialReading | None:
        reading = self._readings.get(key)
        return reading if reading is not None and reading.holds(descriptor, self._clock.monotonic()) else None

    def _remember(self, key: DeviceKey, devid: int | None, serial: str, seconds: float) -> None:
        now = self._clock.monotonic()
        self._readings = {i: reading for i, reading in self._readings.items() if now < reading.until}
        self._readings[key] = SerialReading(devid, serial, now + seconds)
