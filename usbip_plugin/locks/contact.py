"""Whether the API server can be reached, by what its last calls came to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeError, KubeServerError, KubeUnauthorized, KubeUnreachable
from usbip_plugin.locks.store import Lease, LeaseChange, LeaseList, LeaseStore

T = TypeVar("T")

_DOWN = (KubeUnreachable, KubeServerError, KubeUnauthorized)


@dataclass(frozen=True, slots=True)
class ApiState:
    """since: this node's monotonic clock, when reachable last changed. error: why it is not reachable."""

    reachable: bool
    since: float
    error: str | None


class Contact:
    """Reachable when both the watch and the last single call are well. Begins as not reachable, without an error."""

    def __init__(self, clock: Clock, on_change: Callable[[ApiState], None]) -> None:
        self._clock, self._on_change = clock, on_change
        self._watch_up = False
        self._watch_error: str | None = None
        self._watch_failure: type[KubeError] | None = None
        self._call_error: str | None = None
        self.state = ApiState(reachable=False, since=clock.monotonic(), error=None)

    @property
    def call_failed(self) -> bool:
        return self._call_error is not None

    def watch_up(self) -> None:
        self._watch_up, self._watch_error, self._watch_failure = True, None, None
        self._tell()

    def watch_down(self, error: KubeError) -> bool:
        """Whether this is news: the first failure, or one of another kind than the last."""
        news = self._watch_failure is not type(error)
        self._watch_up, self._watch_error, self._watch_failure = False, str(error), type(error)
        self._tell()
        return news

    def call_ok(self) -> None:
        self._call_error = None
        self._tell()

    def call_down(self, error: KubeError) -> None:
        self._call_error = str(error)
        self._tell()

    def _tell(self) -> None:
        reachable = self._watch_up and self._call_error is None
        error = None if reachable else self._call_error or self._watch_error
        if reachable != self.state.reachable:
            self.state = ApiState(reachable, self._clock.monotonic(), error)
        elif error != self.state.error:
            self.state = ApiState(reachable, self.state.since, error)
        else:
            return
        self._on_change(self.state)


class WatchedStore:
    """A LeaseStore that tells a Contact how each call went. Watches are told by who runs them."""

    def __init__(self, store: LeaseStore, contact: Contact) -> None:
        self._store, self._contact = store, contact

    async def get(self, name: str) -> Lease | None:
        return await self._told(self._store.get(name))

    async def list(self, labels: Mapping[str, str]) -> LeaseList:
        return await self._told(self._store.list(labels))

    async def create(self, lease: Lease) -> Lease:
        return await self._told(self._store.create(lease))

    async def replace(self, lease: Lease) -> Lease:
        return await self._told(self._store.replace(lease))

    async def delete(self, name: str, resource_version: str) -> None:
        await self._told(self._store.delete(name, resource_version))

    def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncIterator[LeaseChange]:
        return self._store.watch(labels, resource_version)

    async def _told(self, call: Awaitable[T]) -> T:
        try:
            result = await call
        except _DOWN as error:
            self._contact.call_down(error)
            raise
        except KubeError:
            self._contact.call_ok()  # an answer, if not the one wished for
            raise
        self._contact.call_ok()
        return result
