"""Finds a lost device under another bus id or server: asks the devices of its kind for their serial numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from usbip_plugin.attaching import Means
from usbip_plugin.claims import Claim
from usbip_plugin.errors import ClaimBusy, PluginError, ServerUnreachable, UsbipError, WrongSerial
from usbip_plugin.listings import Listings
from usbip_plugin.model import Descriptor, DeviceKey, Identity, ServerKey
from usbip_plugin.usbip.poller import ServerView
from usbip_plugin.whereabouts import Ask, Nowhere, Reading, Sighting, Verdict, decide
from usbip_plugin.work import DeviceWork

log = logging.getLogger(__name__)

READING_LASTS = 3600.0
"""Seconds a serial number counts that was read from a device which its server has listed as the same ever since."""
GIVEN_UP = 3.0
"""Seconds a device is left alone that could not be read, or not be attached from there."""
READS_AT_ONCE = 4
HIDDEN = 2.0
"""Seconds a device counts as listed after it was read: until its reset is over and its server was asked again."""

NOTICED = 15.0
"""Seconds within which a loss is found out, also that of a frozen host: what came to another server since may be it."""

MayBe = Callable[[Claim, DeviceKey, Descriptor], bool]
"""Whether this device may be asked if it is the claim's."""


class Seeker:
    """What is known of serial numbers on this node. All methods belong to one event loop.

    on_known() is called, synchronously, when a serial number that was asked for is known, or known not to be had.
    """

    def __init__(self, means: Means, work: DeviceWork, may_be: MayBe, on_known: Callable[[], None]) -> None:
        self._me = means.me
        self._locks = means.locks
        self._clock = means.clock
        self._work = work
        self._may_be = may_be
        self._on_known = on_known
        self._listings = Listings(means.clock)
        self._lost_at: dict[str, float] = {}
        self._readings: dict[DeviceKey, Reading] = {}
        self._asked: dict[str, Sighting] = {}
        self._unread: dict[str, str] = {}
        self._hidden: dict[str, tuple[Sighting, float]] = {}

    def server_changed(self, view: ServerView) -> None:
        """For the poller. What was read of a device is forgotten with the first list that does not have it."""
        self._listings.server_changed(view)
        if not self._listings.reachable(view.server):
            return
        present = {*self._listings.of(view.server), *self._out_of_sight(view.server)}
        self._readings = {
            key: reading
            for key, reading in self._readings.items()
            if key.server != view.server or key in present or reading.devid is None
        }

    def lost(self, device_id: str) -> None:
        """The connection of an attached device has just been found broken."""
        self._lost_at = {i: at for i, at in self._lost_at.items() if self._work.book.get(i) is not None}
        self._lost_at[device_id] = self._clock.monotonic()

    def may_be_listed(self, claim: Claim, server: ServerKey) -> bool:
        """Whether this server lists something that is worth a try to attach the claim's device again."""
        listed = self._listings.of(server)
        if claim.place in listed:
            return True
        return any(
            descriptor.usb_id == claim.usb_id
            and (server == claim.key.server or (claim.serial is not None and self._may_be(claim, key, descriptor)))
            for key, descriptor in listed.items()
        )

    def home_is_away(self, claim: Claim) -> ServerUnreachable | None:
        """Why the claim's own server does not answer; None if it does, or the device has been followed already."""
        error = self._listings.unreachable(claim.key.server)
        if error is None or claim.moved_to is not None or not claim.serial:
            return None
        return ServerUnreachable(claim.key.server, error)

    def find(self, claim: Claim) -> Verdict:
        """Where the claim's device is if not at its own place. Begins to read what has to be read for that.

        Nowhere unless its serial number is known, and if its own server lists such a device at its own place. Other
        servers have it only if it came there since it was lost: two that tell one serial number are not one.
        """
        if not claim.serial or self._listed_at_home(claim):
            return Nowhere()
        verdict = decide(claim.serial, self._sightings(claim))
        if isinstance(verdict, Ask):
            for sighting in verdict.sightings:
                if sighting.key.id not in self._asked and len(self._asked) < READS_AT_ONCE:
                    self._asked[sighting.key.id] = sighting
                    self._work.spawn(self._ask(sighting), f"read serial number of {sighting.key}")
        return verdict

    def wrong_at_home(self, claim: Claim) -> WrongSerial | None:
        """What an attempt to attach the claim's device from its own place would end with, if that is known."""
        listed = self._listings.listed(claim.key)
        if listed is None or not claim.serial or claim.moved_to is not None:
            return None
        reading = self._reading(claim.key, listed)
        if reading is None or reading.devid is None or reading.serial == claim.serial:
            return None
        return WrongSerial(claim.key, claim.serial, reading.serial, listed.devid)

    def not_there(self, place: DeviceKey, error: PluginError) -> None:
        """An attempt to attach a device from this place ended so: it is given up for a while."""
        if isinstance(error, WrongSerial):
            self._note(place, Reading(error.devid, error.found, self._clock.monotonic() + READING_LASTS))
        else:
            self._give_up(place)

    async def probe(self, key: DeviceKey, descriptor: Descriptor) -> Identity:
        """Asks a device who it is, once for all nodes. As Pipeline.probe; ClaimBusy if it is in use here."""
        async with self._work.mutex(key.id):
            if self._work.book.concerns(key.id):
                raise ClaimBusy(f"{key} is in use on this node")
            told = await self._work.pipeline.probe(key, descriptor)
        self._note(key, Reading(told.devid, told.serial or "", self._clock.monotonic() + READING_LASTS))
        return told

    async def _ask(self, sighting: Sighting) -> None:
        try:
            await self.probe(sighting.key, sighting.descriptor)
        except PluginError as error:
            # read again every few seconds for as long as a device is looked for: the same failure is told once
            if isinstance(error, UsbipError) and self._unread.get(sighting.key.id) != str(error):
                self._unread[sighting.key.id] = str(error)
                log.info("serial number not read", extra={"device": str(sighting.key), "cause": str(error)})
            self._give_up(sighting.key)
        finally:
            del self._asked[sighting.key.id]
        self._hidden[sighting.key.id] = sighting, self._clock.monotonic() + HIDDEN
        self._on_known()

    def _sightings(self, claim: Claim) -> Iterator[Sighting]:
        for server in self._listings.servers():
            if not self._listings.reachable(server):
                continue
            for key, descriptor in {**self._out_of_sight(server), **self._listings.of(server)}.items():
                lock = self._locks.locks.get(key.id)
                if (
                    descriptor.usb_id != claim.usb_id
                    or key == claim.key
                    or self._work.book.concerns(key.id)
                    or (lock is not None and lock.holder not in ("", self._me.node))
                    or not self._may_be(claim, key, descriptor)
                    or not self._may_have_come(claim, key)
                ):
                    continue
                reading = self._reading(key, descriptor)
                if reading is not None:
                    yield Sighting(key, descriptor, reading.serial, sure=True)
                else:
                    yield Sighting(key, descriptor, lock.serial if lock is not None else None, sure=False)

    def _may_have_come(self, claim: Claim, key: DeviceKey) -> bool:
        if key.server == claim.key.server:
            return True
        lost_at, since = self._lost_at.get(claim.id), self._listings.since(key)
        if lost_at is None:  # nobody here saw it lost; then that its own server does not have it must do
            return self._listings.reachable(claim.key.server)
        return since is not None and since > lost_at - NOTICED

    def _out_of_sight(self, server: ServerKey) -> dict[DeviceKey, Descriptor]:
        """Devices that are not listed only because this node reads, or has just read, their serial numbers."""
        now = self._clock.monotonic()
        self._hidden = {i: (seen, until) for i, (seen, until) in self._hidden.items() if now < until}
        seen = [*self._asked.values(), *(sighting for sighting, _until in self._hidden.values())]
        return {sighting.key: sighting.descriptor for sighting in seen if sighting.key.server == server}

    def _listed_at_home(self, claim: Claim) -> bool:
        listed = self._listings.listed(claim.key)
        return listed is not None and listed.usb_id == claim.usb_id and self.wrong_at_home(claim) is None

    def _reading(self, key: DeviceKey, descriptor: Descriptor) -> Reading | None:
        reading = self._readings.get(key)
        return reading if reading is not None and reading.holds(descriptor, self._clock.monotonic()) else None

    def _give_up(self, key: DeviceKey) -> None:
        self._note(key, Reading(None, "", self._clock.monotonic() + GIVEN_UP))

    def _note(self, key: DeviceKey, reading: Reading) -> None:
        now = self._clock.monotonic()
        self._readings = {i: known for i, known in self._readings.items() if now < known.until}
        self._readings[key] = reading
