"""Asking devices who they are: which, by whom and when, as pure functions, and the tasks that ask.

DEVLIST carries no serial numbers, and no interfaces of a device that was never configured since it was bound. Whoever
reads them takes the device's lock for a moment and leaves the answer there for all nodes. An answer is of one device: a
server that lists another number under the bus id lists another device, or has numbered it anew, and it is asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from usbip_plugin.attach.attacher import Attacher
from usbip_plugin.clock import Clock
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.errors import PluginError
from usbip_plugin.inventory.facts import Facts
from usbip_plugin.inventory.handover import Spawn
from usbip_plugin.locks.protocol import Standing
from usbip_plugin.locks.record import key_of
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import UNTOLD, Descriptor, DeviceKey, Lock, ServerKey
from usbip_plugin.observe.spans import untraced
from usbip_plugin.usbip.poller import ServerPoller, ServerState, ServerView

log = logging.getLogger(__name__)


MAX_LOCKS = 512
"""Of one server. With so many, a device that has none yet is not locked to be asked: Leases stay."""

MAX_PROBES = 16
"""Devices of one server that are asked at a time, those that wait for their next try included."""

PROBE_SPREAD = 0.5
"""Seconds over which nodes spread their asking of one device. The first to write its lock is seen by the others."""

RESET = 2.0
"""Seconds in which a device that was let go is listed again by usbip-host, and its server asked again."""

MAX_REREADS, REREAD_SPAN = 3, 600.0
"""A device that has been asked so often within so many seconds is not asked again before these are over.

A server that numbers a device anew at each import would have it asked for ever. Meanwhile what its lock says counts; an
Allocate compares it with the device in any case.
"""


def wanted(facts: Facts, key: DeviceKey, descriptor: Descriptor) -> bool:
    """Whether some selector could take this listed device, if only it were known who it is, and it can be asked."""
    told = facts.told(key.id, descriptor)
    if told.serial is not None and (descriptor.interfaces or told.interfaces) is not None:
        return False
    if facts.standings.get(key.id, Standing.FREE) is Standing.HELD:
        return False
    if key.id in facts.claims or facts.moved_here(key.id) is not None:
        return False
    return any(matches(selector, descriptor, told) is Match.NEEDS_PROBE for selector in facts.config.asking(key.server))


def wanting_probe(facts: Facts) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Every such device of the servers that answer.

    One that has no lock yet is left out where its server has MAX_LOCKS already.
    """
    asking = {server: view for server, view in facts.servers.items() if facts.config.asking(server)}
    if not asking:
        return ()
    locked = Counter(key.server for lock in facts.locks.values() if (key := key_of(lock)) is not None)
    return tuple(
        (key, descriptor)
        for server, view in asking.items()
        if view.state is ServerState.REACHABLE
        for descriptor in view.devices
        if (key := DeviceKey(server, descriptor.busid)).id in facts.locks or locked[server] < MAX_LOCKS
        if wanted(facts, key, descriptor)
    )


def next_probes(
    wanted: Iterable[tuple[DeviceKey, Descriptor]],
    running: Mapping[str, ServerKey],
    last: Mapping[ServerKey, str],
    node: str,
) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Which devices to begin to ask: MAX_PROBES of a server at a time, in turn after the one begun last.

    running: by device ID, those under way; last: of each server, the ID begun last. Each node has an order of its own,
    so that several share the work.
    """
    room = Counter(running.values())
    begun = {server: _rank(node, device_id) for server, device_id in last.items()}
    ranked = sorted((_rank(node, key.id), key, descriptor) for key, descriptor in wanted)
    chosen = []
    for rank, key, descriptor in sorted(ranked, key=lambda one: one[0] <= begun.get(one[1].server, b"")):
        if key.id not in running and room[key.server] < MAX_PROBES:
            room[key.server] += 1
            chosen.append((rank, key, descriptor))
    return tuple((key, descriptor) for _rank, key, descriptor in chosen)


def probe_delay(node: str, device_id: str) -> float:
    """Seconds for which this node leaves the device to others, from 0 to PROBE_SPREAD."""
    return PROBE_SPREAD * _rank(node, device_id)[0] / 256


def _rank(node: str, device_id: str) -> bytes:
    return hashlib.sha256(f"{device_id}/{node}".encode()).digest()


class Suspects:
    """Devices that left their server's list while nobody used them: another may have come back in their place.

    Servers that number devices by port list it under the same number. It is asked again; whoever has held it since, to
    ask it or to use it, has written down what it told.
    """

    def __init__(self, rereads: Rereads) -> None:
        self._rereads = rereads
        self._listed: dict[ServerKey, frozenset[str]] = {}
        self._away: dict[str, tuple[ServerKey, int, float]] = {}
        self._epochs: dict[str, int] = {}

    def server_changed(
        self, view: ServerView, locks: Mapping[str, Lock], released: Collection[str], now: float
    ) -> None:
        """For the poller. released: devices that are not listed because they have just been let go. now: monotonic."""
        if view.state is not ServerState.REACHABLE:
            return
        listed = frozenset(DeviceKey(view.server, descriptor.busid).id for descriptor in view.devices)
        for device_id in self._listed.get(view.server, frozenset()) - listed:
            lock = locks.get(device_id)
            if lock is None or lock.holder or lock.identity == UNTOLD:
                continue
            if device_id in released:
                self._away[device_id] = view.server, lock.epoch, now
            else:
                self._suspect(device_id, lock.epoch, now)
        for device_id, (server, epoch, since) in list(self._away.items()):
            if server == view.server and device_id in listed:
                del self._away[device_id]
                if now - since > RESET:  # it was gone for longer than that takes
                    self._suspect(device_id, epoch, now)
        self._listed[view.server] = listed

    def _suspect(self, device_id: str, epoch: int, now: float) -> None:
        if device_id not in self._rereads.restless(now):
            self._rereads.note(device_id, now)
            self._epochs[device_id] = epoch

    def now(self, locks: Mapping[str, Lock]) -> frozenset[str]:
        """Those whose locks say what an earlier one told, perhaps."""
        if not self._away and not self._epochs:
            return frozenset()
        self._away = {i: away for i, away in self._away.items() if i in locks and locks[i].epoch == away[1]}
        self._epochs = {i: epoch for i, epoch in self._epochs.items() if i in locks and locks[i].epoch <= epoch}
        return frozenset(self._epochs)


class Rereads:
    """Devices whose locks have said again and again that another one stands there. Times: seconds, monotonic."""

    def __init__(self) -> None:
        self._at: dict[str, tuple[float, ...]] = {}

    def note(self, device_id: str, now: float) -> None:
        """The lock of the device has just got the number of another."""
        self._at[device_id] = (*self._recent(device_id, now), now)[-MAX_REREADS:]

    def restless(self, now: float) -> frozenset[str]:
        """Those that are not to be asked again yet."""
        if not self._at:
            return frozenset()
        self._at = {device_id: recent for device_id in self._at if (recent := self._recent(device_id, now))}
        return frozenset(device_id for device_id, recent in self._at.items() if len(recent) >= MAX_REREADS)

    def _recent(self, device_id: str, now: float) -> tuple[float, ...]:
        return tuple(at for at in self._at.get(device_id, ()) if now - at < REREAD_SPAN)


PROBE_AGAIN = 1.0
"""Seconds until the poller has asked a server whose list was found to be old."""
PROBE_RETRY = 10.0
"""Seconds before a device that could not be asked who it is, is asked again."""


class Prober:
    """Of one node (its name: me). facts: what is known now; look_again is called after each device that was asked."""

    def __init__(
        self,
        *,
        me: str,
        attacher: Attacher,
        poller: ServerPoller,
        clock: Clock,
        facts: Callable[[], Facts],
        spawn: Spawn,
        look_again: Callable[[], None],
    ) -> None:
        self._me = me
        self._attacher = attacher
        self._poller = poller
        self._clock = clock
        self._facts = facts
        self._spawn = spawn
        self._look_again = look_again
        self._running: dict[str, ServerKey] = {}
        self._last: dict[ServerKey, str] = {}
        self._failures: dict[str, str] = {}
        self._rereads = Rereads()
        self._suspects = Suspects(self._rereads)

    def restless(self) -> frozenset[str]:
        """See probing.Rereads."""
        return self._rereads.restless(self._clock.monotonic())

    def suspect(self, locks: Mapping[str, Lock]) -> frozenset[str]:
        """See probing.Suspects."""
        return self._suspects.now(locks)

    def server_changed(self, view: ServerView, locks: Mapping[str, Lock], released: Collection[str]) -> None:
        """For the poller; see probing.Suspects."""
        self._suspects.server_changed(view, locks, released, self._clock.monotonic())

    def lock_changed(self, change: LockChange) -> None:
        """For the lock manager."""
        known, told = (lock.read_from if lock is not None else None for lock in (change.old, change.new))
        if None not in (known, told) and known != told:
            self._rereads.note(change.device_id, self._clock.monotonic())

    def begin(self, facts: Facts) -> None:
        """Begins to ask those whose turn it is. Without the API server, which has the locks, none."""
        if facts.api.unreachable_for is not None:
            return
        wanting = wanting_probe(facts)
        for key, descriptor in next_probes(wanting, self._running, self._last, self._me) if wanting else ():
            self._running[key.id], self._last[key.server] = key.server, key.id
            self._spawn(self._probe(key, descriptor))

    async def _probe(self, key: DeviceKey, descriptor: Descriptor) -> None:
        try:
            await self._clock.sleep(probe_delay(self._me, key.id))
            if not wanted(self._facts(), key, descriptor):
                return  # another node was first
            # tried every few seconds for as long as it takes: only the first failure of a kind is told
            with untraced() if key.id in self._failures else contextlib.nullcontext():
                # the list may be older than what another node has read of the device that is there now
                if await self._poller.current(key) != descriptor:
                    self._poller.poke(key.server)
                    await self._clock.sleep(PROBE_AGAIN)
                    return
                await self._attacher.probe(key, descriptor)
            self._failures.pop(key.id, None)
        except PluginError as error:
            if self._failures.get(key.id) != str(error):
                self._failures[key.id] = str(error)
                log.warning("device not asked yet who it is", extra={"device": str(key), "cause": str(error)})
            await self._clock.sleep(PROBE_RETRY)
        finally:
            self._running.pop(key.id, None)
            self._look_again()
