"""The VhciDriver for the real kernel, which works through /sys/devices/platform/vhci_hcd.N."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from usbip_plugin.clock import Clock
from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    DetachFailed,
    DriverMissing,
    DriverNotWritable,
    HubRefused,
    InterfacesRefused,
    PortsExhausted,
    RecordNotWritable,
    VhciError,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Hold, InterfaceRules
from usbip_plugin.sync import Broadcast, OwnThreads
from usbip_plugin.vhci.children import Children
from usbip_plugin.vhci.devices import DeviceAttributes, DeviceNodes, read_attributes, read_nodes
from usbip_plugin.vhci.driver import (
    ABANDON_S,
    ASKED_CHILD_WAIT_S,
    CHILD_WAIT_S,
    DEFAULT_RULES,
    DriverReport,
    PortState,
)
from usbip_plugin.vhci.hubs import HubGuard
from usbip_plugin.vhci.interfaces import InterfaceGate, authorized_and_withheld, read_interfaces
from usbip_plugin.vhci.records import Record, Records, local_endpoint
from usbip_plugin.vhci.sysfs import (
    SAME_PORT,
    SPEED_SUPER,
    SPEED_SUPER_PLUS,
    Port,
    PortCooldown,
    PortStatus,
    PortTable,
    Writer,
    choose_port,
    controller_dir,
    device_dir,
    explain,
    format_attach,
    format_detach,
    hub_of,
    refusal,
    write_sysfs,
)
from usbip_plugin.vhci.uevents import Uevent, UeventSource, settle

log = logging.getLogger(__name__)

RECORDS = Path("/run/vhci_hcd")
"""Directory of the port records, shared by the `usbip` tool and the plugin."""

END_S = 0.05  # seconds of the enumeration timeout reserved for returning the nodes found so far
READ_S = 5.0  # seconds that reading the strings of a device may take; it takes microseconds in practice
ATTACH_TRIES = 4  # ports to try if another process takes the chosen port before the attach
_FD_BASE, _FD_SPAN = 100, 400  # lowest descriptor number of a socket for the kernel, and how much the clock may add


class SysfsVhci:
    """The VhciDriver that reads and writes sysfs.

    write: performs every write to sysfs; takes path and text, blocks, raises OSError.

    Two attachments of one port differ in (devid, sockfd) of their status row. The descriptor number of the socket
    depends on the time, so that two plugins on one kernel (as in kind) do not confuse their attachments.
    """

    def __init__(
        self,
        clock: Clock,
        uevents: UeventSource,
        *,
        sysfs: Path = Path("/sys"),
        records: Path = RECORDS,
        write: Callable[[Path, str], None] = write_sysfs,
    ) -> None:
        self._clock = clock
        self._uevents = uevents
        self._sysfs = sysfs
        self._attach_file = controller_dir(sysfs, 0) / "attach"
        self._detach_file = controller_dir(sysfs, 0) / "detach"
        self._table = PortTable(sysfs)
        self._records = Records(records)
        self._guard = HubGuard(sysfs, records, write)
        self._blocking_write = write
        self._writer = Writer(clock, write)
        self._interfaces = InterfaceGate(sysfs, records, write, self._writer)
        self._writing: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)  # by port: attach or detach under way
        self._cooldown = PortCooldown(clock)
        self._changed = Broadcast()
        self._children = Children(clock, self._changed)
        self._uevent_received = asyncio.Event()
        self._occupants: dict[int, tuple[int, int]] = {}
        self._free: dict[int, PortState] = {}
        self._fastest = SPEED_SUPER_PLUS  # the greatest speed that this kernel is known to take, or not to refuse
        self._recorded: Counter[int] = Counter()  # by port: how many records this process has written
        self._authorized: dict[int, int] = {}  # by port: number of the device that this process has authorised there
        self._attributes: dict[int, DeviceAttributes] = {}  # by port: of the device that was read there last
        self._reading: dict[int, asyncio.Future[DeviceAttributes | None]] = {}  # by port: reads of strings under way

    async def ports(self) -> tuple[PortState, ...]:
        rows = self._table.all()
        for port in self._interfaces.held() - {p.number for p in rows if p.status is not PortStatus.NULL}:
            self._interfaces.release(port)  # its connection has ended
        return tuple(self._free_state(p) if p.status is PortStatus.NULL else self._state(p) for p in rows)

    def _free_state(self, port: Port) -> PortState:
        """Returns the state of a free port from a cache: nearly all of hundreds of ports are free."""
        state = self._free.get(port.number)
        if state is None:
            state = self._free[port.number] = PortState(port.number, port.hub, port.status)
        return state

    def _state(self, port: Port) -> PortState:
        record = None if self._foreign(port) else self._records.read(port.number)
        if record is not None and not record.fits(port.occupant):
            record = None
        state = PortState(port.number, port.hub, port.status, port.speed, port.devid, port.local_busid)
        if record is None:
            return state
        by_plugin = record.occupant is not None
        return replace(
            state,
            record=record.key,
            by_plugin=by_plugin,
            import_from=record.import_from,
            usb_id=record.usb_id,
            holds=record.holds,
        )

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...] = ()) -> int:
        hub = hub_of(descriptor.speed)
        for _ in range(ATTACH_TRIES):
            ports = self._table.all()
            port = self._choose([port for port in ports if not self._writing[port.number].locked()], descriptor.speed)
            if port is None:
                raise PortsExhausted(hub, sum(p.hub == hub for p in ports))
            async with self._writing[port.number]:
                # another write may have waited for the port, and goes first: the port may be in use after it
                free = self._table.one(port.number).status is PortStatus.NULL
                if free and await self._attach_to(port, key, descriptor, fd, holds):
                    return port.number
        raise AttachRefused(f"{key}: other processes took {ATTACH_TRIES} {hub} ports in a row; try again")

    def _choose(self, ports: Sequence[Port], speed: int) -> Port | None:
        lingering: set[int] = set()  # free ports whose last device has not left sysfs yet

        def penalty(port: Port) -> int:
            return SAME_PORT if port.number in lingering else self._cooldown.penalty(port)

        while (port := choose_port(ports, speed, penalty)) is not None and port.number not in lingering:
            device = device_dir(self._sysfs, port)
            if device is None or not device.exists():
                return port
            lingering.add(port.number)
        return port

    async def _attach_to(
        self, port: Port, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...]
    ) -> bool:
        """Attaches the device, or leaves nothing behind. Returns False if it is to be tried again.

        That is if another process took the port first, or if this kernel refused the device's speed for the first time:
        a SuperSpeedPlus device is attached as SuperSpeed from then on. Only the rate in its sysfs differs.
        """
        speed = min(descriptor.speed, self._fastest)
        # Use a duplicate: a cancelled caller may close its own descriptor at once, while the write is still going on.
        own = _duplicate(fd, _FD_BASE + int(self._clock.monotonic() * 1000) % _FD_SPAN)
        handed_over = done = False
        try:
            text = format_attach(port.number, own, descriptor.devid, speed)
            record = Record(key, (descriptor.devid, own), local_endpoint(own), False, descriptor.usb_id, holds)
            self._write_record(port.number, record)
            self._guard_hub(port)
            undo = functools.partial(self._undo_attach, port.number)
            handed_over = True
            close = functools.partial(os.close, own)
            await self._writer.write(self._attach_file, text, device=port.number, finish=close, undo=undo)
            self._occupants[port.number] = (descriptor.devid, own)
            done = True
        except OSError as error:
            if error.errno == errno.EBUSY or (
                error.errno in (errno.EINVAL, errno.EAGAIN)
                and self._table.one(port.number).status is not PortStatus.NULL
            ):
                return False
            if error.errno == errno.EINVAL and speed == SPEED_SUPER_PLUS:
                self._fastest = SPEED_SUPER
                log.info("kernel refuses SuperSpeedPlus, attaching as SuperSpeed", extra={"device": str(key)})
                return False
            refused = AttachRefused(f"the kernel refused to attach {key} to port {port.number}: {error.strerror}")
            raise explain(error, self._attach_file, refused) from error
        except ValueError as error:
            raise AttachRefused(str(error)) from error
        finally:
            if not handed_over:
                os.close(own)
            if not done:
                self._forget(port.number, only=key)
        return True

    def _guard_hub(self, port: Port) -> None:
        """Raises AttachRefused or DriverNotWritable if the hub of the port would authorise a device by itself."""
        try:
            self._guard.hold(port)
        except OSError as error:
            cause = f"its root hub cannot be kept from authorising devices: {error.strerror or error}"
            refused = AttachRefused(f"nothing is attached to port {port.number}: {cause}")
            raise explain(error, Path(error.filename or "authorized_default"), refused) from error

    def _undo_attach(self, port: int) -> None:
        try:
            self._blocking_write(self._detach_file, format_detach(port))
        except OSError as error:
            log.warning("attach not undone", extra={"port": port, "cause": str(error)})

    def _write_record(self, port: int, record: Record) -> None:
        self._recorded[port] += 1
        self._occupants.pop(port, None)
        try:
            self._records.write(port, record)
        except OSError as error:
            raise RecordNotWritable(str(self._records.path(port)), error) from error

    def _forget(self, port: int, only: DeviceKey | None = None) -> None:
        self._occupants.pop(port, None)
        self._attributes.pop(port, None)
        self._authorized.pop(port, None)
        self._guard.release(port)
        self._interfaces.release(port)
        self._records.remove(port, only)

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
        deadline = self._clock.monotonic() + timeout
        child_wait = CHILD_WAIT_S if children is None else children_timeout
        try:
            async with self._clock.timeout(timeout):
                while True:
                    device, attributes = await self._verified(key, descriptor, port, serial, rules, timeout)
                    left = max(0.0, deadline - self._clock.monotonic() - END_S)
                    found = await self._children.wait(device, attributes, children, min(child_wait, left))
                    if found.nodes:  # otherwise the device has gone or enumerated again, and is verified again
                        self._guard.release(port)
                        return _attachment(key, port, device, attributes, found)
        except (AttachStuck, WrongDevice, WrongSerial, HubRefused, InterfacesRefused, DriverNotWritable):
            await self.detach(port, timeout=ABANDON_S)
            raise
        except TimeoutError:
            await self.detach(port, timeout=ABANDON_S)
            raise AttachStuck(f"{key} on port {port} did not enumerate within {timeout:g} s") from None

    async def _verified(
        self,
        key: DeviceKey,
        descriptor: Descriptor,
        port: int,
        serial: str | None,
        rules: InterfaceRules,
        timeout: float,
    ) -> tuple[Path, DeviceAttributes]:
        device, attributes = await self._changed.until_within(
            lambda: self._appeared(port), self._clock, timeout=timeout
        )
        if attributes.authorized and self._authorized.get(port) != attributes.devnum:
            raise AttachStuck(f"{key} on port {port}: another process has authorised it before it was verified")
        if attributes.usb_id != descriptor.usb_id:
            raise WrongDevice(key, descriptor.usb_id, attributes.usb_id)
        if serial is not None and attributes.serial != serial:
            raise WrongSerial(key, serial, attributes.serial or "", descriptor.devid)
        try:
            interfaces = read_interfaces(device)
            if interfaces.is_hub:
                raise HubRefused(key)
            withheld = self._interfaces.withheld(key, interfaces, rules)
            if withheld:
                self._records.change(port, key, unfinished=True)
            row = self._table.one(port)
            await self._interfaces.authorize(key, row, device, interfaces, rules, withheld=withheld)
            if withheld:
                self._records.change(port, key, unfinished=False)
        except OSError as error:
            stuck = AttachStuck(f"{key} on port {port} could not be authorised: {error.strerror}")
            raise explain(error, Path(error.filename or device / "authorized"), stuck) from error
        self._authorized[port] = attributes.devnum
        return device, attributes

    def _appeared(self, number: int) -> tuple[Path, DeviceAttributes] | None:
        port = self._table.one(number)
        if port.status is PortStatus.NULL or self._foreign(port):
            self._cooldown.mark(port)
            raise AttachStuck(f"the connection of port {number} ended before its device had enumerated")
        if port.status is PortStatus.ERROR:
            raise AttachStuck(f"port {number} went into the error state while its device enumerated")
        device = device_dir(self._sysfs, port)
        if port.status is not PortStatus.USED or port.local_busid is None or device is None:
            return None
        attributes = read_attributes(device)  # no driver has the device's lock before it is authorised
        if attributes is None:
            return None
        self._attributes[number] = attributes
        return device, attributes

    async def inspect(self, key: DeviceKey, port: int) -> Attachment | None:
        row = self._table.one(port)
        device = device_dir(self._sysfs, row)
        if row.occupant is None or row.local_busid is None or device is None or self._foreign(row):
            return None
        now = read_attributes(device, strings=False)
        if now is None or not now.authorized:
            return None
        attributes = self._attributes.get(port)
        if attributes is None or not attributes.is_same_device(now):
            attributes = await self._read_strings(port, device)
            if attributes is None or not attributes.is_same_device(now) or self._table.one(port) != row:
                return None
            self._attributes[port] = attributes
        if not (found := read_nodes(device, attributes)).nodes:
            return None
        if (record := self._records.read(port)) is not None and record.unfinished:
            return None
        self._occupants[port] = row.occupant
        return _attachment(key, port, device, attributes, found)

    async def _read_strings(self, port: int, device: Path) -> DeviceAttributes | None:
        """Returns the attributes with their strings, or None if the device keeps its lock for READ_S. Cancel-safe."""
        reading = self._reading.get(port)
        if reading is None:
            thread = OwnThreads(f"strings {port}")
            reading = asyncio.get_running_loop().run_in_executor(thread, read_attributes, device)
            self._reading[port] = reading
            reading.add_done_callback(lambda _read: self._reading.pop(port))
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(READ_S):
                return await asyncio.shield(reading)
        return None

    def _foreign(self, port: Port) -> bool:
        known = self._occupants.get(port.number)
        return known is not None and port.occupant is not None and port.occupant != known

    async def detach(self, port: int, *, timeout: float) -> None:
        recorded = self._recorded[port]
        try:
            async with self._clock.timeout(timeout):
                await self._detach(port, timeout)
        except TimeoutError:
            raise DetachFailed(f"port {port} was not free after {timeout:g} s") from None
        if self._recorded[port] == recorded:  # otherwise the record already belongs to the next device on this port
            self._forget(port)

    async def note_holds(self, key: DeviceKey, port: int, holds: tuple[Hold, ...]) -> None:
        try:
            if not self._foreign(self._table.one(port)):
                self._records.change(port, key, holds=holds)
        except OSError as error:
            raise RecordNotWritable(str(self._records.path(port)), error) from error
        except ValueError as error:  # the API server gave a Lease a uid that a record cannot hold
            raise RecordNotWritable(str(self._records.path(port)), OSError(errno.EINVAL, str(error))) from error

    async def forget(self, key: DeviceKey) -> None:
        for port in self._records.ports():
            self._records.remove(port, only=key)

    async def _detach(self, number: int, timeout: float) -> None:
        async with self._writing[number]:
            before = self._table.one(number)
            if self._foreign(before):
                return
            device = device_dir(self._sysfs, before)
            old = None if device is None else read_attributes(device, strings=False)
            if before.status is not PortStatus.NULL:
                await self._write_detach(number)
            if before.status is PortStatus.NOTASSIGNED:
                self._cooldown.mark(before)
        free = before.status is PortStatus.NULL

        def gone() -> bool | None:
            nonlocal free
            now = self._table.one(number)
            free = free or now.status is PortStatus.NULL or _replaced(before, now)
            if not free:
                return None
            left = None if device is None or old is None else read_attributes(device, strings=False)
            return None if left is not None and old is not None and left.devnum == old.devnum else True

        await self._changed.until_within(gone, self._clock, timeout=timeout)

    async def _write_detach(self, port: int) -> None:
        try:
            await self._writer.write(self._detach_file, format_detach(port), device=port)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the port has become free (NULL) by itself
                refused = DetachFailed(f"the kernel refused to detach port {port}: {error.strerror}")
                raise explain(error, self._detach_file, refused) from error

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._changed.subscribe(callback)

    async def run(self) -> None:
        self._review_records()
        self._guard.restore_leftovers()
        self._interfaces.restore_leftovers()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._uevents.run(self._on_uevent))
            group.create_task(settle(self._changed, self._uevent_received, self._clock))

    def _review_records(self) -> None:
        """Removes the records of earlier processes for ports that are free, or that another process has taken since.

        Keeps those interfaces withheld that an earlier process has withheld from a device that is still attached.
        """
        with contextlib.suppress(VhciError):
            rows = {port.number: port for port in self._table.all()}
            for number in self._records.ports():
                row, record = rows.get(number), self._records.read(number)
                if row is None or record is None or number in self._recorded:
                    continue
                if row.status is PortStatus.NULL or not record.fits(row.occupant):
                    self._records.remove(number)
                elif record.occupant is not None:
                    self._keep_withheld(row)

    def _keep_withheld(self, port: Port) -> None:
        device = device_dir(self._sysfs, port)
        try:
            if device is not None:
                self._interfaces.hold_withheld(port, device)
        except OSError as error:
            extra = {"port": port.number, "file": error.filename, "cause": str(error)}
            log.warning("interface_authorized_default not set", extra=extra)

    def _on_uevent(self, event: Uevent | None) -> None:
        if event is not None:
            if not event.concerns_vhci:
                return
            self._children.note_disk(event)
        self._uevent_received.set()
        self._changed.fire()

    async def check(self) -> DriverReport:
        try:
            ports = self._table.all()
        except VhciError as error:
            return DriverReport(loaded=not isinstance(error, DriverMissing), problems=(str(error),))
        files = (self._attach_file, self._detach_file)
        reasons = ((path, refusal(path)) for path in files)
        refused = next((DriverNotWritable(str(path), why) for path, why in reasons if why is not None), None)
        records_writable = self._records.writable()
        no_uevents = self._uevents.problem()
        problems = (
            None if refused is None else str(refused),
            None if records_writable else "port records cannot be written; mount /run/vhci_hcd writable",
            no_uevents,
            self._interfaces.problem(),
        )
        hs, ss = ([p for p in ports if p.hub == hub] for hub in ("hs", "ss"))
        return DriverReport(
            loaded=True,
            nports=len(ports),
            hs_total=len(hs),
            hs_free=sum(p.status is PortStatus.NULL for p in hs),
            ss_total=len(ss),
            ss_free=sum(p.status is PortStatus.NULL for p in ss),
            attach_writable=refused is None,
            records_writable=records_writable,
            uevents=no_uevents is None,
            problems=tuple(problem for problem in problems if problem is not None),
        )


def _attachment(
    key: DeviceKey, port: int, device: Path, attributes: DeviceAttributes, found: DeviceNodes
) -> Attachment:
    strings = attributes.manufacturer, attributes.model
    return Attachment(
        *(key, port, device.name, attributes.usb_id, attributes.serial, found.nodes),
        *(*strings, found.net),
        *authorized_and_withheld(device),
    )


def _duplicate(fd: int, lowest: int) -> int:
    """Returns a duplicate of fd with a number of at least lowest, or any number if the process limit is below that."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.dup(fd)


def _replaced(before: Port, now: Port) -> bool:
    """Returns whether the port has another attachment now than before, and so was free in between."""
    return before.occupant is not None and now.status is not PortStatus.ERROR and now.occupant != before.occupant
