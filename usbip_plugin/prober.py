"""Asks devices who they are, where a selector wants to know it: the work on what probing decides."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping

from usbip_plugin.attach.attacher import Attacher
from usbip_plugin.clock import Clock
from usbip_plugin.errors import PluginError
from usbip_plugin.handovers import Spawn
from usbip_plugin.inventory.facts import Facts
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Descriptor, DeviceKey, Lock, ServerKey
from usbip_plugin.observe.spans import untraced
from usbip_plugin.probing import Rereads, Suspects, next_probes, probe_delay, wanted, wanting_probe
from usbip_plugin.usbip.poller import ServerPoller, ServerView

PROBE_AGAIN = 1.0
"""Seconds until the poller has asked a server whose list was found to be old."""
PROBE_RETRY = 10.0
"""Seconds before a device that could not be asked who it is, is asked again."""

log = logging.getLogger(__name__)


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
