"""VhciDriver on a simulated kernel. Several nodes may share one kernel, as they do in kind."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import replace

from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    DetachFailed,
    DriverMissing,
    InterfacesRefused,
    PortsExhausted,
    RecordNotWritable,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Hold, InterfaceRules
from usbip_plugin.vhci.driver import ABANDON_S, ASKED_CHILD_WAIT_S, DEFAULT_RULES, DriverReport, PortState
from usbip_plugin.vhci.sysfs import Port, PortStatus, choose_port, hub_of
from usbip_sim.kernel.ports import SimulatedKernel


class SimulatedVhci:
    """VhciDriver of one node on a simulated kernel. A new one for the same node stands for a restarted plugin.

    node: name among the nodes that share the kernel; each node has its own port records.
    """

    def __init__(self, kernel: SimulatedKernel, node: str = "node") -> None:
        self._kernel = kernel
        self._node = node
        self._known: dict[int, int] = {}
        for number in [number for number in self._records if self._stale(number)]:
            del self._records[number]

    @property
    def _records(self) -> dict[int, DeviceKey]:
        return self._kernel.records.setdefault(self._node, {})

    def _stale(self, number: int) -> bool:
        """Returns whether the port's record is for another device than the one on the port."""
        occupant = self._kernel.occupant(number)
        return occupant is None or occupant.recorded_by != self._node

    def _ports(self) -> tuple[Port, ...]:
        if not self._kernel.loaded:
            raise DriverMissing("/sys/devices/platform/vhci_hcd.0")
        return self._kernel.ports()

    def _foreign(self, number: int) -> bool:
        occupant = self._kernel.occupant(number)
        return occupant is not None and self._known.get(number, occupant.number) != occupant.number

    async def ports(self) -> tuple[PortState, ...]:
        return self.ports_now()

    def ports_now(self) -> tuple[PortState, ...]:
        """Returns the ports, for observers of the simulation that cannot await ports()."""
        return tuple(self._state(port) for port in self._ports())

    def _state(self, port: Port) -> PortState:
        ours = not self._stale(port.number) and not self._foreign(port.number)
        record = self._records.get(port.number) if ours else None
        state = PortState(port.number, port.hub, port.status, port.speed, port.devid, port.local_busid)
        occupant = self._kernel.occupant(port.number)
        if record is None or occupant is None or occupant.descriptor is None:
            return state
        return replace(
            state,
            record=record,
            by_plugin=True,
            import_from=occupant.import_from,
            usb_id=occupant.descriptor.usb_id,
            holds=occupant.holds,
        )

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...] = ()) -> int:
        ports = self._ports()
        port = choose_port(ports, descriptor.speed)
        if port is None:
            hub = hub_of(descriptor.speed)
            raise PortsExhausted(hub, sum(p.hub == hub for p in ports))
        self._check_writable(port.number)
        try:
            occupant = self._kernel.attach(port, descriptor, fd)
        except OSError as error:
            raise AttachRefused(
                f"the kernel refused to attach {key} to port {port.number}: {error.strerror}"
            ) from error
        occupant.serial = self._kernel.serial_of(key)
        if key in self._kernel.mute:
            occupant.appears_at = float("inf")
        self._known[port.number] = occupant.number
        self._records[port.number] = key
        occupant.recorded_by, occupant.holds = self._node, holds
        return port.number

    async def enumerate(
        self,
        key: DeviceKey,
        descriptor: Descriptor,
        port: int,
        *,
        children: tuple[str, ...] | None = None,
        children_timeout: float = ASKED_CHILD_WAIT_S,
        serial: str | None = None,
        rules: InterfaceRules = DEFAULT_RULES,
        timeout: float,
    ) -> Attachment:
        deadline = self._kernel.clock.monotonic() + timeout
        try:
            await self._kernel.changed.until_within(lambda: self._appeared(port), self._kernel.clock, timeout=timeout)
        except TimeoutError:
            await self.detach(port, timeout=ABANDON_S)
            raise AttachStuck(f"{key} on port {port} did not enumerate within {timeout:g} s") from None
        except AttachStuck:
            await self.detach(port, timeout=ABANDON_S)
            raise
        await self._check_id(key, descriptor, port)
        occupant = self._kernel.occupant(port)
        if occupant is not None and None not in (serial, occupant.serial) and occupant.serial != serial:
            await self.detach(port, timeout=ABANDON_S)
            raise WrongSerial(key, serial or "", occupant.serial or "", descriptor.devid)
        if occupant is not None:
            settings = [(interface,) for interface in occupant.known_interfaces]
            if settings and (problem := rules.problem(descriptor.device_class, settings)) is not None:
                await self.detach(port, timeout=ABANDON_S)
                raise InterfacesRefused(f"{key} {problem}")
            occupant.withheld = frozenset(number for number, one in enumerate(settings) if not rules.allows(one))
            occupant.authorized = True
            limit = max(0.0, min(children_timeout, deadline - self._kernel.clock.monotonic()))
            with contextlib.suppress(TimeoutError):  # kinds without a driver never appear
                await self._kernel.changed.until_within(
                    lambda: self._kernel.bring(port, children or ()),
                    self._kernel.clock,
                    timeout=limit,
                    recheck=limit + 1,
                )
            await self._check_id(key, descriptor, port)
        attachment = self._kernel.attachment(key, port)
        if attachment is None:
            raise AttachStuck(f"{key} on port {port} disappeared while it was probed")
        return attachment

    async def _check_id(self, key: DeviceKey, descriptor: Descriptor, port: int) -> None:
        occupant = self._kernel.occupant(port)
        if occupant is not None and occupant.usb_id != descriptor.usb_id:
            await self.detach(port, timeout=ABANDON_S)
            raise WrongDevice(key, descriptor.usb_id, occupant.usb_id)

    def _appeared(self, number: int) -> bool | None:
        status = self._ports()[number].status
        if status is PortStatus.NULL or self._foreign(number):
            raise AttachStuck(f"the connection of port {number} ended before its device had enumerated")
        return True if status is PortStatus.USED else None

    async def inspect(self, key: DeviceKey, port: int) -> Attachment | None:
        self._ports()
        occupant = self._kernel.occupant(port)
        attachment = self._kernel.attachment(key, port)
        if occupant is None or attachment is None or self._foreign(port):
            return None
        self._known[port] = occupant.number
        return attachment

    async def detach(self, port: int, *, timeout: float) -> None:
        self._ports()
        if self._kernel.detaching_hangs and self._kernel.occupant(port) is not None and not self._foreign(port):
            await self._kernel.clock.sleep(timeout)
            raise DetachFailed(f"port {port} was not free after {timeout:g} s")
        if not self._foreign(port):
            self._kernel.free_port(port)
        self._known.pop(port, None)
        self._records.pop(port, None)

    async def note_holds(self, key: DeviceKey, port: int, holds: tuple[Hold, ...]) -> None:
        occupant = self._kernel.occupant(port)
        if occupant is not None and not self._stale(port) and self._records.get(port) == key:
            self._check_writable(port)
            occupant.holds = holds

    def _check_writable(self, port: int) -> None:
        if self._kernel.records_failing is not None:
            error = OSError(self._kernel.records_failing, os.strerror(self._kernel.records_failing))
            raise RecordNotWritable(f"/run/vhci_hcd/port{port}", error)

    async def forget(self, key: DeviceKey) -> None:
        for port in [port for port, record in self._records.items() if record == key]:
            del self._records[port]

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._kernel.changed.subscribe(callback)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def check(self) -> DriverReport:
        if not self._kernel.loaded:
            return DriverReport(loaded=False, problems=(str(DriverMissing("/sys/devices/platform/vhci_hcd.0")),))
        ports = self._ports()
        hs, ss = ([p for p in ports if p.hub == hub] for hub in ("hs", "ss"))
        return DriverReport(
            loaded=True,
            nports=len(ports),
            hs_total=len(hs),
            hs_free=sum(p.status is PortStatus.NULL for p in hs),
            ss_total=len(ss),
            ss_free=sum(p.status is PortStatus.NULL for p in ss),
            attach_writable=True,
            records_writable=True,
            uevents=True,
        )
