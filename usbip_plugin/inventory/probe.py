"""Probes devices for their identity: decides (in pure functions) which node probes which device when, and probes it.

DEVLIST has no serial numbers, and no interfaces of a device that was never configured since it was bound. A node that
reads them takes the device's lock for a moment and writes the answer there for all nodes. An answer is valid for one
devid only. If the server lists another devid under the bus id, the device has been replaced or numbered anew, and is
probed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping

from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import PluginError
from usbip_plugin.inventory.evaluate import Evaluation
from usbip_plugin.inventory.facts import Snapshot
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.observe.spans import untraced
from usbip_plugin.usbip.poller import ServerPoller

log = logging.getLogger(__name__)


MAX_LOCKS = 512
"""Number of locks of one server at which devices without a lock are no longer probed, because their Leases stay."""

MAX_PROBES = 16
"""Maximum number of probes of one server at a time on this node, including those that wait for their next try."""

PROBE_SPREAD = 0.5
"""Seconds over which the nodes spread their probes of one device, so that the others see the first node's lock."""


def wanted(facts: Snapshot, key: DeviceKey, descriptor: Descriptor) -> bool:
    """Returns whether a selector needs the identity of this listed device, and the device is free to be probed."""
    identity = facts.identity_of(key.id, descriptor)
    if identity.serial is not None and (descriptor.interfaces or identity.interfaces) is not None:
        return False
    if facts.lock_statuses.get(key.id, LockStatus.FREE) is LockStatus.HELD:
        return False
    if key.id in facts.claims or facts.moved_here(key.id) is not None:
        return False
    return any(
        matches(selector, descriptor, identity) is Match.NEEDS_PROBE for selector in facts.config.asking(key.server)
    )


def wanting_probe(facts: Snapshot) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Returns the devices of reachable servers that need a probe, see wanted().

    Leaves out a device without a lock if its server has MAX_LOCKS locks already.
    """
    asking = {server: view for server, view in facts.servers.items() if facts.config.asking(server)}
    if not asking:
        return ()
    locked = Counter(key.server for lock in facts.locks.values() if (key := lock.key) is not None)
    return tuple(
        (key, descriptor)
        for server, view in asking.items()
        for key, descriptor in view.exported.items()
        if key.id in facts.locks or locked[server] < MAX_LOCKS
        if wanted(facts, key, descriptor)
    )


def next_probes(
    wanted: Iterable[tuple[DeviceKey, Descriptor]],
    running: Mapping[str, ServerKey],
    last: Mapping[ServerKey, str],
    node: str,
) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Returns the devices to probe next, at most MAX_PROBES of a server at a time, in turn after the last one.

    Each node has an order of its own, so that several nodes share the work.

    running: the server of each device that is being probed, by device ID.
    last: the ID of the device whose probe started last, by server.
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
    """Returns for how many seconds this node leaves the device to other nodes, from 0 to PROBE_SPREAD."""
    return PROBE_SPREAD * _rank(node, device_id)[0] / 256


def _rank(node: str, device_id: str) -> bytes:
    return hashlib.sha256(f"{device_id}/{node}".encode()).digest()


PROBE_AGAIN = 1.0
"""Seconds to wait before another probe after a server's list was found to be old: time for the poller to ask again."""
PROBE_RETRY = 10.0
"""Seconds to wait before another probe of a device after a failed one."""


Probe = Callable[[DeviceKey, Descriptor], Awaitable[object]]
"""Reads the identity of a device under its lock and writes it to the lock. Raises PluginError."""


class Prober:
    """Probes the devices of an inventory. After each evaluation, starts the probes whose turn it is."""

    def __init__(self, context: NodeContext, *, inventory: Inventory, poller: ServerPoller, probe: Probe) -> None:
        self._me = context.me.node
        self._clock = context.clock
        self._inventory = inventory
        self._poller = poller
        self._ask = probe
        self._running: dict[str, ServerKey] = {}
        self._last: dict[ServerKey, str] = {}
        self._failures: dict[str, str] = {}
        inventory.subscribe(self._evaluated)

    def _evaluated(self, evaluation: Evaluation) -> None:
        """Starts the next probes. Starts none while the API server, which has the locks, is unreachable."""
        facts = evaluation.facts
        if facts.api.unreachable_for is not None:
            return
        wanting = wanting_probe(facts)
        for key, descriptor in next_probes(wanting, self._running, self._last, self._me) if wanting else ():
            self._running[key.id], self._last[key.server] = key.server, key.id
            self._inventory.spawn(self._probe(key, descriptor))

    async def _probe(self, key: DeviceKey, descriptor: Descriptor) -> None:
        try:
            await self._clock.sleep(probe_delay(self._me, key.id))
            if not wanted(self._inventory.facts(), key, descriptor):
                return  # another node was first
            # tried every PROBE_RETRY seconds for as long as needed: after a failure, further tries are not traced
            with untraced() if key.id in self._failures else contextlib.nullcontext():
                # the list may be older than what another node has read from the device that is there now
                if await self._poller.fetch(key) != descriptor:
                    self._poller.poll_soon(key.server)
                    await self._clock.sleep(PROBE_AGAIN)
                    return
                await self._ask(key, descriptor)
            self._failures.pop(key.id, None)
        except PluginError as error:
            if self._failures.get(key.id) != str(error):
                self._failures[key.id] = str(error)
                log.warning("device not asked yet who it is", extra={"device": str(key), "cause": str(error)})
            await self._clock.sleep(PROBE_RETRY)
        finally:
            self._running.pop(key.id, None)
            self._inventory.invalidate()
