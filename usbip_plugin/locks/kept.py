"""Decides which locks a node keeps in memory: those that it needs, and a bounded number of each configured server.

Any node may create Leases, of any number. A lock that is not kept can still be taken: the write finds it by a conflict.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import ServerKey

MAX_OF_SERVER = 256
"""Locks of one server that are kept while somebody holds them, and of those that nobody holds, as many again.

A server's list has so many devices at most. Locks that nobody holds cannot displace held ones: servers that number bus
IDs anew leave many of them behind.
"""
MAX_KEPT = 2048
"""Locks of all servers that are kept together. They take 6 MiB. Beyond, each server has its share of as many again."""


class Verdict(enum.Enum):
    """What becomes of a lock."""

    KEEP = enum.auto()
    """It is kept in memory."""
    FOREIGN = enum.auto()
    """No configuration names its server, or its annotations do not say which device it is for."""
    EXCESS = enum.auto()
    """Too many locks of its server are kept already."""


@dataclass(frozen=True, slots=True)
class IgnoredLocks:
    """Numbers of locks that are not kept, as of the last list, with the changes since. By Verdict."""

    foreign: int = 0
    excess: int = 0


class LockCounts:
    """Numbers of the locks that are kept, by server and by whether somebody holds them."""

    def __init__(self) -> None:
        self._of = Counter[tuple[ServerKey | None, bool]]()
        self._all = 0

    def copy(self) -> LockCounts:
        made = LockCounts()
        made._of, made._all = self._of.copy(), self._all
        return made

    def add(self, lease: Lease, number: int = 1) -> None:
        """Counts a lock that is kept, or with -1 one that is not kept any more."""
        self._of[record.server_of(lease), lease.holder != ""] += number
        self._all += number

    def has_room(self, lease: Lease, servers: int) -> bool:
        """Returns whether one more lock may be kept. servers: how many servers share the room; 0 if any number may."""
        server, held = record.server_of(lease), lease.holder != ""
        of_kind, of_server = self._of[server, held], self._of[server, True] + self._of[server, False]
        if of_kind >= MAX_OF_SERVER or of_server >= 2 * MAX_OF_SERVER:
            return False
        return self._all < MAX_KEPT or (servers > 0 and of_server < MAX_KEPT // servers)


class LockFilter:
    """The locks that one node needs.

    me: the name of the node, whose own locks are always kept.
    is_claimed(device_id): whether the node has a claim on the device. Its lock is always kept.
    servers: the servers whose locks are kept; None for all.
    """

    def __init__(self, me: str = "", is_claimed: Callable[[str], bool] = lambda _device_id: False) -> None:
        self._me, self._is_claimed = me, is_claimed
        self.servers: frozenset[ServerKey] | None = None

    def verdict(self, lease: Lease, counts: LockCounts, *, known: bool) -> Verdict:
        """Decides whether a lock is kept. known: whether it is kept now, so that there is room for it."""
        if (self._me and lease.holder == self._me) or self._is_claimed(lease.name):
            return Verdict.KEEP
        if self.servers is not None and record.server_of(lease) not in self.servers:
            return Verdict.FOREIGN
        room = known or counts.has_room(lease, len(self.servers or ()))
        return Verdict.KEEP if room else Verdict.EXCESS


class LockListing:
    """One list of the locks, of which keep() chooses those that a node keeps.

    counts: the locks that are kept before the list.
    is_known(device_id): whether the lock is kept before the list.
    """

    def __init__(
        self,
        kept: LockFilter,
        counts: LockCounts | None = None,
        is_known: Callable[[str], bool] = lambda _device_id: False,
    ) -> None:
        self._kept, self._is_known = kept, is_known
        self._counts = counts.copy() if counts is not None else LockCounts()
        self._verdicts = Counter[Verdict]()

    @property
    def ignored(self) -> IgnoredLocks:
        return IgnoredLocks(self._verdicts[Verdict.FOREIGN], self._verdicts[Verdict.EXCESS])

    def keep(self, lease: Lease) -> bool:
        """Returns whether to keep a Lease of the list. Counts it."""
        if not record.is_lock_name(lease.name):
            return False
        known = self._is_known(lease.name)
        verdict = self._kept.verdict(lease, self._counts, known=known)
        self._verdicts[verdict] += 1
        if verdict is Verdict.KEEP and not known:
            self._counts.add(lease)
        return verdict is Verdict.KEEP
