"""The list and watch of all locks, for as long as the plugin runs."""

from __future__ import annotations

import asyncio
import logging
import random

from usbip_plugin import clock as usbip_plugin_clock
from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeError, KubeGone, KubeServerError
from usbip_plugin.locks import record
from usbip_plugin.locks.contact import Contact
from usbip_plugin.locks.store import LeaseStore
from usbip_plugin.locks.view import LockView

logger = logging.getLogger(__name__)

RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
# A watch that has stood this long counts as established.
SETTLE_S = 2.0


class Follower:
    """Keeps a LockView true. ready is set after the first list."""

    def __init__(
        self,
        store: LeaseStore,
        view: LockView,
        contact: Contact,
        clock: Clock,
        rng: random.Random,
        ready: asyncio.Event,
    ) -> None:
        self._store, self._view, self._contact = store, view, contact
        self._clock, self._rng, self._ready = clock, rng, ready
        self._scope: asyncio.Timeout | None = None
        self._suspect = False  # the last watch broke as soon as it was opened, though the list had gone well

    def verify(self) -> None:
        """Another call failed: give up the open watch, which may be dead too, and list anew."""
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())
            self._scope = None

    async def run(self) -> None:
        """Until cancelled."""
        waits = usbip_plugin_clock.backoff(self._rng, RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            started = self._clock.monotonic()
            try:
                await self._list_and_watch()
            except TimeoutError:
                logger.debug("lock watch given up to verify the API server")
            except KubeGone:
                logger.debug("lock watch too old, listing anew")
            except KubeError as error:
                if self._contact.watch_down(error):
                    logger.warning("locks cannot be followed", extra={"cause": str(error)})
            if self._clock.monotonic() - started >= SETTLE_S:
                waits = usbip_plugin_clock.backoff(self._rng, RETRY_FIRST_S, RETRY_MAX_S)
            await self._clock.sleep(next(waits))

    async def _list_and_watch(self) -> None:
        listing = await self._store.list(record.LOCK_LABELS)
        self._view.reset(listing)
        self._ready.set()
        if not self._suspect:
            self._contact.watch_up()
        version = listing.resource_version
        while True:
            opened = self._clock.monotonic()
            settled = asyncio.get_running_loop().call_later(SETTLE_S, self._contact.watch_up)
            self._suspect = True
            try:
                version = await self._watch(version)
            finally:
                settled.cancel()
                self._suspect = self._suspect and self._clock.monotonic() - opened < SETTLE_S
            if self._suspect:
                raise KubeServerError("watch", "leases.coordination.k8s.io", "the watch ended as soon as it was opened")

    async def _watch(self, version: str) -> str:
        """Follow from version; the version reached when the server ended it. TimeoutError after verify()."""
        stream = self._store.watch(record.LOCK_LABELS, version)
        try:
            async with asyncio.timeout(None) as self._scope:
                async for change in stream:
                    if self._suspect:
                        self._suspect = False
                        self._contact.watch_up()
                    version = change.resource_version
                    self._view.apply(change)
        finally:
            self._scope = None
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        return version
