"""Decides when to trust a server's list, and the identity on a lock, after a device got a new holder or was unplugged.

A list from before another node wrote the lock may show the device, although it is in use now. A list from the time of
the device's reset may lack it, although it is free.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import TypeVar

from usbip_plugin.context import NodeContext
from usbip_plugin.inventory.members import importable
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import UNKNOWN_IDENTITY, DeviceKey, Lock, ServerKey
from usbip_plugin.usbip.poller import SECOND_LOOK, ServerFlaw, ServerPoller, ServerState, ServerView

RESET_GRACE = 1.0
"""Minimum time in seconds after a release during which a server's list without the device is ignored.

usbip-host resets a released device for about 0.3 s and does not list it meanwhile. An import waits for the end of the
reset, see pipeline.import_busy().
"""

RESET = 2.0
"""Maximum time in seconds from a release until usbip-host lists the device again and its server has been polled again.

A device that comes back later than that may be another one.
"""

MAX_REREADS, REREAD_SPAN = 3, 600.0
"""Maximum number of repeated probes of one device (MAX_REREADS) within REREAD_SPAN seconds.

Without the limit, a device that gets another devid at each import would be probed for ever. At the limit, the identity
on the lock counts. An Allocate compares that identity with the device in any case.
"""

K = TypeVar("K")


class HandoverTracker:
    """Tracks the devices whose server's list cannot be trusted yet, because their lock was just written or released.

    spawn: starts a coroutine in a task.
    on_trusted(device_id): called when the server's list counts again for a released device.
    """

    def __init__(
        self,
        context: NodeContext,
        *,
        locks: LockManager,
        poller: ServerPoller,
        spawn: Callable[[Coroutine[object, object, None]], None],
        on_trusted: Callable[[str], None],
    ) -> None:
        self._me = context.me.node
        self._clock = context.clock
        self._locks = locks
        self._poller = poller
        self._spawn = spawn
        self._on_trusted = on_trusted
        # by server, then by device ID: since when (monotonic), the longest wait first. None: no known server.
        self._released: dict[ServerKey | None, dict[str, float]] = {}
        self._distrusted: dict[ServerKey, dict[DeviceKey, float]] = {}
        # Devices that another node has attached, and that the server has listed ever since. True: since the holder's
        # import, as this process saw it; False: since this process first saw the lock.
        self._always_listed: dict[DeviceKey, bool] = {}
        locks.expiry.on_listed_in_use = self._listed_in_use

    def released(self, device_ids: Collection[str] | None = None) -> frozenset[str]:
        """Returns which of these devices (None for all) were released, and not polled for since their reset."""
        if device_ids is None:
            return frozenset().union(*self._released.values())
        return frozenset(i for i in device_ids if any(i in devices for devices in self._released.values()))

    def servers_changed(self, view: ServerView) -> None:
        """Updates the lock manager's importable devices. To be called when a server's list or state has changed."""
        for key in [key for key in self._always_listed if key.server == view.server and key not in view.exported]:
            self._set_always_listed(key, None)
        distrusted = {key.id for keys in self._distrusted.values() for key in keys}
        evident = {server: view for server, view in self._poller.views.items() if not view.lists_in_use}
        self._locks.expiry.set_importable(importable(evident) - distrusted)

    def lock_changed(self, change: LockChange) -> None:
        """Notes a device that another node has taken or written, or that its holder has released.

        Not one that was left under a boot, or that a person has released: its holder has not detached it (R3, R6).
        """
        self._note_attached(change)
        if change.old != change.new and change.holder not in ("", self._me):
            self._distrust_list(change)
        elif change.former and not change.holder and change.new is not None and change.new.boot_id is None:
            key = change.new.key
            server = key.server if key is not None else None
            if server is not None:
                self._poller.poll_soon(server)
            if not change.new.by_hand and self._put_last(self._released.setdefault(server, {}), change.device_id):
                self._spawn(self._after_releases(server))

    def _note_attached(self, change: LockChange) -> None:
        """Notes a device that its server lists when another node's lock first says that it is attached there.

        An exclusive server hides it from the next list on. Until then, and for as long as a server never hides it, the
        list does not show that the holder has lost the device.
        """
        old, new = change.old, change.new
        key = next((lock.key for lock in (new, old) if lock is not None), None)
        if key is None or old == new:
            return
        if new is None or new.holder in ("", self._me) or new.port is None:
            self._set_always_listed(key, None)
        elif old is None or old.port is None or old.epoch != new.epoch:
            view = self._poller.view(key.server)
            listed = view.find(key.busid) is not None or (old is None and view.state is ServerState.PENDING)
            self._set_always_listed(key, old is not None if listed else None)
            if listed and old is not None:
                self._poller.poll_soon(key.server)  # the sooner it is seen hidden, the sooner its holder may die

    def _set_always_listed(self, key: DeviceKey, since_import: bool | None) -> None:
        if self._always_listed.get(key) is since_import:
            return
        if since_import is None:
            del self._always_listed[key]
        else:
            self._always_listed[key] = since_import
        unproven = frozenset(key.id for key, since_import in self._always_listed.items() if since_import)
        self._locks.expiry.set_unproven(unproven)

    def _listed_in_use(self, device_id: str) -> None:
        """Notes that the device's server lists devices in use, unless it has hidden the device under this holder."""
        for key in self._always_listed:
            if key.id == device_id:
                self._poller.note_flaw(key.server, ServerFlaw.LISTS_IN_USE)
                return

    def _distrust_list(self, change: LockChange) -> None:
        """Ignores what the server listed before another node wrote the lock: the device may be in use since then.

        This keeps every node from reading the holder's session each time a device is taken (R4).
        """
        key = change.new.key if change.new is not None else None
        if key is None:
            return
        waiting = self._distrusted.setdefault(key.server, {})
        if key not in waiting:
            self._locks.expiry.importable_changed(key.id, importable=False)
        if self._put_last(waiting, key):
            self._spawn(self._trust_next_list(key.server))

    def _put_last(self, waiting: dict[K, float], device: K) -> bool:
        """Puts the device at the end of `waiting`. Returns whether `waiting` was empty: no task serves it yet."""
        first = not waiting
        waiting.pop(device, None)
        waiting[device] = self._clock.monotonic()
        return first

    async def _trust_next_list(self, server: ServerKey) -> None:
        """Waits until the server has been polled since the last write of each lock. Ends when no device is left."""
        waiting = self._distrusted[server]
        while waiting:
            key, since = next(iter(waiting.items()))
            await self._poller.polled_since(server, since)
            if waiting.get(key) == since:
                del waiting[key]
                view = self._poller.view(server)
                if not view.lists_in_use and view.find(key.busid) is not None:
                    self._locks.expiry.importable_changed(key.id, importable=True)

    async def _after_releases(self, server: ServerKey | None) -> None:
        """Waits, for each released device, until its server has been polled after the reset, then calls on_trusted.

        Until then it counts as free by its lock, because a holder detaches a device before it releases the lock.
        """
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
                self._on_trusted(device_id)


class ReplacedDevices:
    """Devices that left their server's list while they had no holder, so that another device may have replaced them.

    A server that numbers devices by port gives the other device the same devid. Such a device is probed again, unless
    its lock has had a holder since: each holder, for a probe or for use, writes the identity to the lock.
    """

    def __init__(self, probe_limiter: ProbeLimiter) -> None:
        self._probe_limiter = probe_limiter
        self._resetting: dict[str, tuple[int, float]] = {}
        self._epochs: dict[str, int] = {}

    def server_changed(
        self, view: ServerView, locks: Mapping[str, Lock], released: Collection[str], now: float
    ) -> None:
        """Finds the devices that left a server's list. To be called at each change of a server's view.

        released: devices that are not listed because they have just been released. now: seconds, monotonic.
        """
        if view.state is not ServerState.REACHABLE:
            return
        for device_id in (DeviceKey(view.server, busid).id for busid in view.removed):
            lock = locks.get(device_id)
            if lock is None or lock.holder or lock.identity == UNKNOWN_IDENTITY:
                continue
            if device_id in released:
                self._resetting[device_id] = lock.epoch, now
            else:
                self._mark_replaced(device_id, lock.epoch, now)
        for device_id in self._resetting.keys() & importable({view.server: view}):
            epoch, since = self._resetting.pop(device_id)
            if now - since > RESET:
                self._mark_replaced(device_id, epoch, now)

    def _mark_replaced(self, device_id: str, epoch: int, now: float) -> None:
        if device_id not in self._probe_limiter.probe_limited(now):
            self._probe_limiter.note(device_id, now)
            self._epochs[device_id] = epoch

    def now(self, locks: Mapping[str, Lock]) -> frozenset[str]:
        """Returns the IDs of the devices whose locks may have the identity of an earlier device."""
        if not self._resetting and not self._epochs:
            return frozenset()
        self._resetting = {
            i: (epoch, since) for i, (epoch, since) in self._resetting.items() if i in locks and locks[i].epoch == epoch
        }
        self._epochs = {i: epoch for i, epoch in self._epochs.items() if i in locks and locks[i].epoch <= epoch}
        return frozenset(self._epochs)


class ProbeLimiter:
    """Limits how often a device with a changing identity is probed, see MAX_REREADS. now: monotonic seconds."""

    def __init__(self) -> None:
        self._at: dict[str, tuple[float, ...]] = {}

    def note(self, device_id: str, now: float) -> None:
        """Records that another device may have replaced this one."""
        self._at[device_id] = (*self._recent(device_id, now), now)[-MAX_REREADS:]

    def probe_limited(self, now: float) -> frozenset[str]:
        """Returns the IDs of the devices that must not be probed again yet."""
        if not self._at:
            return frozenset()
        self._at = {device_id: recent for device_id in self._at if (recent := self._recent(device_id, now))}
        return frozenset(device_id for device_id, recent in self._at.items() if len(recent) >= MAX_REREADS)

    def _recent(self, device_id: str, now: float) -> tuple[float, ...]:
        return tuple(at for at in self._at.get(device_id, ()) if now - at < REREAD_SPAN)
