"""What a server's list is worth for a device that has just changed hands.

A list that was made before another node wrote the lock does not say whether the device is in use now; one that was made
while the device is reset does not say that it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine

from usbip_plugin.clock import Clock
from usbip_plugin.inventory.members import importable
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.record import key_of
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import ServerKey
from usbip_plugin.usbip.poller import SECOND_LOOK, ServerPoller

RESET_GRACE = 1.0
"""Seconds after a release, at least, in which a server that does not list the device says nothing.

usbip-host resets a device for about 0.3 s and hides it meanwhile; an import then waits for it (retry.import_busy).
"""

Spawn = Callable[[Coroutine[object, object, None]], None]
"""Begins work that ends with whoever owns it."""


class Handovers:
    """Of all devices, for one node (its name: me). look_at is called when a device's list counts again."""

    def __init__(
        self,
        *,
        me: str,
        locks: LockManager,
        poller: ServerPoller,
        clock: Clock,
        spawn: Spawn,
        look_at: Callable[[str], None],
    ) -> None:
        self._me = me
        self._locks = locks
        self._poller = poller
        self._clock = clock
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
            key = key_of(change.new)
            server = key.server if key is not None else None
            if server is not None:
                self._poller.poke(server)
            if self._last(self._released.setdefault(server, {}), change.device_id):
                self._spawn(self._after_releases(server))

    def _doubt(self, change: LockChange) -> None:
        """Another node has written a lock: what its server listed before says nothing of whether it is used now.

        Otherwise every node would read the holder's session each time a device is taken (R4).
        """
        key = key_of(change.new) if change.new is not None else None
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
            await self._poller.asked_since(server, since)
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
                await self._poller.asked_since(server, since + SECOND_LOOK)
            if released.get(device_id) == since:
                del released[device_id]
                self._look_at(device_id)
