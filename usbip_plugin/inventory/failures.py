"""Decides for how long a device is not offered because Allocates for it failed, although its server lists it.

Otherwise a Deployment replaces its failed pod again and again, and the kubelet admits no other pod meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from usbip_plugin.context import NodeContext
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.sync import done_within
from usbip_plugin.usbip.poller import ServerState, ServerView

MIN_FAILURES = 2
"""Failed Allocates in a row before a pause: the first may have met a device that was being reset."""
MIN_NODES = 3
"""Nodes with failures from which on those without one pause, too: so many nodes seldom have a fault of their own."""
FIRST_PAUSE, MAX_PAUSE = 10.0, 300.0
"""Seconds of the first pause (a few pods fail in two minutes) and of the longest; each failure doubles the pause."""
PAUSE_RATIO = 4.0
"""Minimum length of a pause, in lengths of the failed Allocate: a kubelet spends at most 20 % of its time in those."""
MEMORY = 1800.0
"""Seconds after which failures are forgotten: six of the longest pauses."""
MAX_DEVICES = 1024
"""Maximum number of devices whose failures are remembered; those that failed longest ago are forgotten first."""


@dataclass(frozen=True, slots=True)
class AllocateFailures:
    """The Allocates for one device that failed in a row because of the device or its server.

    nodes: the nodes on which they failed, at most MIN_NODES.
    since: when the last one failed (monotonic seconds). seconds: how long it took, 0 on another node.
    cause: the last error on this node.
    entry: what the server listed at first after the last failure; None until the device is listed again.
    """

    key: DeviceKey
    count: int = 0
    nodes: frozenset[str] = frozenset()
    since: float = 0.0
    seconds: float = 0.0
    cause: str = ""
    entry: Descriptor | None = None


def pause(failures: AllocateFailures, node: str) -> float:
    """Returns the seconds since the last failure during which this node does not offer the device; 0 for none."""
    concerned = node in failures.nodes or len(failures.nodes) >= MIN_NODES
    if failures.count < MIN_FAILURES or not concerned:
        return 0.0
    doubled = FIRST_PAUSE * 2.0 ** min(failures.count - MIN_FAILURES, 16)
    return min(MAX_PAUSE, max(doubled, PAUSE_RATIO * failures.seconds))


def after_list(failures: AllocateFailures, listed: Descriptor | None, in_hand: bool) -> AllocateFailures | None:
    """Returns the failures after a look at the server's list, or None if the list shows a change of the device.

    Only what changes once the device is listed again after a failure counts. A device that gets another number, or a
    server that restarts, at each import would otherwise never be learned about.

    listed: the device's entry, None if the server does not list it or does not answer.
    in_hand: whether a node has the device, or it is being reset, so that its absence proves nothing.
    """
    if in_hand:
        return replace(failures, entry=None)
    if failures.entry is None:
        return replace(failures, entry=listed)
    return failures if listed == failures.entry else None


class FailureTracker:
    """The failed Allocates of this node and, by the record on each lock, of the other nodes.

    on_pause_end(device_id): called when a pause has ended by itself.
    """

    def __init__(self, context: NodeContext, *, on_pause_end: Callable[[str], None]) -> None:
        self._me = context.me.node
        self._clock = context.clock
        self._on_pause_end = on_pause_end
        self._failures: dict[str, AllocateFailures] = {}
        self._changed = asyncio.Event()

    def failed(self, key: DeviceKey, node: str, cause: str, seconds: float) -> None:
        """Records that an Allocate on a node has failed because of the device. cause: "" on another node."""
        known = self._failures.pop(key.id, None) or AllocateFailures(key)
        nodes = known.nodes | {node} if len(known.nodes) < MIN_NODES else known.nodes
        self._failures[key.id] = replace(
            known,
            count=known.count + 1,
            nodes=nodes,
            since=self._clock.monotonic(),
            seconds=seconds,
            cause=cause or known.cause,
            entry=None,
        )
        if len(self._failures) > MAX_DEVICES:
            del self._failures[next(iter(self._failures))]
        self._changed.set()

    def succeeded(self, device_id: str) -> None:
        """Forgets the failures of a device that an Allocate got."""
        self._failures.pop(device_id, None)

    def lock_changed(self, change: LockChange) -> None:
        """Learns from the release of another node's lock. Its holder has recorded how the Allocate ended."""
        released = change.new if change.former not in ("", self._me) and not change.holder else None
        if released is None:
            return
        if released.failed_epoch is None:
            self.succeeded(change.device_id)
        elif released.failed_epoch == released.epoch and released.key is not None:
            self.failed(released.key, change.former, "", 0.0)

    def paused(self, views: Mapping[ServerKey, ServerView], is_in_hand: Callable[[str], bool]) -> Mapping[str, str]:
        """Returns the devices not to offer now, with the cause, by device ID. Forgets the failures of changed devices.

        is_in_hand(device_id): see after_list().
        """
        if not self._failures:
            return {}
        now = self._clock.monotonic()
        kept = {}
        for device_id, failures in self._failures.items():
            view = views.get(failures.key.server)
            reachable = view is not None and view.state is ServerState.REACHABLE
            listed = view.by_busid.get(failures.key.busid) if view is not None and reachable else None
            after = after_list(failures, listed, is_in_hand(device_id))
            if after is not None and now - after.since < MEMORY:
                kept[device_id] = after
        self._failures = kept
        return {device_id: self._text(device_id) for device_id in self._ends()}

    def _ends(self) -> Mapping[str, float]:
        """Returns when each present pause ends (monotonic seconds), by device ID."""
        now = self._clock.monotonic()
        ends = {i: failures.since + pause(failures, self._me) for i, failures in self._failures.items()}
        return {device_id: end for device_id, end in ends.items() if end > now}

    def _text(self, device_id: str) -> str:
        failures = self._failures[device_id]
        cause = failures.cause or f"failed on nodes {', '.join(sorted(failures.nodes))}"
        return f"{failures.count} in a row, offered again after {pause(failures, self._me):.0f} s: {cause}"

    async def run(self) -> None:
        """Calls on_pause_end at the end of each pause. Runs until cancelled."""
        while True:
            self._changed.clear()
            ends = self._ends()
            if not ends:
                await self._changed.wait()
                continue
            await done_within(self._clock, min(ends.values()) - self._clock.monotonic(), self._changed.wait())
            for device_id in ends.keys() - self._ends().keys():
                self._on_pause_end(device_id)
