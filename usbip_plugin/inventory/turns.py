"""Decides when this node offers a device that was just released: the nodes offer it one after another.

If all nodes offered it at once, the scheduler would send a waiting pod to each, and all pods except one would fail.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Collection, Coroutine

from usbip_plugin.context import NodeContext
from usbip_plugin.kube.fleet import Fleet
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.sync import done_within

SLOT_S = 1.25
"""Seconds between the turns of two nodes: the time from an offer until a waiting pod's Allocate has the lock.

Scheduler and kubelet need 0.1 s, on a busy machine up to 1 s.
"""

OFFERED_BY_ALL_S = 10.0
"""Seconds from a release until every node offers the device, whatever its turn: as long as a kubelet's status sync."""

TOGETHER_S = 0.25
"""Seconds within which turns come together: with hundreds of released devices, each list that is sent has many of them.

A list for each of 500 devices took 6 MiB and 3 s of processor time.
"""


def rank(fleet: Fleet, node: str, change: LockChange) -> int:
    """Returns how many nodes offer the released device before this one. Other nodes may have the same rank.

    The former holder offers it from the end of its pod on, and the first of the others with it: a pod that was on its
    way to the former holder has the device by now, see usage_ended(). The order of the other nodes changes with the
    epoch. Their ranks differ if the fleet has names.
    """
    epoch = change.new.epoch if change.new is not None else 0

    def draw(name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{epoch}/{change.device_id}/{name}".encode()).digest()[:8])

    if node == change.former:
        return 0
    if fleet.names:
        return sum(draw(name) < draw(node) for name in fleet.names - {change.former})
    return draw(node) * max(1, fleet.nodes - 1) >> 64


def delay(place: int) -> float:
    """Returns the seconds from a release until the node with this rank offers the device.

    Rank 0 offers it at once, ranks 1 and 2 after one and two slots. Each further slot has twice as many nodes as the
    one before, evenly spaced, so that 10 s are enough for hundreds of nodes.
    """
    doublings = max(0, place.bit_length() - 1)
    return min(OFFERED_BY_ALL_S - TOGETHER_S, SLOT_S * (doublings + place / (1 << doublings)))


class Turns:
    """The released devices that other nodes offer before this one. One task serves them all, without requests.

    A device is offered at once if this process has not seen its release. A taken lock ends all turns.

    fleet: returns the nodes that run the plugin.
    spawn: starts a coroutine in a task.
    on_turn(device_id): called when this node's turn comes.
    """

    def __init__(
        self,
        context: NodeContext,
        *,
        fleet: Callable[[], Fleet],
        spawn: Callable[[Coroutine[object, object, None]], None],
        on_turn: Callable[[str], None],
    ) -> None:
        self._me = context.me.node
        self._clock = context.clock
        self._fleet = fleet
        self._spawn = spawn
        self._on_turn = on_turn
        self._due: dict[str, float] = {}
        """By device ID: when this node's turn comes, in seconds on the monotonic clock."""
        self._waking_at: float | None = None
        """When the task looks at `_due` next; None if it does not run."""
        self._wake = asyncio.Event()

    def lock_changed(self, change: LockChange) -> None:
        """Begins the turns of a device that its holder has released, and ends those of one that a node has taken."""
        if change.holder or change.new is None:
            self._due.pop(change.device_id, None)
        elif change.former:
            left = delay(rank(self._fleet(), self._me, change))
            self._due.pop(change.device_id, None)
            if left > 0:
                self._begin(change.device_id, self._clock.monotonic() + left)

    def awaited(self, device_ids: Collection[str] | None = None) -> frozenset[str]:
        """Returns which of these devices (None for all) this node does not offer yet, because others are first."""
        now = self._clock.monotonic()
        due = self._due if device_ids is None else {i: self._due[i] for i in device_ids if i in self._due}
        return frozenset(i for i, at in due.items() if at > now)

    def _begin(self, device_id: str, at: float) -> None:
        at = math.ceil(at / TOGETHER_S) * TOGETHER_S
        self._due[device_id] = at
        if self._waking_at is None:
            self._waking_at = at
            self._spawn(self._wait())
        elif at < self._waking_at:
            self._wake.set()

    async def _wait(self) -> None:
        """Calls on_turn for each device in time, until no device is left."""
        while self._due:
            now = self._clock.monotonic()
            for device_id in [i for i, at in self._due.items() if at <= now]:
                del self._due[device_id]
                self._on_turn(device_id)
            if self._due:
                self._wake.clear()
                self._waking_at = min(self._due.values())
                await done_within(self._clock, self._waking_at - now, self._wake.wait())
        self._waking_at = None
