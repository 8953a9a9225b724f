"""Attaches one device in steps (lock, import, attach, device nodes), detaches it, and probes it.

Each call works on one device and must be made under that device's mutex. The caller decides when to call, and what
happens after a failure. Each step is a span. R1 to R6 are the lock rules of docs/internals/architecture.md.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.claim_locks import ClaimLocks
from usbip_plugin.attach.events import EventSink, taken_over
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimEvent, ClaimState, Resources
from usbip_plugin.clock import Clock, Jitter
from usbip_plugin.config.schema import ResourceConfig
from usbip_plugin.config.selectors import allowed_interfaces, may_select, selector_for
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import (
    AttachStuck,
    DeviceBusy,
    LockError,
    LockHeld,
    NodesMissing,
    UsbipError,
    VhciError,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.locks.manager import Grant, LockManager
from usbip_plugin.locks.protocol import LockMeta
from usbip_plugin.model import (
    Attachment,
    Descriptor,
    DeviceKey,
    Identity,
    InterfaceRules,
    ServerKey,
    described,
)
from usbip_plugin.observe.spans import device_attributes, span
from usbip_plugin.observe.tracing import span_context_from
from usbip_plugin.usbip.client import Imported, UsbipClient
from usbip_plugin.usbip.connect import Source
from usbip_plugin.usbip.poller import ServerFlaw
from usbip_plugin.vhci.children import missing
from usbip_plugin.vhci.driver import PortState, VhciDriver
from usbip_plugin.vhci.sysfs import PortStatus

log = logging.getLogger(__name__)


def own_port(location: DeviceKey, ports: Sequence[PortState], number: int | None) -> PortState | None:
    """Returns the port whose record names the device at this location, in use or stuck, or None.

    A port without such a record is not this node's: in kind (Kubernetes in Docker) several nodes share one kernel, and
    people attach devices by hand.

    number: the port to which the search is limited; None for all ports.
    """
    for port in ports:
        if port.record == location and number in (None, port.number) and port.status is not PortStatus.NULL:
            return port
    return None


def with_usb_id(claim: Claim, resource: ResourceConfig, descriptor: Descriptor) -> Claim | None:
    """Returns the claim on a device that has another USB ID by now, or None if its resource does not select that.

    A boot loader seldom has the serial number of the program, so only one that the selector names is expected then.
    """
    entry = selector_for(resource, claim.location, descriptor, Identity(serial=claim.serial))
    if entry is None:
        return None
    return replace(claim, usb_id=descriptor.usb_id, serial=entry.selector.serial)


def interface_rules(resource: ResourceConfig, claim: Claim, descriptor: Descriptor) -> InterfaceRules:
    """Returns which interfaces the resource allows the claim's device. descriptor: as imported, perhaps elsewhere."""
    offered = replace(descriptor, busid=claim.key.busid)
    had = claim.allocated_as.interfaces if claim.allocated_as is not None else ()
    return allowed_interfaces(resource, claim.key, offered, Identity(serial=claim.serial), had)


BUSY_ATTEMPTS = 4
"""Most tries to import a busy device. They span at least 0.7 s: a reset in usbip-host takes about 0.3 s."""
BUSY_FIRST_WAIT = 0.1
"""Seconds between the first two tries to import a busy device; also the most jitter that each wait gets."""
BUSY_MAX_WAIT = 0.4
"""Longest wait in seconds, without jitter, between two tries to import a busy device."""


def import_busy(clock: Clock, rng: random.Random) -> AsyncRetrying:
    """Returns the retries for the import of a busy device whose lock names this node.

    After a client leaves, usbip-host resets the device and answers busy for about 0.3 s.
    """
    return AsyncRetrying(
        retry=retry_if_exception_type(DeviceBusy),
        stop=stop_after_attempt(BUSY_ATTEMPTS),
        wait=wait_exponential(BUSY_FIRST_WAIT, BUSY_MAX_WAIT) + Jitter(rng, BUSY_FIRST_WAIT),
        sleep=clock.sleep,
        reraise=True,
    )


FIRST_TRY_TIME = 6.0
"""Seconds that the first try of a short Allocate waits from the attach write until the device and its nodes are there.

A disk takes 1.3 s. The kernel waits 5 s for the first descriptor before it asks again.
"""
SECOND_TRY_TIME = 3.0
"""Seconds of an Allocate that the first try leaves to the second. A disk takes 1.3 s."""


def first_try_timeout(left: float, extra: float) -> float:
    """Returns how many seconds the first of two tries may wait for a device to enumerate.

    A slow device looks like a port that stuck in status 005 (used, no address). So the first try gets nearly all of the
    Allocate's time, but not less than a usual device needs.

    left: seconds left of the Allocate. extra: seconds by which childrenTimeout exceeds its default.
    """
    return min(left, max(left - SECOND_TRY_TIME, FIRST_TRY_TIME + extra))


DETACH_TIMEOUT = 5.0
"""Longest time in seconds until a port is free after a detach write; measured 13-29 ms."""
PROBE_TIMEOUT = 4.0
"""Longest time in seconds for each step of a probe, import and reading; less than the import window (R1)."""
BIND_TIMEOUT = 3.0
"""Longest time in seconds to find the server's address and to bind the source port of an import."""


class Progress:
    """The step of an attach that is under way, for the error after a timeout.

    doing: the step in words. at_device: whether it waits for the device or its server.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.at_device = False


class Pipeline:
    """Attaches, re-attaches, detaches and probes single devices, and updates their claims.

    on_step(name, seconds) is called after each step that has succeeded, with the time it took.
    on_flaw(server, flaw) is called when a server refuses as busy what it has just listed as free for a takeover.
    """

    def __init__(
        self,
        context: NodeContext,
        *,
        client: UsbipClient,
        driver: VhciDriver,
        locks: LockManager,
        specs: CdiSpecs,
        tasks: DeviceTasks,
        resources: Resources,
        events: EventSink,
        on_step: Callable[[str, float], None],
        on_flaw: Callable[[ServerKey, ServerFlaw], None],
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._rng = context.rng
        self._tracer = context.tracer
        self._client = client
        self._driver = driver
        self._locks = locks
        self._specs = specs
        self._tasks = tasks
        self._book = tasks.book
        self._resources = resources
        self._events = events
        self._claim_locks = ClaimLocks(context, locks, tasks.book)
        self._on_step = on_step
        self._on_flaw = on_flaw

    async def attach_new(
        self, claim: Claim, identity: Identity | None, deadline: float, progress: Progress
    ) -> Attachment:
        """Takes a claim from Free to Attached. After an error the claim stays in the book in the state it had reached.

        Only LockHeld leaves no claim: nothing was touched. Raises LockError, UsbipError, VhciError or CdiError. Before
        WrongSerial is raised, the serial number found is written to the lock, while no other node can have the device.

        identity: what the server's list has about the device, to be written to its lock.
        deadline: bounds import and enumeration, in seconds on the monotonic clock. The caller bounds the whole.
        """
        self._book.move(claim, ClaimEvent.ALLOCATE)
        progress.doing, progress.at_device = f"looking for USB/IP server {claim.key.server}", True
        with contextlib.closing(await self._bind(claim.key)) as source:
            return await self._attach_new(claim, identity, source, deadline, progress)

    async def _attach_new(
        self, claim: Claim, identity: Identity | None, source: Source, deadline: float, progress: Progress
    ) -> Attachment:
        progress.doing, progress.at_device = "locking the device (API server)", False
        with self.span("lock", claim.key):
            meta = LockMeta(str(claim.usb_id), identity, claim.traceparent, import_from=source.endpoint)
            try:
                grant = await self._locks.acquire(claim.key, meta)
            except LockHeld:
                self._book.move(self._book[claim.id], ClaimEvent.DENIED)
                raise
        if grant.former is not None:
            allocate = trace.get_current_span()
            allocate.set_attribute("usbip.lock.former_holder", grant.former.holder)
            if (former := span_context_from(grant.former.traceparent)) is not None:
                allocate.add_link(former)
            log.warning("lock taken over", extra={"device": str(claim.key), "former_holder": grant.former.holder})
            self._events(taken_over(claim.key, grant.former, self._me.node))
        self._book.move(self._book[claim.id], ClaimEvent.LOCKED)
        try:
            try:
                return await self._attach(claim.id, grant, source, deadline, progress, second_try=True)
            except AttachStuck:  # the port stuck in status 005 (used, no address) and is free again: one more try
                with contextlib.closing(await self._bind(claim.key)) as another:
                    # the failed try may have used up the import window of the first write: R1 requires a new write
                    renewed = await self._locks.renew(claim.key, replace(meta, import_from=another.endpoint))
                    return await self._attach(claim.id, renewed, another, deadline, progress)
        except DeviceBusy:
            if grant.former is not None:
                self._on_flaw(claim.key.server, ServerFlaw.LISTS_IN_USE)
            raise
        except WrongSerial as wrong:
            await self._tasks.record_identity(claim.key, Identity(wrong.devid, wrong.found))
            raise

    async def reattach(self, device_id: str, deadline: float, *, wait_for_list: bool = False) -> Attachment:
        """Makes one try to take a claim from Reattaching to Attached, under a new write of its lock (R1).

        Attaches the device from the claim's location, and writes the lock of that location too. If the device is still
        attached, because only its lock was lost or its CDI spec could not be written, only these are written again.
        Raises the errors of attach_new, LockLost if the claim's lock names another holder, LockHeld if another node
        holds the lock of the location, and LockReleased if a person has released that.

        deadline: bounds import and enumeration, in seconds on the monotonic clock.
        wait_for_list: whether a device with another USB ID, which may be another device, must first be listed so.
        """
        if (now := await self.still_attached(device_id)) is not None:
            return await self._keep(device_id, now)
        await self.detach(device_id)
        claim = self._book[device_id]
        with contextlib.closing(await self._bind(claim.location, claim)) as source:
            grant = await self._claim_locks.write_again(self._book[device_id], source.endpoint)
            claim = self._book[device_id]
            if claim.moved_to is not None:
                second = await self._claim_locks.write_location(claim, source.endpoint)
                grant = replace(second, import_deadline=min(grant.import_deadline, second.import_deadline))
            return await self._attach(device_id, grant, source, deadline, Progress(""), wait_for_list=wait_for_list)

    async def take_lock_again(self, device_id: str) -> None:
        """Takes the lock of a Reattaching claim again if it no longer names this node. The device may be away.

        Otherwise another node may read the device that is at this bus ID now, and write its serial number to the lock:
        after a reboot nothing would say which device the pod had. Raises the errors of reattach().
        """
        claim = self._book[device_id]
        if not self._claim_locks.is_mine(device_id):
            with contextlib.closing(await self._bind(claim.location, claim)) as source:
                await self._claim_locks.write_again(claim, source.endpoint)

    async def _bind(self, location: DeviceKey, claim: Claim | None = None) -> Source:
        """Binds the source port for an import from this location, before the lock that names it is written (R1).

        That of the last import is bound again if possible: the server may not know that its connection is dead.
        """
        lock = self._locks.locks.get(location.id)
        last = lock.import_from if lock is not None else None
        if last is None and claim is not None:
            last = claim.import_from  # the Lease was deleted
        source = await self._client.bind(location.server, last, timeout=BIND_TIMEOUT)
        before = claim.import_from if claim is not None else None
        if before is not None and before == last and before.address != source.endpoint.address:
            extra = {"device": str(location), "before": before.address, "now": source.endpoint.address}
            log.warning("own address has changed, an old connection to the server cannot be ended", extra=extra)
        return source

    async def still_attached(self, device_id: str) -> Attachment | None:
        """Returns the attachment of a claim as it is now, or None if the device is not attached any more.

        Raises VhciError.
        """
        claim = self._book[device_id]
        if claim.port is None or claim.attachment is None:
            return None
        return await self.current_attachment(claim, await self._driver.ports())

    async def _keep(self, device_id: str, now: Attachment) -> Attachment:
        """Takes the locks of a live attachment again, where they are lost, and hands the device out as it is (R6)."""
        claim = self._book[device_id]
        taken = await self._claim_locks.take_back(claim)
        port = own_port(claim.location, await self._driver.ports(), now.port) if taken else None
        if port is not None:
            await self.note_holds(device_id, port)
        attachment = self._hand_out(device_id, now)
        for key in taken:
            log.warning("lock taken again, device kept attached", extra={"device": str(key)})
            self._tasks.note_port(key, now.port, now.usb_id)
            if now.serial is not None and port is not None:
                self._tasks.note_identity(key, Identity(port.devid, now.serial))
        return attachment

    async def correct_locks(self, device_id: str) -> None:
        """Writes to the locks of an attached device all that they record of it, and the locks to its port record.

        To be called when a restore of etcd may have set a lock back. Raises LockLost or LockUnavailable.
        """
        await self.note_holds(device_id)
        await self._claim_locks.correct(self._book[device_id])

    async def note_holds(self, device_id: str, port: PortState | None = None) -> None:
        """Writes the locks of an attached device to its port record, if that has others. Logs a failure.

        port: the device's port as it is now; None to look.
        """
        claim = self._book[device_id]
        holds = self._claim_locks.holds(claim)
        try:
            port = port or own_port(claim.location, await self._driver.ports(), claim.port)
            if port is not None and port.holds != holds:
                await self._driver.note_holds(claim.location, port.number, holds)
        except VhciError as error:
            log.warning("port record out of date", extra={"device": str(claim.key), "cause": str(error)})

    async def detach_from_location(self, device_id: str, *, detached: bool = False) -> None:
        """Detaches the device from the claim's moved_to, releases the lock of that location (R5) and unsets moved_to.

        Does nothing if moved_to is None. Raises VhciError or LockUnavailable; moved_to stays as it is then.

        detached: whether detach() has freed the claim's port already.
        """
        location = self._book[device_id].moved_to
        if location is not None:
            detached = await self.detach(device_id) or detached
            await self._locks.release(location, left=self.is_left(device_id, detached=detached))
            self._book.put(replace(self._book[device_id], moved_to=None))

    def is_left(self, device_id: str, *, detached: bool) -> bool:
        """Returns whether the server may still export the device to a dead connection, see LockManager.release().

        detached: whether the device was detached here just now, which ends its connection.
        """
        return not detached and self._book[device_id].import_from is not None

    async def _attach(
        self,
        device_id: str,
        grant: Grant,
        source: Source,
        deadline: float,
        progress: Progress,
        *,
        second_try: bool = False,
        wait_for_list: bool = False,
    ) -> Attachment:
        """second_try: whether a second try follows an AttachStuck, for which this one leaves time."""
        claim = replace(self._book[device_id], import_from=source.endpoint)
        self._book.put(claim)
        key = claim.location
        progress.doing, progress.at_device = f"importing {key.busid} from USB/IP server {key.server}", True
        with self.span("import", key, SpanKind.CLIENT) as step:
            step.set_attributes({"server.address": key.server.host, "server.port": key.server.port})
            step.set_attributes({"network.transport": "tcp", "network.protocol.name": "usbip"})
            imported = await self._import(claim, grant, source, deadline)
        source.close()
        try:
            if imported.descriptor.usb_id != claim.usb_id:
                self._accept_usb_id(self._book[device_id], imported.descriptor, wait_for_list=wait_for_list)
            if claim.state is ClaimState.IMPORTING:
                self._book.move(self._book[device_id], ClaimEvent.IMPORTED)
            progress.doing = f"attaching {key} to vhci_hcd"
            with self.span("attach", key) as step:
                holds = self._claim_locks.holds(claim)
                port = await self._driver.attach(key, imported.descriptor, imported.sock.fileno(), holds)
                step.set_attribute("usbip.vhci.port", port)
        finally:
            imported.close()
        # until the device has enumerated, only its port is known
        self._book.put(replace(self._book[device_id], port=port, attachment=None))
        # the kernel enumerates meanwhile, which takes far longer
        for locked in dict.fromkeys((claim.key, key)):
            # of a pod's first device nothing is promised yet, and the lock may have an earlier device's serial number
            devid = imported.descriptor.devid if claim.serial is None and locked == key else None
            self._tasks.note_port(locked, port, imported.descriptor.usb_id, devid)
        nodes = f", with {', '.join(claim.children)} nodes" if claim.children else ""
        progress.doing = f"waiting for {key} to enumerate on vhci port {port}{nodes}"
        with self.span("device node", key) as step:
            left = max(0.0, deadline - self._clock.monotonic())
            timeout = first_try_timeout(left, claim.extra_timeout) if second_try else left
            attachment = await self._enumerate(device_id, imported.descriptor, port, timeout)
            step.set_attribute("usbip.nodes", [node.path for node in attachment.nodes])
        self._record_serial(key, attachment, imported.descriptor.devid)
        return self._hand_out(device_id, attachment)

    def _accept_usb_id(self, claim: Claim, descriptor: Descriptor, *, wait_for_list: bool) -> None:
        """Changes the claim's USB ID to that of the imported device, if the claim's resource selects this device.

        Raises WrongDevice if it does not, and with wait_for_list UsbipError if the server's next list may show the
        device itself at another bus ID, or the interfaces of this one.
        """
        resource, identity = self._resources.resource_of(claim), Identity(serial=claim.serial)
        accepted = with_usb_id(claim, resource, descriptor)
        undecided = accepted is None or claim.serial not in (None, accepted.serial)
        if wait_for_list and undecided and may_select(resource, claim.location, descriptor, identity):
            text = f"{claim.location.busid} has USB ID {descriptor.usb_id} now; waiting for the server's next list"
            raise UsbipError(claim.location.server, text)
        if accepted is None:
            raise WrongDevice(claim.location, claim.usb_id, descriptor.usb_id)
        self.change_usb_id(accepted)

    def change_usb_id(self, claim: Claim) -> None:
        """Replaces a claim by the result of with_usb_id() for it."""
        extra = {"device": str(claim.key), "before": str(self._book[claim.id].usb_id), "now": str(claim.usb_id)}
        log.info("USB ID of the device has changed", extra=extra)
        self._book.put(claim)

    def _record_serial(self, key: DeviceKey, attachment: Attachment, devid: int) -> None:
        """Starts writing the serial number that the kernel has read to the lock, if the lock lacks it."""
        lock, serial = self._locks.locks.get(key.id), attachment.serial
        known = lock and (lock.usb_id, lock.serial, lock.read_from)
        if lock is not None and serial is not None and known != (attachment.usb_id, serial, devid):
            self._tasks.note_identity(key, Identity(devid, serial))

    def _hand_out(self, device_id: str, attachment: Attachment) -> Attachment:
        """Writes the CDI spec, and then moves the claim to Attached: its subscribers find the spec up to date."""
        claim = self._book[device_id]
        self._claim_locks.check_still_ours(claim)
        first = claim.allocated_as or attachment
        claim = replace(claim, attachment=attachment, allocated_as=first, serial=attachment.serial or claim.serial)
        self._book.put(claim)
        if claim.container_indexes:
            with self.span("CDI spec", claim.key):
                self._specs.write(claim, attachment)
        self._book.move(replace(claim, blocked_by=""), ClaimEvent.ATTACHED)
        return attachment

    async def _import(self, claim: Claim, grant: Grant, source: Source, deadline: float) -> Imported:
        """Imports the claim's device from its location, within the import window and before deadline.

        The caller must use the result before it awaits again: R1 and R6 were checked right before the return.
        """
        key = claim.location
        until = min(grant.import_deadline, deadline)
        async for attempt in import_busy(self._clock, self._rng):
            with attempt:
                self._claim_locks.check_window(key, grant)
                left = max(0.0, until - self._clock.monotonic())
                imported = await self._client.import_device(key, source=source, timeout=left)
                try:
                    self._claim_locks.check_still_ours(claim)
                    self._claim_locks.check_window(key, grant)
                except LockError:
                    imported.close()
                    raise
                return imported
        raise AssertionError("the retry policy re-raises")

    async def _enumerate(self, device_id: str, descriptor: Descriptor, port: int, timeout: float) -> Attachment:
        claim = self._book[device_id]
        try:
            async with self._claim_locks.while_ours(claim):
                found = await self._driver.enumerate(
                    claim.location,
                    descriptor,
                    port,
                    children=claim.children,
                    children_timeout=claim.children_timeout,
                    serial=claim.serial,
                    rules=interface_rules(self._resources.resource_of(claim), claim, descriptor),
                    timeout=timeout,
                )
        except AttachStuck:
            self._book.put(replace(self._book[device_id], port=None))
            if self._book[device_id].state is ClaimState.ATTACHING:
                self._book.move(self._book[device_id], ClaimEvent.STUCK)
            raise
        if found.withheld:
            extra = {"device": str(claim.key), "interfaces": list(map(described, found.withheld))}
            log.warning("interfaces withheld", extra=extra)
        if lacking := missing(claim.children, found.nodes):
            kinds = sorted({node.kind for node in found.nodes[1:]})
            raise NodesMissing(claim.location, lacking, kinds, claim.children_timeout)
        return replace(found, key=claim.key)

    async def detach(self, device_id: str) -> bool:
        """Frees the claim's port if, and only if, it still carries the claim's device. Removes its record in any case.

        Returns whether the claim had such a port, so that its connection has ended here. Raises VhciError.
        """
        claim = self._book[device_id]
        if (
            claim.port is None
            and claim.state is not ClaimState.LOST
            and not self._claim_locks.is_mine(claim.location.id)
        ):
            return False
        ports = await self._driver.ports()
        # without a port number in the claim, only a cancelled attach can have left a port. Its device may identify
        # itself differently by now: the driver knows its connections and leaves all others alone
        own = own_port(claim.location, ports, claim.port)
        if own is not None:
            with self.span("detach", claim.location):
                await self._driver.detach(own.number, timeout=DETACH_TIMEOUT)
        else:  # the port became free, perhaps unnoticed
            await self._driver.forget(claim.location)
        self._book.put(replace(self._book[device_id], port=None))
        return own is not None

    async def current_attachment(self, claim: Claim, ports: Sequence[PortState]) -> Attachment | None:
        """Returns the claim's attachment as it is now, or None if its port no longer carries what was attached.

        The child nodes may be others. The USB node is compared, because the device may have left the bus and come back
        on the same port: the kernel gives it a new number at each enumeration.
        """
        if claim.port is None or claim.attachment is None or own_port(claim.location, ports, claim.port) is None:
            return None
        now = await self._driver.inspect(claim.location, claim.port)
        if now is None or (now.nodes[0], now.usb_id) != (claim.attachment.nodes[0], claim.attachment.usb_id):
            return None
        return replace(now, key=claim.key)

    async def probe(self, key: DeviceKey, descriptor: Descriptor) -> Identity:
        """Reads a device's serial number and interfaces in user space, under its lock (R1).

        Writes them to the lock, so that one node reads for all, and releases the lock, also after an error. Raises
        LockHeld, LockUnavailable, LockLost or UsbipError.
        """
        with self.span("probe", key), contextlib.closing(await self._bind(key)) as source:
            meta = LockMeta(usb_id=str(descriptor.usb_id), import_from=source.endpoint)
            grant = await self._locks.acquire(key, meta)
            left = True  # until an answer shows that the connection is alive, so that it ends with the probe
            try:
                claim = Claim(key, descriptor.usb_id)
                imported = await self._import(claim, grant, source, self._clock.monotonic() + PROBE_TIMEOUT)
                identity = await self._client.probe(imported, timeout=PROBE_TIMEOUT)
                found = Identity(imported.descriptor.devid, identity.serial or "", identity.interfaces)
                left = False
                await self._locks.annotate(key, identity=found)
            finally:
                await self._locks.release(key, left=left)
        return found

    @contextlib.contextmanager
    def span(self, name: str, key: DeviceKey, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
        """Opens a span of the current trace with the device's attributes, and passes its duration to on_step."""
        began = self._clock.monotonic()
        with span(self._tracer, name, device_attributes(key), kind=kind) as step:
            yield step
        self._on_step(name, self._clock.monotonic() - began)
