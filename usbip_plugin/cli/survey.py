"""The devices of a cluster, put together from the configuration, the Leases and the lists of the USB/IP servers. Pure.

Any of the three may be missing: a person may lack a right, and a server may not answer this machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from usbip_plugin.cli.explain import Listing, Offer, ServerAnswer
from usbip_plugin.config.schema import Config, ResourceConfig, Selector, several
from usbip_plugin.config.selectors import Match, allowed_interfaces, matches
from usbip_plugin.locks.locked_devices import LockedDevice, is_attached
from usbip_plugin.model import UNKNOWN_IDENTITY, Descriptor, DeviceKey, Identity, Lock, ServerKey, valid_busid
from usbip_plugin.usbip.client import DeviceList, why_unlisted

_GLOB = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class UnmatchedSelector:
    """A selector of the configuration that selects no known device.

    resource: full name, domain included. keys: the devices that it names by bus ID; empty if it names none.
    """

    resource: str
    server: ServerKey
    selector: Selector
    keys: tuple[DeviceKey, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that a command has read about devices.

    known: the devices that have or had a lock.
    answers: the devices that each server listed, or why it did not answer.
    config: None if it could not be read.
    """

    known: tuple[LockedDevice, ...]
    answers: Mapping[ServerKey, DeviceList | str]
    config: Config | None
    domain: str
    now: datetime
    locks: Mapping[str, LockedDevice] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "locks", {known.lock.device_id: known for known in self.known})

    def keys(self) -> dict[str, DeviceKey]:
        """Returns devices by ID: all that have or had a lock, and all that a server lists and a resource selects."""
        keys = {key.id: key for known in self.known if (key := known.lock.key) is not None}
        for server, answer in self.answers.items():
            for descriptor in answer.devices if not isinstance(answer, str) else ():
                key = DeviceKey(server, descriptor.busid)
                if key.id not in keys and self.offers(key, None):
                    keys[key.id] = key
        return keys

    def offers(self, key: DeviceKey, lock: Lock | None) -> tuple[Offer, ...] | None:
        """Returns the resources that select the device, or None if there is no configuration."""
        if self.config is None:
            return None
        listed = self.listed(key)
        same = lock is not None and (listed is None or listed.devid == lock.read_from)
        identity = lock.identity if lock is not None and same else UNKNOWN_IDENTITY
        if listed is None and lock is not None and lock.usb_id is not None:
            listed = Descriptor(key.busid, "", 0, 0, 0, lock.usb_id, 0, 0, 0, 0, 0, 0, 0)
        found: dict[str, Offer] = {}
        for resource in self.config.resources:
            for entry in resource.devices:
                if entry.target != key.server or listed is None:
                    continue
                if (match := matches(entry.selector, listed, identity)) is not Match.NO:
                    offer = Offer(f"{self.domain}/{resource.name}", str(entry.selector), match is Match.YES)
                    found.setdefault(resource.name, _with_interfaces(offer, resource, key, listed, identity))
        return tuple(found.values())

    def unmatched(self, keys: Mapping[str, DeviceKey]) -> Iterator[UnmatchedSelector]:
        """Yields the selectors that select none of these devices, in the order of the configuration."""
        selected = {
            (key.server, offer.resource, offer.selector)
            for device_id, key in keys.items()
            for offer in self.offers(key, self.lock(device_id)) or ()
        }
        for resource in self.config.resources if self.config is not None else ():
            name = f"{self.domain}/{resource.name}"
            for entry in resource.devices:
                if (entry.target, name, str(entry.selector)) not in selected:
                    busids = [busid for busid in several(entry.selector.bus_id) if not _GLOB.intersection(busid)]
                    named = tuple(DeviceKey(entry.target, busid) for busid in busids if valid_busid(busid))
                    yield UnmatchedSelector(name, entry.target, entry.selector, named)

    def lock(self, device_id: str) -> Lock | None:
        return self.locks[device_id].lock if device_id in self.locks else None

    def twins(self, key: DeviceKey, lock: Lock) -> tuple[str, ...]:
        """Returns other devices that are listed or held with the serial number by which a resource selects this one."""
        targets_by_serial = [
            {entry.target for entry in resource.devices if entry.selector.serial == lock.serial}
            for resource in (self.config.resources if self.config is not None and lock.serial else ())
        ]
        servers = {server for targets in targets_by_serial if key.server in targets for server in targets}
        found = []
        for known in self.known if servers else ():
            other = known.lock
            there = other.key
            if there is None or there == key or there.server not in servers or other.serial != lock.serial:
                continue
            listed = self.listed(there)
            # a device that is attached from another bus ID holds two locks: it is not a twin of itself
            apart = not other.holder or (key.id != other.in_place_of and other.device_id != lock.in_place_of)
            if apart and (other.holder or (listed is not None and listed.devid == other.read_from)):
                found.append(str(there))
        return tuple(sorted(found))

    def listed_in_use(self, server: ServerKey) -> tuple[str, ...]:
        """Returns the devices that the server lists although living nodes have them attached."""
        found = [
            known.lock.key
            for known in self.known
            if known.lock.key is not None and known.lock.key.server == server and is_attached(known, self.now)
        ]
        return tuple(sorted(key.busid for key in found if self.listed(key) is not None))

    def listed(self, key: DeviceKey) -> Descriptor | None:
        answer = self.answers.get(key.server, "")
        return None if isinstance(answer, str) else next((d for d in answer.devices if d.busid == key.busid), None)

    def answer(self, key: DeviceKey | None) -> ServerAnswer:
        """Returns what the server of the device says about it."""
        if key is None or key.server not in self.answers:
            return ServerAnswer(Listing.NOT_ASKED)
        answer = self.answers[key.server]
        if isinstance(answer, str):
            return ServerAnswer(Listing.UNREACHABLE, error=answer)
        listed = self.listed(key)
        if listed is None:
            return ServerAnswer(Listing.UNLISTED, error=why_unlisted(answer.problems, key.busid))
        return ServerAnswer(Listing.HUB if listed.is_hub else Listing.LISTED, usb_id=str(listed.usb_id))


def _with_interfaces(
    offer: Offer, resource: ResourceConfig, key: DeviceKey, listed: Descriptor, identity: Identity
) -> Offer:
    """Returns the offer with the interfaces that the resource does not allow, as the nodes decide about them."""
    interfaces = listed.interfaces or identity.interfaces or ()
    rules = allowed_interfaces(resource, key, listed, identity)
    withheld = tuple(sorted({one for one in interfaces if not rules.allows((one,))}))
    return replace(
        offer,
        withheld=withheld,
        refused=bool(withheld) and rules.problem(listed.device_class, [(one,) for one in interfaces]) is not None,
        classes=tuple(sorted({one.class_ for one in interfaces})),
    )
