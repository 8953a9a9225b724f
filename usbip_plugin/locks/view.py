"""What this node knows of all locks: the newest record of each, whichever way it came."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from usbip_plugin.locks import record
from usbip_plugin.locks.store import ChangeType, Lease, LeaseChange, LeaseList
from usbip_plugin.model import Lock


@dataclass(frozen=True, slots=True)
class LockChange:
    """A lock as it was and is; None where there is no such Lease. Equal when only its standing changed (expiry)."""

    device_id: str
    old: Lock | None
    new: Lock | None

    @property
    def former(self) -> str:
        """Who held it; "" for nobody."""
        return self.old.holder if self.old is not None else ""

    @property
    def holder(self) -> str:
        """Who holds it now; "" for nobody."""
        return self.new.holder if self.new is not None else ""


def newer(version: str, than: str) -> bool:
    """Whether a resourceVersion is later. Kubernetes promises integers since 1.35; anything else counts as later."""
    if version.isascii() and than.isascii() and version.isdigit() and than.isdigit():
        # as numbers, of whatever length: int() refuses more than 4300 digits
        one, other = version.lstrip("0"), than.lstrip("0")
        return (len(one), one) > (len(other), other)
    return version != than


class LockView:
    """Own writes and watch events merged by resourceVersion: an older event never rolls back a newer record.

    on_change is called once for each change of a record, in order, from within the call that brought it.
    """

    def __init__(self, on_change: Callable[[LockChange], None]) -> None:
        self._on_change = on_change
        self._leases: dict[str, Lease] = {}
        self._locks: dict[str, Lock] = {}
        self._gone: dict[str, str] = {}  # device id -> version of its deletion, since the last list
        self._floor = "0"  # version of the last list or watch event

    @property
    def locks(self) -> Mapping[str, Lock]:
        return MappingProxyType(self._locks)

    def lease(self, device_id: str) -> Lease | None:
        return self._leases.get(device_id)

    def put(self, lease: Lease) -> None:
        """A record as answered to a read or write of one's own, or as it came in an event."""
        known = self._leases.get(lease.name)
        if known is not None:
            if newer(lease.resource_version, known.resource_version):
                self._set(lease.name, lease)
        elif newer(lease.resource_version, self._gone.get(lease.name, "0")):
            self._set(lease.name, lease)

    def missing(self, device_id: str, expected: str) -> None:
        """A read found nothing, where the record of version expected had been known."""
        known = self._leases.get(device_id)
        if known is not None and known.resource_version == expected:
            self._gone[device_id] = expected
            self._set(device_id, None)

    def apply(self, change: LeaseChange) -> None:
        """One watch event."""
        lease = change.lease
        if lease is not None and record.is_lock_name(lease.name):
            if change.type is ChangeType.DELETED:
                self._delete(lease.name, change.resource_version)
            else:
                self.put(lease)
        self._floor = change.resource_version

    def reset(self, listing: LeaseList) -> None:
        """A full list. What it lacks is gone, unless it was written after the list was made."""
        restored = newer(self._floor, listing.resource_version)  # the API server was set back to a backup
        listed = {lease.name: lease for lease in listing.items if record.is_lock_name(lease.name)}
        for name, known in list(self._leases.items()):
            if name not in listed and (restored or not newer(known.resource_version, listing.resource_version)):
                self._set(name, None)
        self._gone = {name: listing.resource_version for name in self._gone if name not in listed and not restored}
        for name, lease in listed.items():
            if restored and self._leases.get(name) != lease:
                self._set(name, lease)
            else:
                self.put(lease)
        self._floor = listing.resource_version

    def _delete(self, name: str, version: str) -> None:
        known = self._leases.get(name)
        if known is None or newer(version, known.resource_version):
            self._gone[name] = version
            if known is not None:
                self._set(name, None)

    def _set(self, name: str, lease: Lease | None) -> None:
        old = self._locks.get(name)
        if lease is None:
            del self._leases[name], self._locks[name]
        else:
            self._gone.pop(name, None)
            self._leases[name], self._locks[name] = lease, record.lock_of(lease)
        self._on_change(LockChange(name, old, self._locks.get(name)))
