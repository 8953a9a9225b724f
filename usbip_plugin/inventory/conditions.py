"""Conditions of a node that make all its devices unavailable: no usable vhci port, API server unreachable."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from usbip_plugin.context import NodeContext
from usbip_plugin.errors import DriverMissing, KernelUnsupported, VhciError
from usbip_plugin.inventory.health import API_GRACE
from usbip_plugin.inventory.snapshot import ApiStatus, PortSummary
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.sync import done_within
from usbip_plugin.vhci.driver import VhciDriver
from usbip_plugin.vhci.sysfs import PortStatus

PORTS_SETTLE = 0.1
"""Seconds for which uevents are collected before the free ports are counted: one device causes a dozen uevents."""
PORTS_INTERVAL = 30.0
"""Seconds between two counts of the free ports when no uevent arrives."""
GRACE_MARGIN = 0.01
"""Seconds added to the wait for the end of API_GRACE, because a timer may fire a rounding error early."""


def unusable(error: VhciError) -> PortSummary:
    """Returns the summary of a driver whose ports cannot be read."""
    is_missing = isinstance(error, DriverMissing) and not isinstance(error, KernelUnsupported)
    return PortSummary(str(error), 0, 0, module="missing" if is_missing else "unusable")


class Conditions:
    """The vhci ports and the API server, as this node sees them. Stays up to date only while `run()` runs.

    on_change: called when a condition that affects devices may have changed.
    """

    def __init__(
        self, context: NodeContext, *, driver: VhciDriver, locks: LockManager, on_change: Callable[[], None]
    ) -> None:
        self._clock = context.clock
        self._driver = driver
        self._locks = locks
        self._on_change = on_change
        self.ports = PortSummary()
        """The state of vhci_hcd and its ports, as last read."""
        self.ports_read_at: float | None = None
        """When the ports were last about to be read (monotonic seconds)."""
        self._ports_event = asyncio.Event()
        self._api_event = asyncio.Event()

    @property
    def api(self) -> ApiStatus:
        """Returns whether the API server is reachable now and, if not, for how long it has been unreachable.

        That is for ever until all locks have been read: before, a device may be that of a pod.
        """
        api = self._locks.api
        if not self._locks.ready.is_set():
            return ApiStatus(math.inf, api.error or "the locks have not been read yet")
        return ApiStatus(None if api.reachable else self._clock.monotonic() - api.since, api.error or "")

    async def run(self) -> None:
        """Follows the ports and the API server. Runs until cancelled."""
        undo = [
            self._locks.subscribe_api(lambda _state: self._api_event.set()),
            self._driver.subscribe(self._ports_event.set),
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_ports(), name="free ports")
                tasks.create_task(self._watch_api(), name="API grace")
                await self._locks.ready.wait()
                self._on_change()
        finally:
            for unsubscribe in undo:
                unsubscribe()

    async def _watch_ports(self) -> None:
        while True:
            if self._ports_event.is_set():
                await self._clock.sleep(PORTS_SETTLE)
            self._ports_event.clear()
            self.ports_read_at = self._clock.monotonic()
            before, self.ports = self.ports, await self._read_ports()
            if not self.ports.has_same_obstacles(before):
                self._on_change()
            await done_within(self._clock, PORTS_INTERVAL, self._ports_event.wait())

    async def _read_ports(self) -> PortSummary:
        try:
            ports = await self._driver.ports()
        except VhciError as error:
            return unusable(error)
        free = [port.hub for port in ports if port.status is PortStatus.NULL]
        used = [port.hub for port in ports if port.status is not PortStatus.NULL]
        return PortSummary(None, free.count("hs"), free.count("ss"), used.count("hs"), used.count("ss"))

    async def _watch_api(self) -> None:
        """Calls on_change at each change of the API server's reachability, and when API_GRACE ends.

        While the API server stays unreachable after that, calls on_change every PORTS_INTERVAL seconds.
        """
        while True:
            self._api_event.clear()
            self._on_change()
            unreachable_for = self.api.unreachable_for
            if unreachable_for is None:
                await self._api_event.wait()
                continue
            left = API_GRACE - unreachable_for
            wait = left + GRACE_MARGIN if left > 0 else PORTS_INTERVAL
            await done_within(self._clock, wait, self._api_event.wait())
