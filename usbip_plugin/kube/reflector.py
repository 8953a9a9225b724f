"""Follows one collection of the API server by list and watch, like the Reflector of Kubernetes' client-go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import KubeError, KubeGone, KubeServerError

E = TypeVar("E")

log = logging.getLogger(__name__)

SETTLE_S = 2.0
"""Seconds after which an open watch counts as established, even without an event."""


class Reflector(ABC, Generic[E]):
    """Keeps a view of one collection current. A subclass has the view. Works only while run() runs.

    A list alone does not show that watches work. After a watch that failed at once, the view counts as current only
    after an event, or once a watch has been open for SETTLE_S.

    resource: as RBAC names it. retry: seconds before the first and, at most, before a later retry.
    """

    def __init__(self, resource: str, clock: Clock, rng: random.Random, retry: tuple[float, float]) -> None:
        self._resource, self._clock, self._rng, self._retry = resource, clock, rng, retry
        self._scope: asyncio.Timeout | None = None
        self._list_again = False
        """Whether relist() was called since the last list was requested."""
        self._suspect = False
        """Whether the last watch has neither brought an event nor been open for SETTLE_S."""
        self._failure: type[KubeError] | None = None
        """The kind of the last failure, None once the view is current again."""
        self.turned_at: float | None = None
        """When run() last began a list (monotonic seconds); None while a watch is open, which its client limits."""

    @abstractmethod
    async def _list(self) -> str:
        """Replaces the view by a list of the collection, and returns the list's resourceVersion."""

    @abstractmethod
    def _watch(self, version: str) -> AsyncGenerator[E, None]:
        """Returns the events after a resourceVersion. They end when the API server ends the watch."""

    @abstractmethod
    def apply(self, event: E) -> str | None:
        """Applies one event to the view. Returns its resourceVersion, which bookmarks have too, or None."""

    @abstractmethod
    def _up(self) -> None:
        """Called when the view is current, and any number of times while it is."""

    @abstractmethod
    def _down(self, error: KubeError, *, first: bool) -> None:
        """Called for each failure. first: the one before was of another kind, or the view has been current since."""

    async def run(self) -> None:
        """Lists and watches until cancelled.

        A watch that the API server ended is opened again from the version it had reached. After a KubeError, KubeGone
        included, the collection is listed again; only KubeGone is no failure. Waits before a retry, and before it opens
        a watch again that was open for less than SETTLE_S.
        """
        waits = backoff(self._rng, *self._retry)
        version: str | None = None
        while True:
            self.turned_at = started = self._clock.monotonic()
            try:
                if version is None:
                    self._list_again = False
                    version = await self._list()
                    if not self._suspect:
                        self._current()
                version = await self._follow(version) if not self._list_again else None
            except KubeGone:
                log.debug("watch too old, listing again", extra={"collection": self._resource})
                version = None
            except KubeError as error:
                first, self._failure = self._failure is not type(error), type(error)
                self._down(error, first=first)
                version = None
            lasted = self._clock.monotonic() - started >= SETTLE_S
            if lasted:
                waits = backoff(self._rng, *self._retry)
            if version is None or not lasted:
                await self._clock.sleep(next(waits))

    def relist(self) -> None:
        """Makes run() list again. Ends the open watch, which may be dead."""
        self._list_again = True
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())
            self._scope = None

    async def _follow(self, version: str) -> str | None:
        """Watches from a version on. Returns the version reached when the server ends the watch; None after relist().

        Raises KubeServerError if the watch ended as soon as it was opened.
        """
        opened, self.turned_at = self._clock.monotonic(), None
        settled = asyncio.get_running_loop().call_later(SETTLE_S, self._current)
        self._suspect = True
        try:
            async with asyncio.timeout(None) as self._scope, contextlib.aclosing(self._watch(version)) as events:
                async for event in events:
                    if self._suspect:
                        self._suspect = False
                        self._current()
                    version = self.apply(event) or version
        except TimeoutError:
            log.debug("watch ended to verify the API server", extra={"collection": self._resource})
            return None
        finally:
            self._scope = None
            settled.cancel()
            self._suspect = self._suspect and self._clock.monotonic() - opened < SETTLE_S
        if self._suspect:
            raise KubeServerError("watch", self._resource, "the watch ended as soon as it was opened")
        return version

    def _current(self) -> None:
        self._failure = None
        self._up()
