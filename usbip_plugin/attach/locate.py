"""Where a lost device is: what servers list, whose serial numbers are known, and asking for the others.

A device is known by its vendor:product and its serial number. DEVLIST carries no serial numbers, and the annotation
of a lock may be about a device that had the bus id before. So annotations are believed only where a mistake does no
harm: the device that seems to be the lost one is compared once more when it has enumerated, and a device counts as
not found only when all candidates have been read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimState, Resources
from usbip_plugin.config.schema import Config, Selector
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import ClaimBusy, PluginError, ServerUnreachable, UsbipError, WrongSerial
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import Descriptor, DeviceKey, Identity, ServerKey
from usbip_plugin.sync import Bell
from usbip_plugin.usbip.poller import ServerPoller, ServerState, ServerView

log = logging.getLogger(__name__)


def places(config: Config, claims: Iterable[Claim]) -> frozenset[ServerKey]:
    """Returns the servers where the devices of these claims may be.

    These are their own servers and, for a claim with a serial number, all servers of its resource. While the resource
    of such a claim is unknown, these are the servers of all resources.
    """
    found = set()
    for claim in claims:
        found.add(claim.key.server)
        for resource in config.resources:
            if claim.serial and claim.resource in (resource.name, None):
                found.update(selector.target for selector in resource.devices)
    return frozenset(found)


def may_be(config: Config, claim: Claim, key: DeviceKey, descriptor: Descriptor) -> bool:
    """Returns whether the configuration allows a listed device to be the lost one of this claim.

    On the claim's own server, some resource must select it. On another server, the claim's resource must select it by
    this very serial number. Device classes are not compared: the server may not list them yet. False for a claim
    without a serial number.
    """
    identity = Identity(serial=claim.serial)

    def names(resource: str, selector: Selector) -> bool:
        here = key.server == claim.key.server
        return here or (claim.resource in (None, resource) and selector.serial == claim.serial)

    return claim.serial is not None and any(
        device.target == key.server
        and names(resource.name, device.selector)
        and matches(replace(device.selector, class_=None), descriptor, identity) is Match.YES
        for resource in config.resources
        for device in resource.devices
    )


@dataclass(frozen=True, slots=True)
class SerialReading:
    """The serial number that was read from the device at one place.

    devid: the Descriptor.devid of the device that was read; None for any device that is listed at that place.
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
    """A listed device with the USB id of a lost one.

    serial: the serial number, None if it is not known.
    sure: whether this very device was read just now or earlier, also without success. Otherwise serial is the lock's.
    """

    key: DeviceKey
    descriptor: Descriptor
    serial: str | None
    sure: bool


@dataclass(frozen=True, slots=True)
class LocatedAt:
    """The place where the lost device is plugged in now."""

    key: DeviceKey


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Several devices with the serial number of the lost one."""

    keys: tuple[DeviceKey, ...]


@dataclass(frozen=True, slots=True)
class NeedsProbe:
    """Candidates whose serial numbers must be read before the lost device can be located."""

    sightings: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class NotFound:
    """The result of a search in which no listed device is the lost one."""


Verdict = LocatedAt | Ambiguous | NeedsProbe | NotFound


def decide(serial: str, sightings: Iterable[Candidate]) -> Verdict:
    """Decides which of these candidates is the device with this serial number, or which must be read first."""
    seen = tuple(sightings)
    same = [sighting for sighting in seen if sighting.serial == serial]
    match len(same):
        case 0:
            ask = [sighting for sighting in seen if not sighting.sure]
        case 1:
            ask = [sighting for sighting in seen if sighting.serial is None]
        case _:
            ask = [sighting for sighting in same if not sighting.sure]
    if ask:
        return NeedsProbe(tuple(ask))
    if len(same) == 1:
        return LocatedAt(same[0].key)
    return Ambiguous(tuple(sorted(sighting.key for sighting in same))) if same else NotFound()


READING_LASTS = 3600.0
"""Seconds for which a serial number is valid after it was read, while its server lists the same device."""
GIVEN_UP = 3.0
"""Seconds for which a device is left alone after it could not be read, or not be attached from that place."""
READS_AT_ONCE = 4
"""Devices whose serial numbers this node reads at the same time while it looks for lost devices."""
HIDDEN = 2.0
"""Seconds for which a device counts as listed after it was read.

In this time its reset ends, and its server is polled again.
"""

NOTICED = 15.0
"""Seconds within which the loss of a device is noticed, also if the server's host froze.

A device that came to another server up to this long before the loss was noticed may be the lost one.
"""


class DeviceLocator:
    """Finds out where a lost device is plugged in now, by its serial number. All methods belong to one event loop."""

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
        self.known = Bell()
        """Rings when the reading of a serial number has ended, with or without success."""
        self._lost_at: dict[str, float] = {}
        self._readings: dict[DeviceKey, SerialReading] = {}
        self._asked: dict[str, Candidate] = {}
        self._unread: dict[str, str] = {}
        self._hidden: dict[str, tuple[Candidate, float]] = {}
        tasks.book.subscribe(self._claim_changed)

    def _claim_changed(self, _device_id: str) -> None:
        lost = [claim for claim in self._tasks.book.view.values() if claim.state is ClaimState.REATTACHING]
        self._poller.poll_eagerly(places(self._resources.config, lost))

    def server_changed(self, view: ServerView) -> None:
        """Forgets what was read from devices that a server does not list now. To be called at each change of a view.

        Devices that this node is reading, or has just read, count as listed.
        """
        if view.state is not ServerState.REACHABLE:
            return
        present = {*view.exported, *self._out_of_sight(view.server)}
        self._readings = {
            key: reading
            for key, reading in self._readings.items()
            if key.server != view.server or key in present or reading.devid is None
        }

    def lost(self, device_id: str) -> None:
        """Records that the connection of an attached device was found broken just now."""
        self._lost_at = {i: at for i, at in self._lost_at.items() if self._tasks.book.get(i) is not None}
        self._lost_at[device_id] = self._clock.monotonic()

    def may_be_listed(self, claim: Claim, server: ServerKey) -> bool:
        """Returns whether this server lists a device that is worth a try to re-attach the claim's device."""
        listed = self._poller.view(server).exported
        if claim.location in listed:
            return True
        return any(
            descriptor.usb_id == claim.usb_id
            and (
                server == claim.key.server
                or (claim.serial is not None and may_be(self._resources.config, claim, key, descriptor))
            )
            for key, descriptor in listed.items()
        )

    def home_is_away(self, claim: Claim) -> ServerUnreachable | None:
        """Returns why the claim's own server does not answer, or None.

        None also if the device has no serial number, or has been followed to another place already.
        """
        error = self._poller.view(claim.key.server).error
        if error is None or claim.moved_to is not None or not claim.serial:
            return None
        return ServerUnreachable(claim.key.server, error)

    def find(self, claim: Claim) -> Verdict:
        """Returns where the claim's device is if not at its own place. Begins to read the serial numbers needed.

        NotFound if the claim has no serial number, or if its own server lists such a device at its own place. A device
        on another server counts only if it came there since the loss: two devices may have one serial number.
        """
        if not claim.serial or self._listed_at_home(claim):
            return NotFound()
        verdict = decide(claim.serial, self._sightings(claim))
        if isinstance(verdict, NeedsProbe):
            for sighting in verdict.sightings:
                if sighting.key.id not in self._asked and len(self._asked) < READS_AT_ONCE:
                    self._asked[sighting.key.id] = sighting
                    self._tasks.spawn(self._ask(sighting), f"read serial number of {sighting.key}")
        return verdict

    def wrong_at_home(self, claim: Claim) -> WrongSerial | None:
        """Returns the error with which an attach from the claim's own place would end, or None if that is not known.

        None also if the device has been followed to another place.
        """
        listed = self._listed(claim.key)
        if listed is None or not claim.serial or claim.moved_to is not None:
            return None
        reading = self._reading(claim.key, listed)
        if reading is None or reading.devid is None or reading.serial == claim.serial:
            return None
        return WrongSerial(claim.key, claim.serial, reading.serial, listed.devid)

    def not_there(self, place: DeviceKey, error: PluginError) -> None:
        """Records that an attach from this place has failed with this error.

        After WrongSerial the serial number found there is kept. After any other error the place is left alone for
        GIVEN_UP seconds.
        """
        if isinstance(error, WrongSerial):
            self._note(place, SerialReading(error.devid, error.found, self._clock.monotonic() + READING_LASTS))
        else:
            self._give_up(place)

    async def probe(self, key: DeviceKey, descriptor: Descriptor) -> Identity:
        """Reads a device's serial number and interfaces, once for all nodes, and remembers the serial number.

        Raises the errors of Pipeline.probe, and ClaimBusy if the device is in use on this node. Takes the mutex of the
        device.
        """
        async with self._tasks.mutex(key.id):
            if self._tasks.book.in_use(key.id):
                raise ClaimBusy(f"{key} is in use on this node")
            identity = await self._pipeline.probe(key, descriptor)
        self._note(key, SerialReading(identity.devid, identity.serial or "", self._clock.monotonic() + READING_LASTS))
        return identity

    async def _ask(self, sighting: Candidate) -> None:
        try:
            await self.probe(sighting.key, sighting.descriptor)
        except PluginError as error:
            # the device is read again every few seconds while a lost one is looked for: the same failure is logged once
            if isinstance(error, UsbipError) and self._unread.get(sighting.key.id) != str(error):
                self._unread[sighting.key.id] = str(error)
                log.info("serial number not read", extra={"device": str(sighting.key), "cause": str(error)})
            self._give_up(sighting.key)
        finally:
            del self._asked[sighting.key.id]
        self._hidden[sighting.key.id] = sighting, self._clock.monotonic() + HIDDEN
        self.known.ring()

    def _sightings(self, claim: Claim) -> Iterator[Candidate]:
        for server, view in self._poller.views.items():
            if view.state is not ServerState.REACHABLE:
                continue
            for key, descriptor in {**self._out_of_sight(server), **view.exported}.items():
                lock = self._locks.locks.get(key.id)
                if (
                    descriptor.usb_id != claim.usb_id
                    or key == claim.key
                    or self._tasks.book.in_use(key.id)
                    or (lock is not None and lock.holder not in ("", self._me.node))
                    or not may_be(self._resources.config, claim, key, descriptor)
                    or not self._may_have_come(claim, key)
                ):
                    continue
                reading = self._reading(key, descriptor)
                if reading is not None:
                    yield Candidate(key, descriptor, reading.serial, sure=True)
                else:
                    yield Candidate(key, descriptor, lock.serial if lock is not None else None, sure=False)

    def _may_have_come(self, claim: Claim, key: DeviceKey) -> bool:
        if key.server == claim.key.server:
            return True
        lost_at = self._lost_at.get(claim.id)
        if lost_at is None:  # this process did not see the loss: it is enough that its own server does not list it
            return self._poller.view(claim.key.server).state is ServerState.REACHABLE
        stay = self._poller.view(key.server).stays.get(key.busid)
        return stay is not None and stay.since > lost_at - NOTICED

    def _out_of_sight(self, server: ServerKey) -> dict[DeviceKey, Descriptor]:
        """Returns devices that may be missing from the list only because this node reads them, or has just done so."""
        now = self._clock.monotonic()
        self._hidden = {i: (seen, until) for i, (seen, until) in self._hidden.items() if now < until}
        seen = [*self._asked.values(), *(sighting for sighting, _until in self._hidden.values())]
        return {sighting.key: sighting.descriptor for sighting in seen if sighting.key.server == server}

    def _listed(self, key: DeviceKey) -> Descriptor | None:
        return self._poller.view(key.server).find(key.busid)

    def _listed_at_home(self, claim: Claim) -> bool:
        listed = self._listed(claim.key)
        return listed is not None and listed.usb_id == claim.usb_id and self.wrong_at_home(claim) is None

    def _reading(self, key: DeviceKey, descriptor: Descriptor) -> SerialReading | None:
        reading = self._readings.get(key)
        return reading if reading is not None and reading.holds(descriptor, self._clock.monotonic()) else None

    def _give_up(self, key: DeviceKey) -> None:
        self._note(key, SerialReading(None, "", self._clock.monotonic() + GIVEN_UP))

    def _note(self, key: DeviceKey, reading: SerialReading) -> None:
        now = self._clock.monotonic()
        self._readings = {i: known for i, known in self._readings.items() if now < known.until}
        self._readings[key] = reading
