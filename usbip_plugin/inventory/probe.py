"""Probes devices for their identity: decides (in pure functions) which node probes which device when, and probes it.

DEVLIST has no serial numbers, and no interfaces of a device that was never configured since it was bound. A node that
reads them takes the device's lock for a moment and writes the answer there for all nodes. If the server lists another
devid at the bus ID later, the device is probed again.
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
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.inventory.snapshot import Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.observe.spans import untraced
from usbip_plugin.usbip.poller import ServerPoller

log = logging.getLogger(__name__)


MAX_LOCKS = 512
"""Number of locks of one server from which on devices without a lock are not probed: each would leave a Lease."""

MAX_PROBES = 16
"""Maximum number of probes of one server at a time on this node, including those that wait for their next try."""

PROBE_SPREAD = 0.5
"""Seconds over which nodes spread their probes of one device, so that all others see the first node's lock."""


def needs_probe(snapshot: Snapshot, key: DeviceKey, descriptor: Descriptor) -> bool:
    """Returns whether a selector needs the identity of this listed device, and the device is free to be probed.

    It is not while this node holds its lock: after a reboot that of a pod that the kubelet has yet to name.
    """
    identity = snapshot.identity_of(key.id, descriptor)
    if identity.serial is not None and (descriptor.interfaces or identity.interfaces) is not None:
        return False
    if snapshot.lock_statuses.get(key.id, LockStatus.FREE) not in (LockStatus.FREE, LockStatus.EXPIRED):
        return False
    if key.id in snapshot.claims or snapshot.moved_here(key.id) is not None:
        return False
    return any(
        matches(selector, descriptor, identity) is Match.NEEDS_PROBE for selector in snapshot.config.asking(key.server)
    )


def devices_to_probe(snapshot: Snapshot) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Returns the devices of reachable servers that need a probe, see needs_probe().

    Leaves out a device without a lock if its server has MAX_LOCKS locks already.
    """
    asking = {server: view for server, view in snapshot.servers.items() if snapshot.config.asking(server)}
    if not asking:
        return ()
    locked = Counter(key.server for lock in snapshot.locks.values() if (key := lock.key) is not None)
    return tuple(
        (key, descriptor)
        for server, view in asking.items()
        for key, descriptor in view.exported.items()
        if key.id in snapshot.locks or locked[server] < MAX_LOCKS
        if needs_probe(snapshot, key, descriptor)
    )


def next_probes(
    devices: Iterable[tuple[DeviceKey, Descriptor]],
    running: Mapping[str, ServerKey],
    last: Mapping[ServerKey, str],
    node: str,
) -> tuple[tuple[DeviceKey, Descriptor], ...]:
    """Returns which of these devices to probe next: at most MAX_PROBES of a server at a time, each in its turn.

    Each node has an order of its own, so that several nodes share the work.

    running: the server of each device that is being probed, by device ID.
    last: the ID of the device whose probe started last, by server.
    """
    probing = Counter(running.values())
    started = {server: _rank(node, device_id) for server, device_id in last.items()}
    ranked = sorted((_rank(node, key.id), key, descriptor) for key, descriptor in devices)
    chosen = []
    for _, key, descriptor in sorted(ranked, key=lambda one: one[0] <= started.get(one[1].server, b"")):
        if key.id not in running and probing[key.server] < MAX_PROBES:
            probing[key.server] += 1
            chosen.append((key, descriptor))
    return tuple(chosen)


def probe_delay(node: str, device_id: str) -> float:
    """Returns the seconds that this node waits before a probe of the device, from 0 to PROBE_SPREAD."""
    return PROBE_SPREAD * _rank(node, device_id)[0] / 256


def _rank(node: str, device_id: str) -> bytes:
    return hashlib.sha256(f"{device_id}/{node}".encode()).digest()


PROBE_RETRY = 10.0
"""Seconds until another probe of a device after a failed one."""


Probe = Callable[[DeviceKey, Descriptor], Awaitable[object]]
"""Reads the identity of a device under its lock and writes it to the lock. Raises PluginError."""


class Prober:
    """Probes the devices of an inventory. After each evaluation, starts the probes whose turn it is."""

    def __init__(self, context: NodeContext, *, inventory: Inventory, poller: ServerPoller, probe: Probe) -> None:
        self._me = context.me.node
        self._clock = context.clock
        self._inventory = inventory
        self._poller = poller
        self._read = probe
        self._running: dict[str, ServerKey] = {}
        self._last: dict[ServerKey, str] = {}
        self._failures: dict[DeviceKey, str] = {}
        inventory.subscribe(self._evaluated)

    def _evaluated(self, evaluation: Evaluation) -> None:
        """Starts the next probes. Starts none while the API server, which has the locks, is unreachable."""
        snapshot = evaluation.snapshot
        if snapshot.api.unreachable_for is not None:
            return
        devices = devices_to_probe(snapshot)
        for key, descriptor in next_probes(devices, self._running, self._last, self._me) if devices else ():
            self._running[key.id], self._last[key.server] = key.server, key.id
            self._inventory.spawn(self._probe(key, descriptor))

    async def _probe(self, key: DeviceKey, descriptor: Descriptor) -> None:
        try:
            await self._clock.sleep(probe_delay(self._me, key.id))
            # the server's list may be older than the identity that another node has read
            since = self._clock.monotonic()
            self._poller.poll_soon(key.server)
            await self._poller.polled_since(key.server, since)
            if self._poller.view(key.server).find(key.busid) != descriptor:
                return
            if not needs_probe(self._inventory.snapshot(), key, descriptor):
                return  # another node was first
            # after a failure, the endless further tries are not traced
            with untraced() if key in self._failures else contextlib.nullcontext():
                await self._read(key, descriptor)
            self._failures.pop(key, None)
        except PluginError as error:
            if self._failures.get(key) != str(error):
                self._remember_failure(key, str(error))
                log.warning("device identity not read yet", extra={"device": str(key), "cause": str(error)})
            await self._clock.sleep(PROBE_RETRY)
        finally:
            self._running.pop(key.id, None)
            self._inventory.invalidate()

    def _remember_failure(self, key: DeviceKey, text: str) -> None:
        """Remembers a failure, and forgets those of devices that their server has not listed lately."""
        stays = {server: view.stays for server, view in self._poller.views.items()}
        self._failures = {k: known for k, known in self._failures.items() if k.busid in stays.get(k.server, ())}
        self._failures[key] = text
