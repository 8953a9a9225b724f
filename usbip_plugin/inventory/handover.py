"""What a server's list, and the identity on a lock, are worth when a device has changed hands or was unplugged.

A list that was made before another node wrote the lock does not say whether the device is in use now; one that was made
while the device is reset does not say that it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping

from usbip_plugin.context import NodeContext
from usbip_plugin.inventory.members import importable
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import UNKNOWN_IDENTITY, DeviceKey, Lock, ServerKey
from usbip_plugin.usbip.poller import SECOND_LOOK, ServerPoller, ServerState, ServerView

RESET_GRACE = 1.0
"""Seconds after a release, at least, in which a server that does not list the device says nothing.

usbip-host resets a device for about 0.3 s and hides it meanwhile; an import then waits for it (pipeline.import_busy).
"""

RESET = 2.0
"""Seconds in which a device that was let go is listed again by usbip-host, and its server asked again."""

MAX_REREADS, REREAD_SPAN = 3, 600.0
"""A device that has been asked so often within so many seconds is not asked again before these are over.

A server that numbers a device anew at each import would have it asked for ever. Meanwhile what its lock says counts; an
Allocate compares it with the device in any case.
"""

Spawn = Callable[[Coroutine[object, object, None]], None]
"""Begins work that ends with whoever owns it."""


class HandoverTracker:
    """Of all devices, for one node. look_at is called when a device's list counts again."""

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        poller: ServerPoller,
        spawn: Spawn,
        look_at: Callable[[str], None],
    ) -> None:
        self._me = context.me.node
        self._clock = context.clock
        self._locks = locks
        self._poller = poller
        self._spawn = spawn
        self._look_at = look_at
        # of each server, the devices by their IDs, the one first that has waited longest; None: of no known server
        self._released: dict[ServerKey | None, dict[str, float]] = {}
        self._doubtful: dict[ServerKey, dict[str, float]] = {}
        self._listed: frozenset[str] = frozenset()

    def released(self, device_ids: Collection[str] | None = None) -> frozenset[str]:
        """Which of these devices, or of all, were let go, and their servers have not been asked since."""
        found = [devices.keys() for devices in self._released.values()]
        if device_ids is None:
            return frozenset().union(*found)
        return frozenset(i for i in device_ids if any(i in devices for devices in found))

    def servers_changed(self) -> None:
        """For the poller: some server's list or state changed."""
        self._listed = importable(self._poller.views)
        self._locks.set_importable(self._listed.difference(*self._doubtful.values()))

    def lock_changed(self, change: LockChange) -> None:
        """For the lock manager."""
        if change.old != change.new and change.holder not in ("", self._me):
            self._doubt(change)
        elif change.former and not change.holder and change.new is not None:
            key = change.new.key
            server = key.server if key is not None else None
            if server is not None:
                self._poller.poll_soon(server)
            if self._last(self._released.setdefault(server, {}), change.device_id):
                self._spawn(self._after_releases(server))

    def _doubt(self, change: LockChange) -> None:
        """Another node has written a lock: what its server listed before says nothing of whether it is used now.

        Otherwise every node would read the holder's session each time a device is taken (R4).
        """
        key = change.new.key if change.new is not None else None
        if key is None:
            return
        doubts = self._doubtful.setdefault(key.server, {})
        if key.id not in doubts and key.id in self._listed:
            self._locks.importable_changed(key.id, importable=False)
        if self._last(doubts, key.id):
            self._spawn(self._listed_anew(key.server))

    def _last(self, waiting: dict[str, float], device_id: str) -> bool:
        """Puts the device at the end, as of now. True if nothing was waiting: then nobody waits with it yet."""
        first = not waiting
        waiting.pop(device_id, None)
        waiting[device_id] = self._clock.monotonic()
        return first

    async def _listed_anew(self, server: ServerKey) -> None:
        """Until no device of the server is in doubt."""
        doubts = self._doubtful[server]
        while doubts:
            device_id, since = next(iter(doubts.items()))
            await self._poller.polled_since(server, since)
            if doubts.get(device_id) == since:
                del doubts[device_id]
                if device_id in self._listed:
                    self._locks.importable_changed(device_id, importable=True)

    async def _after_releases(self, server: ServerKey | None) -> None:
        """A device was let go: its list counts again when its server was asked after the reset, which every node does
        when its turn comes. Until then the lock is believed: a holder that lets a device go has detached it."""
        released = self._released[server]
        while released:
            device_id, since = next(iter(released.items()))
            left = since + RESET_GRACE - self._clock.monotonic()
            if left > 0:
                await self._clock.sleep(left)
            if server is not None:
                await self._poller.polled_since(server, since + SECOND_LOOK)
            if released.get(device_id) == since:
                del released[device_id]
                self._look_at(device_id)


class ReplacedDevices:
    """Devices that left their server's list while nobody used them: another may have come back in their place.

    Servers that number devices by port list it under the same number. It is asked again; whoever has held it since, to
    ask it or to use it, has written down what it told.
    """

    def __init__(self, rereads: ProbeLimiter) -> None:
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
            if lock is None or lock.holder or lock.identity == UNKNOWN_IDENTITY:
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
        if device_id not in self._rereads.probe_limited(now):
            self._rereads.note(device_id, now)
            self._epochs[device_id] = epoch

    def now(self, locks: Mapping[str, Lock]) -> frozenset[str]:
        """Those whose locks say what an earlier one told, perhaps."""
        if not self._away and not self._epochs:
            return frozenset()
        self._away = {i: away for i, away in self._away.items() if i in locks and locks[i].epoch == away[1]}
        self._epochs = {i: epoch for i, epoch in self._epochs.items() if i in locks and locks[i].epoch <= epoch}
        return frozenset(self._epochs)


class ProbeLimiter:
    """Devices whose locks have said again and again that another one stands there. Times: seconds, monotonic."""

    def __init__(self) -> None:
        self._at: dict[str, tuple[float, ...]] = {}

    def note(self, device_id: str, now: float) -> None:
        """The lock of the device has just got the number of another."""
        self._at[device_id] = (*self._recent(device_id, now), now)[-MAX_REREADS:]

    def probe_limited(self, now: float) -> frozenset[str]:
        """Those that are not to be asked again yet."""
        if not self._at:
            return frozenset()
        self._at = {device_id: recent for device_id in self._at if (recent := self._recent(device_id, now))}
        return frozenset(device_id for device_id, recent in self._at.items() if len(recent) >= MAX_REREADS)

    def _recent(self, device_id: str, now: float) -> tuple[float, ...]:
        return tuple(at for at in self._at.get(device_id, ()) if now - at < REREAD_SPAN)
