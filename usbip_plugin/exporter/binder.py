"""Binds the selected devices to usbip-host, whenever they are plugged in, and gives back those that are not selected.

The configuration says which devices are exported, and nothing else does: a device that was bound by hand and is not
selected is given back, too. A device in use is given back when its client has gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from usbip_plugin.clock import Clock
from usbip_plugin.config.schema import Selector
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.errors import BindFailed, HostError
from usbip_plugin.exporter.host import HostDevice, HostDevices, StubStatus
from usbip_plugin.sync import done_within

log = logging.getLogger(__name__)

SETTLE_S = 0.1
"""Seconds from the first uevent to the reading of the devices: a device causes several uevents."""
RETRY_S = 10.0
"""Seconds until a device that could not be bound is tried again: the end of a mount causes no uevent."""
RECHECK_S = 60.0
"""Seconds between readings without uevents."""
ANY_DEVICE = Selector()
HUB = "USB/IP cannot carry hubs; select the devices behind the hub"


@dataclass(frozen=True, slots=True)
class BindPlan:
    """What is to be done with the devices of a host, each a bus ID.

    bind: selected, and not bound to usbip-host.
    renew: selected and bound, and unusable since its reset failed: bind it again.
    unbind: bound, not selected, and not in use.
    hubs: hubs that a selector names.
    unmatched: the selectors that match no device, neither a hub.
    """

    bind: tuple[str, ...] = ()
    renew: tuple[str, ...] = ()
    unbind: tuple[str, ...] = ()
    hubs: tuple[str, ...] = ()
    unmatched: tuple[Selector, ...] = ()


def is_selected(device: HostDevice, selectors: Iterable[Selector]) -> bool:
    return any(matches(selector, device.descriptor, device.identity) is Match.YES for selector in selectors)


def plan(
    devices: Sequence[HostDevice], statuses: Mapping[str, StubStatus | None], selectors: Sequence[Selector]
) -> BindPlan:
    """Decides what to bind and unbind. statuses: by bus ID, of the devices that are bound."""
    bind, renew, unbind, hubs = [], [], [], []
    unmatched = dict.fromkeys(selectors)
    for device in devices:
        hub = device.descriptor.is_hub
        seen = replace(device, descriptor=replace(device.descriptor, device_class=0)) if hub else device
        matching = [selector for selector in selectors if is_selected(seen, [selector])]
        for selector in matching:
            unmatched.pop(selector, None)
        if hub:
            hubs += [device.busid] if any(selector != ANY_DEVICE for selector in matching) else []
        elif matching and not device.is_bound:
            bind.append(device.busid)
        elif matching and statuses.get(device.busid) is StubStatus.ERROR:
            renew.append(device.busid)
        elif not matching and device.is_bound and statuses.get(device.busid) is not StubStatus.USED:
            unbind.append(device.busid)
    return BindPlan(tuple(bind), tuple(renew), tuple(unbind), tuple(hubs), tuple(unmatched))


class Binder:
    """Keeps the selected devices bound. Works only while run() runs.

    devices: all devices of the host as last read.
    exported: by bus ID, the devices that are selected and bound.
    problems: by bus ID, why a selected device is not exported, with the cure.
    unmatched: the selectors that match no device.
    settled: set once the devices were bound for the first time.
    """

    def __init__(self, host: HostDevices, clock: Clock, selectors: Sequence[Selector]) -> None:
        self._host = host
        self._clock = clock
        self._selectors = tuple(selectors)
        self._woken = asyncio.Event()
        self._stuck: dict[str, tuple[int, str] | None] = {}
        self._unreadable = ""
        self.devices: tuple[HostDevice, ...] = ()
        self.exported: Mapping[str, HostDevice] = {}
        self.problems: dict[str, str] = {}
        self.unmatched: tuple[Selector, ...] = ()
        self.settled = asyncio.Event()

    def reconfigure(self, selectors: Sequence[Selector]) -> None:
        """Replaces the selectors. From now on, no device is exported that none of them matches."""
        self._selectors = tuple(selectors)
        self._show()
        self.wake()

    def wake(self) -> None:
        """Makes run() read the devices again: one may have come, gone or become free."""
        self._woken.set()

    async def run(self) -> None:
        """Binds and unbinds devices until cancelled. Leaves the devices as they are then."""
        unsubscribe = self._host.subscribe(self.wake)
        try:
            while True:
                self._woken.clear()
                wait = RECHECK_S if await self._bind_and_unbind() else RETRY_S
                self.settled.set()
                if await done_within(self._clock, wait, self._woken.wait()):
                    await self._clock.sleep(SETTLE_S)
        finally:
            unsubscribe()

    async def _bind_and_unbind(self) -> bool:
        """Returns whether everything is as it should be, as far as another try could change it."""
        todo = await self._read()
        if todo is None:
            return False
        for busid in todo.unbind:
            await self._attempt(busid, self._unbind(busid))
        for busid in todo.renew:
            await self._attempt(busid, self._renew(busid))
        failed = self.problems.keys() & set(todo.bind)  # they come last, because they may take seconds
        for busids in (set(todo.bind) - failed, failed):
            for busid in sorted(busids):
                if not self._is_stuck(busid):
                    await self._attempt(busid, self._bind(busid))
            await self._read()
        return all(busid in todo.hubs or self._is_stuck(busid) for busid in self.problems)

    async def _read(self) -> BindPlan | None:
        """Reads the devices, and returns what is to be done; None if they cannot be read."""
        try:
            self.devices = await self._host.devices()
        except HostError as error:
            if str(error) != self._unreadable:
                log.warning("devices not readable", extra={"cause": str(error)})
            self._unreadable = str(error)
            return None
        self._unreadable = ""
        self._show()
        statuses = {device.busid: self._host.status(device.busid) for device in self.devices if device.is_bound}
        todo = plan(self.devices, statuses, self._selectors)
        for busid in todo.hubs:
            self._problem(busid, HUB)
        for busid in self.problems.keys() - {*todo.bind, *todo.renew, *todo.unbind, *todo.hubs}:
            del self.problems[busid]
        for selector in todo.unmatched:
            if selector not in self.unmatched:
                log.warning("selector matches no device", extra={"selector": str(selector)})
        self.unmatched = todo.unmatched
        return todo

    def _show(self) -> None:
        selected = (device for device in self.devices if device.is_bound and is_selected(device, self._selectors))
        self.exported = {device.busid: device for device in selected}

    async def _attempt(self, busid: str, action: Coroutine[object, object, None]) -> None:
        try:
            await action
        except HostError as error:
            self._problem(busid, error.cause if isinstance(error, BindFailed) else str(error))
            if isinstance(error, BindFailed) and error.stuck:
                self._stuck[busid] = self._occupation(busid)
        else:
            self.problems.pop(busid, None)

    async def _bind(self, busid: str) -> None:
        await self._host.bind(busid)
        log.info("device bound", extra={"busid": busid, "usb_id": self._usb_id(busid)})

    async def _renew(self, busid: str) -> None:
        log.warning("device in error state, binding it again", extra={"busid": busid, "usb_id": self._usb_id(busid)})
        await self._host.unbind(busid)
        await self._host.bind(busid)

    async def _unbind(self, busid: str) -> None:
        await self._host.unbind(busid)
        log.info("device unbound, not selected", extra={"busid": busid, "usb_id": self._usb_id(busid)})

    def _problem(self, busid: str, cause: str) -> None:
        if self.problems.get(busid) != cause:
            extra = {"busid": busid, "usb_id": self._usb_id(busid), "cause": cause}
            log.warning("device not exported", extra=extra)
        self.problems[busid] = cause

    def _usb_id(self, busid: str) -> str:
        return next((str(device.descriptor.usb_id) for device in self.devices if device.busid == busid), "")

    def _occupation(self, busid: str) -> tuple[int, str] | None:
        """Returns what changes when a driver lets a device go, or the device is replugged; None if it is gone."""
        found = (device for device in self.devices if device.busid == busid)
        return next(((device.descriptor.devnum, device.driver) for device in found), None)

    def _is_stuck(self, busid: str) -> bool:
        return busid in self._stuck and self._stuck[busid] == self._occupation(busid)
