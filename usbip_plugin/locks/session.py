"""The heartbeat of this node's session, and the observation of other nodes' locks and sessions until they expire (R4).

A node writes its session only while it holds a lock. It observes only devices that their server lists as free to
import.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeConflict, KubeError, KubeNotFound
from usbip_plugin.locks import record
from usbip_plugin.locks.protocol import Create, Denied, Observation, Rules, Write, expired, is_free, lives
from usbip_plugin.locks.record import Lease, LeaseStore
from usbip_plugin.locks.watch import LockCache
from usbip_plugin.sync import done_within

logger = logging.getLogger(__name__)

# Wait after the first failed heartbeat (seconds).
RETRY_FIRST_S = 0.5
# Time between two heartbeats, as a share of the lock duration: two may fail before the session can expire.
BEAT_FRACTION = 1 / 4
# Longest wait after a failed heartbeat, as a share of the lock duration.
RETRY_FRACTION = 1 / 8


class Session:
    """The session Lease of this node, renewed by heartbeats while the session is needed. run() must be running.

    Call need(True) while this node holds a lock or is about to take one.
    written_at: when the last successful heartbeat was sent (monotonic seconds), None before the first of this process.
    """

    def __init__(
        self,
        store: LeaseStore,
        new_write: Callable[[], Write],
        clock: Clock,
        rng: random.Random,
        duration: float,
        rules: Rules,
    ) -> None:
        self._store, self._new_write, self._clock, self._rng = store, new_write, clock, rng
        self._duration, self._rules = duration, rules
        self._needed = asyncio.Event()
        self._known: Lease | None = None
        self._failing = False
        self.written_at: float | None = None
        self.turned_at: float | None = None
        """When run() last began a heartbeat (monotonic seconds); None while the session is not needed."""

    def need(self, needed: bool) -> None:
        """Starts or stops the heartbeats at once: the first one goes out together with the write of the first lock."""
        if needed:
            self._needed.set()
        else:
            self._needed.clear()

    async def run(self) -> None:
        """Writes heartbeats while the session is needed. Runs until cancelled."""
        while True:
            self.turned_at = None
            await self._needed.wait()
            await self._beat()
            await self._clock.sleep(self._duration * BEAT_FRACTION)

    async def _beat(self) -> None:
        """Writes one heartbeat. Tries again until it is written or not needed any more."""
        waits = backoff(self._rng, RETRY_FIRST_S, self._duration * RETRY_FRACTION)
        while self._needed.is_set():
            self.turned_at = self._clock.monotonic()
            try:
                if await self._write():
                    self._failing = False
                    return
            except KubeError as error:
                if not self._failing:
                    logger.warning("session heartbeat failed", extra={"cause": str(error)})
                self._failing = True
                self._known = None
            await self._clock.sleep(next(waits))

    async def _write(self) -> bool:
        write = self._new_write()
        if self._known is None:
            self._known = await self._store.get(record.session_name(write.me.node))
        decision = self._rules.decide_session(self._known, write)
        sent_at = self._clock.monotonic()
        try:
            if isinstance(decision, Denied):
                return False
            write_lease = self._store.create if isinstance(decision, Create) else self._store.replace
            self._known = await write_lease(decision.lease)
        except (KubeConflict, KubeNotFound):
            # Another process wrote or deleted it, or an own write of unknown outcome took effect: read and write anew.
            self._known = None
            return False
        self.written_at = sent_at
        return True


# Most sessions read in one round, one for each holder. Further holders wait for a later round.
MAX_READS = 64
# Time between two reads of the session behind an expired lock, in lock durations. Long, because every node of the
# cluster reads that session. Safe, because confirm() reads once more before a takeover, and a holder that comes back
# and needs the device writes the lock.
EXPIRED_BEATS = 4.0
# Least time between two rounds (seconds), so that rounding of a clock never makes them spin.
MIN_ROUND_S = 0.05


UNPROVEN_DURATIONS = 3
"""Durations of silence after which the lock of an unproven device expires, see ExpiryWatch.set_unproven.

One is not enough: a holder that is only cut off from the API server still uses a device that its server always lists.
"""


class ExpiryWatch:
    """The observation of each lock that another node holds on an importable device (R4). run() must be running.

    notify(device_id): called when a lock expires, and when an expired lock no longer counts as expired.
    on_listed_in_use(device_id): called when a server has listed a device for a whole duration although a holder had it
        that lives and did not write the lock, see protocol.lives.
    """

    def __init__(
        self,
        store: LeaseStore,
        view: LockCache,
        node: str,
        clock: Clock,
        duration: float,
        rules: Rules,
        notify: Callable[[str], None],
    ) -> None:
        self._store, self._view, self._node, self._clock = store, view, node, clock
        self._duration, self._rules, self._notify = duration, rules, notify
        self._importable: set[str] = set()
        self._unproven: frozenset[str] = frozenset()
        self._observed: dict[str, Observation] = {}
        self._first: dict[str, float] = {}  # device ID -> when the observation of this lock version began
        self.on_listed_in_use: Callable[[str], None] = lambda _device_id: None
        self._wake = asyncio.Event()

    def set_importable(self, device_ids: frozenset[str]) -> None:
        """Sets the devices that their servers list as free to import now. Ends the observation of all others."""
        self._importable = set(device_ids)
        for device_id in self._observed.keys() - device_ids:
            self._forget(device_id)
        for device_id in device_ids:
            self._wake_for(device_id)

    def importable_changed(self, device_id: str, *, importable: bool) -> None:
        """Sets for one device whether its server lists it as free to import. If not, ends its observation."""
        if importable:
            self._importable.add(device_id)
            self._wake_for(device_id)
        else:
            self._importable.discard(device_id)
            self._forget(device_id)

    def importable(self, device_id: str) -> bool:
        return device_id in self._importable

    def set_unproven(self, device_ids: frozenset[str]) -> None:
        """Sets the devices that are listed, but whose list does not show that their holder has lost them.

        Their locks expire after UNPROVEN_DURATIONS: the holder may have died before its server could hide the device.
        """
        self._unproven = device_ids

    def observation(self, device_id: str) -> Observation | None:
        return self._observed.get(device_id)

    def lock_changed(self, device_id: str) -> None:
        """Begins the observation of a lock anew. To be called whenever the LockCache has another record of it."""
        self._observed.pop(device_id, None)
        self._first.pop(device_id, None)
        self._wake_for(device_id)

    async def confirm(self, lease: Lease) -> Observation | None:
        """Reads the holder's session again. Returns the lock's observation, None if not observed. Raises KubeError."""
        await self._read_session(lease.holder, [lease])
        return self.observation(lease.name)

    async def run(self) -> None:
        """Reads the sessions of other holders in rounds. Runs until cancelled."""
        while True:
            self._wake.clear()
            wait = self._next_round() if await self._round() else self._duration * BEAT_FRACTION
            await done_within(self._clock, wait, self._wake.wait())

    def _candidates(self) -> dict[str, list[Lease]]:
        """Returns the locks whose holder's session must be read now, by holder; those longest unread first."""
        found: dict[str, list[Lease]] = {}
        leases = [lease for device_id in self._importable if (lease := self._view.lease(device_id)) is not None]
        seen = {device_id: observation.seen for device_id, observation in self._observed.items()}
        for lease in sorted(leases, key=lambda lease: (seen.get(lease.name, -1.0), lease.name)):
            if self._by_another(lease) and not self._read_lately(lease):
                found.setdefault(lease.holder, []).append(lease)
        return found

    def _by_another(self, lease: Lease) -> bool:
        return not is_free(lease) and lease.holder != self._node

    def _read_lately(self, lease: Lease) -> bool:
        observation = self._observed.get(lease.name)
        if observation is None or not expired(observation):
            return False
        return self._clock.monotonic() - observation.seen < EXPIRED_BEATS * self._duration - MIN_ROUND_S

    async def _round(self) -> bool:
        for holder, leases in list(self._candidates().items())[:MAX_READS]:
            try:
                await self._read_session(holder, leases)
            except KubeError as error:
                # R4: the holder may be without the API server as this node is, so the observation begins anew
                logger.debug(
                    "session of lock holder not read", extra={"holder": record.holder_text(holder), "cause": str(error)}
                )
                for device_id in tuple(self._observed):
                    self._forget(device_id)
                return False
        return True

    async def _read_session(self, holder: str, leases: list[Lease]) -> None:
        """Reads a holder's session and updates the observations of these locks. Raises KubeError."""
        asked_at = self._clock.monotonic()
        session = await self._store.get(record.session_name(holder))
        for lease in leases:
            self._note(lease, session, asked_at)

    def _note(self, lease: Lease, session: Lease | None, asked_at: float) -> None:
        if lease.name not in self._importable or self._view.lease(lease.name) != lease:
            return  # changed while the session was read
        before = self._observed.get(lease.name)
        durations = UNPROVEN_DURATIONS if lease.name in self._unproven else 1
        own_duration = durations * self._duration
        after = self._rules.observe(before, lease, session, asked_at, self._clock.monotonic(), own_duration)
        self._observed[lease.name] = after
        first = self._first.setdefault(lease.name, after.since)
        if lives(before, after) and after.seen - first >= after.duration / durations:
            self.on_listed_in_use(lease.name)
        if expired(after) != (before is not None and expired(before)):
            self._notify(lease.name)

    def _next_round(self) -> float:
        """Returns seconds: BEAT_FRACTION of the duration, less if a lock expires sooner, EXPIRED_BEATS if all have."""
        now = self._clock.monotonic()
        waits = [seen.since + seen.duration - now for seen in self._observed.values() if not expired(seen)]
        most = EXPIRED_BEATS if self._observed and not waits else BEAT_FRACTION
        return max(MIN_ROUND_S, min([self._duration * most, *waits]))

    def _wake_for(self, device_id: str) -> None:
        """Begins a round now if another node's lock on this importable device is not observed yet."""
        lease = self._view.lease(device_id)
        unobserved = device_id in self._importable and device_id not in self._observed
        if unobserved and lease is not None and self._by_another(lease):
            self._wake.set()

    def _forget(self, device_id: str) -> None:
        observation = self._observed.pop(device_id, None)
        self._first.pop(device_id, None)
        if observation is not None and expired(observation):
            self._notify(device_id)
