"""What each server lists, and since when it lists each device as the one it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from usbip_plugin.clock import Clock
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.usbip.poller import ServerState, ServerView

ABSENCE = 10.0
"""Seconds after which a device that is listed again has come anew: one in use is hidden, and reading takes less."""


@dataclass(frozen=True, slots=True)
class _Stay:
    """since, until: seconds, monotonic; until is when it was last known to be listed."""

    devid: int
    since: float
    until: float


class Listings:
    """Of one node, as its poller tells. All methods belong to one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._views: dict[ServerKey, ServerView] = {}
        self._stays: dict[DeviceKey, _Stay] = {}

    def server_changed(self, view: ServerView) -> None:
        """For the poller."""
        now = self._clock.monotonic()
        before = self._views.get(view.server)
        self._views[view.server] = view
        was_listed = set(_keys(before)) if before is not None else set()
        stays = {
            key: _Stay(stay.devid, stay.since, now) if key in was_listed else stay
            for key, stay in self._stays.items()
            if key in was_listed or now - stay.until < ABSENCE
        }
        for key, descriptor in _keys(view).items():
            stay = stays.get(key)
            known = stay is not None and stay.devid == descriptor.devid
            stays[key] = _Stay(descriptor.devid, stay.since if stay is not None and known else now, now)
        self._stays = stays

    def reachable(self, server: ServerKey) -> bool:
        """Whether it answered when it was asked last."""
        view = self._views.get(server)
        return view is not None and view.state is ServerState.REACHABLE

    def unreachable(self, server: ServerKey) -> str | None:
        """Why it did not."""
        view = self._views.get(server)
        return view.error if view is not None and view.state is ServerState.UNREACHABLE else None

    def listed(self, key: DeviceKey) -> Descriptor | None:
        """As its server lists it now; None also if that does not answer."""
        view = self._views.get(key.server)
        return _keys(view).get(key) if view is not None else None

    def of(self, server: ServerKey) -> dict[DeviceKey, Descriptor]:
        """Everything a server lists, nothing if it does not answer."""
        view = self._views.get(server)
        return _keys(view) if view is not None else {}

    def servers(self) -> Iterator[ServerKey]:
        yield from self._views

    def since(self, key: DeviceKey) -> float | None:
        """Since when (monotonic) its server lists this very device here; it may be hidden for a moment. None: never."""
        stay = self._stays.get(key)
        return stay.since if stay is not None else None


def _keys(view: ServerView) -> dict[DeviceKey, Descriptor]:
    if view.state is not ServerState.REACHABLE:
        return {}
    return {DeviceKey(view.server, descriptor.busid): descriptor for descriptor in view.devices}
