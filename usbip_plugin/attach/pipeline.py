"""The steps between a free device and one in a container: lock, import, attach, device nodes; and back again.

One call works on one device and is made under that device's mutex; who calls, when, and what happens after a failure is
the caller's business. Each step is a span and moves the claim in the book.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.events import EventSink, taken_over
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimEvent, ClaimState
from usbip_plugin.clock import Clock, Jitter
from usbip_plugin.config.schema import DEFAULT_CHILDREN_TIMEOUT_S
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import (
    AttachStuck,
    DeviceBusy,
    LockError,
    LockHeld,
    LockLost,
    LockUnavailable,
    NodesMissing,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.locks.manager import Grant, LockManager
from usbip_plugin.locks.protocol import LockMeta
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Identity, Lock, UsbId
from usbip_plugin.observe.spans import device_attributes, span
from usbip_plugin.observe.tracing import span_context_from
from usbip_plugin.usbip.client import Imported, UsbipClient
from usbip_plugin.vhci.children import missing
from usbip_plugin.vhci.driver import PortState, VhciDriver
from usbip_plugin.vhci.sysfs import PortStatus

log = logging.getLogger(__name__)


def own_port(place: DeviceKey, ports: Sequence[PortState], number: int | None) -> PortState | None:
    """The port that carries the device of this place by its record, in use or stuck; number narrows it, if it is known.

    A port without our record is not ours, whatever stands on it: in kind several nodes share one kernel, and people
    attach devices by hand.
    """
    for port in ports:
        if port.record == place and number in (None, port.number) and port.status is not PortStatus.NULL:
            return port
    return None


ATTACH_ATTEMPTS = 2
BUSY_ATTEMPTS = 4
BUSY_FIRST_WAIT = 0.1
BUSY_MAX_WAIT = 0.4


def import_busy(clock: Clock, rng: random.Random) -> AsyncRetrying:
    """Import of a device whose lock is ours: a stub resetting after its last client answers busy for about 0.3 s."""
    return AsyncRetrying(
        retry=retry_if_exception_type(DeviceBusy),
        stop=stop_after_attempt(BUSY_ATTEMPTS),
        wait=wait_exponential(BUSY_FIRST_WAIT, BUSY_MAX_WAIT) + Jitter(rng, BUSY_FIRST_WAIT),
        sleep=clock.sleep,
        reraise=True,
    )


def attach_stuck(clock: Clock) -> AsyncRetrying:
    """Import and attach once more after a port that stuck in status 005."""
    return AsyncRetrying(
        retry=retry_if_exception_type(AttachStuck),
        stop=stop_after_attempt(ATTACH_ATTEMPTS),
        sleep=clock.sleep,
        reraise=True,
    )


ENUMERATE_TIMEOUT = 6.0
"""Seconds from the attach write until the device must have enumerated, with its child nodes. A disk takes 1.3 s.

A childrenTimeout beyond the default adds to it.
"""
DETACH_TIMEOUT = 5.0
"""Seconds a port may take to become free after a detach write; measured 13-29 ms."""
PROBE_TIMEOUT = 4.0
"""Seconds for asking one device who it is."""


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """One device that an Allocate asks for, as it was offered to the kubelet under its ID.

    children, children_timeout, container_indexes: see Claim.
    serial: the serial number by which it was selected, None if it was selected without.
    identity: what its server's list says of it, for its lock.
    """

    key: DeviceKey
    usb_id: UsbId
    resource: str
    children: tuple[str, ...] | None = None
    children_timeout: float = DEFAULT_CHILDREN_TIMEOUT_S
    serial: str | None = None
    container_indexes: tuple[int, ...] = ()
    identity: Identity | None = None


class Progress:
    """What a pipeline is busy with, in words, for the error of one that ran out of time."""

    def __init__(self, doing: str) -> None:
        self.doing = doing


class Pipeline:
    """Works on the claims of a book. on_step(name, seconds) is told how long each step took."""

    def __init__(
        self,
        context: NodeContext,
        *,
        client: UsbipClient,
        driver: VhciDriver,
        locks: LockManager,
        specs: CdiSpecs,
        work: DeviceTasks,
        events: EventSink,
        on_step: Callable[[str, float], None],
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._rng = context.rng
        self._tracer = context.tracer
        self._client = client
        self._driver = driver
        self._locks = locks
        self._specs = specs
        self._work = work
        self._book = work.book
        self._events = events
        self._on_step = on_step

    async def attach_new(self, claim: Claim, wanted: DeviceRequest, deadline: float, progress: Progress) -> Attachment:
        """From Free to Attached. On an error the claim stays in the book in the state it had reached.

        Only LockHeld leaves no claim: nothing was touched. Raises LockError, UsbipError, VhciError and CdiError. After
        WrongSerial the lock says what was found, before anybody else can have it.
        deadline is on the monotonic clock and bounds the import; the caller bounds the whole.
        """
        self._book.move(claim, ClaimEvent.ALLOCATE)
        progress.doing = "locking the device (API server)"
        with self.span("lock", claim.key):
            meta = LockMeta(usb_id=str(wanted.usb_id), identity=wanted.identity, traceparent=claim.traceparent)
            try:
                grant = await self._locks.acquire(claim.key, meta)
            except LockHeld:
                self._book.move(self._book[claim.id], ClaimEvent.DENIED)
                raise
        if grant.former is not None:
            _mark_takeover(trace.get_current_span(), grant.former)
            log.warning("taken over", extra={"device": str(claim.key), "former_holder": grant.former.holder})
            self._events(taken_over(claim.key, grant.former, self._me.node))
        self._book.move(self._book[claim.id], ClaimEvent.LOCKED)
        async for attempt in attach_stuck(self._clock):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    # the failed try may have used up the import window of the first write: R1 asks for a new one
                    grant = await self._locks.renew(claim.key)
                try:
                    return await self._attach(claim.id, grant, deadline, progress)
                except WrongSerial as wrong:
                    await self._work.record_identity(claim.key, Identity(wrong.devid, wrong.found))
                    raise
        raise AssertionError("the retry policy re-raises")

    async def reattach(self, device_id: str, deadline: float) -> Attachment:
        """One try from Reattaching to Attached, at the claim's place, under a new write of the lock (R1).

        Errors as attach_new; LockLost if its lock is somebody else's. At another place than its own both locks are
        written; LockHeld if the one there is another node's. What is attached already, because only its CDI spec could
        not be written, stays so: that alone is tried again.
        """
        claim = self._book[device_id]
        if (
            claim.container_indexes
            and (now := await self.current_attachment(claim, await self._driver.ports())) is not None
        ):
            return self._hand_out(device_id, now)
        await self.detach(device_id)
        grant = await self._write_again(self._book[device_id])
        claim = self._book[device_id]
        if claim.moved_to is not None:
            meta = LockMeta(str(claim.usb_id), traceparent=claim.traceparent, in_place_of=claim.id)
            there = await self._locks.acquire(claim.moved_to, meta, claimed=True)
            grant = replace(there, import_deadline=min(grant.import_deadline, there.import_deadline))
        return await self._attach(device_id, grant, deadline, Progress(""))

    async def detach_from_location(self, device_id: str) -> None:
        """Back to the claim's own place: what was attached from elsewhere is detached, the lock there released (R5).

        Raises VhciError and LockUnavailable: then nothing has changed.
        """
        place = self._book[device_id].moved_to
        if place is not None:
            await self.detach(device_id)
            await self._locks.release(place)
            self._book.put(replace(self._book[device_id], moved_to=None))

    async def _write_again(self, claim: Claim) -> Grant:
        """R1 before a re-attach. A lock that is not this boot's any more is taken as by an Allocate (R2, R3, R4).

        LockLost if the claim has become Lost: whether its lock may be taken again is not decided here.
        """
        if claim.state is ClaimState.LOST:
            raise LockLost(str(claim.key), self._holder(claim.id))
        lock = self._locks.locks.get(claim.id)
        if lock is not None and lock.holder == self._me.node and lock.boot_id == self._me.boot_id:
            return await self._locks.renew(claim.key)
        meta = LockMeta(usb_id=str(claim.usb_id), traceparent=claim.traceparent)
        try:
            return await self._locks.acquire(claim.key, meta, claimed=True)
        except LockHeld as held:
            raise LockLost(str(claim.key), held.holder) from held

    async def _attach(self, device_id: str, grant: Grant, deadline: float, progress: Progress) -> Attachment:
        claim = self._book[device_id]
        key = claim.location
        progress.doing = f"importing {key.busid} from USB/IP server {key.server}"
        with self.span("import", key, SpanKind.CLIENT) as step:
            step.set_attributes({"server.address": key.server.host, "server.port": key.server.port})
            step.set_attributes({"network.transport": "tcp", "network.protocol.name": "usbip"})
            imported = await self._import(claim, grant, deadline)
        try:
            if imported.descriptor.usb_id != claim.usb_id:
                raise WrongDevice(key, claim.usb_id, imported.descriptor.usb_id)
            if claim.state is ClaimState.IMPORTING:
                self._book.move(self._book[device_id], ClaimEvent.IMPORTED)
            progress.doing = f"attaching {key} to vhci_hcd"
            with self.span("attach", key) as step:
                port = await self._driver.attach(key, imported.descriptor, imported.sock.fileno())
                step.set_attribute("usbip.vhci.port", port)
        finally:
            imported.close()
        # until the device has enumerated nothing is known of it but its port
        self._book.put(replace(self._book[device_id], port=port, attachment=None))
        # the port goes onto the lock while the kernel enumerates, which takes far longer: it costs no time
        for noted in dict.fromkeys((claim.key, key)):
            self._work.note_port(noted, port)
        nodes = f", with {', '.join(claim.children)} nodes" if claim.children else ""
        progress.doing = f"waiting for {key} to enumerate on vhci port {port}{nodes}"
        with self.span("device node", key) as step:
            attachment = await self._enumerate(device_id, imported.descriptor, port)
            step.set_attribute("usbip.nodes", [node.path for node in attachment.nodes])
        self._compare_told(claim.location, attachment, imported.descriptor.devid)
        return self._hand_out(device_id, attachment)

    def _compare_told(self, place: DeviceKey, attachment: Attachment, devid: int) -> None:
        """What the kernel has read, if the lock does not say so already."""
        lock = self._locks.locks.get(place.id)
        if lock is None or attachment.serial is None:
            return
        if (lock.serial, lock.read_from) != (attachment.serial, devid):
            self._work.note_identity(place, Identity(devid, attachment.serial))

    def _hand_out(self, device_id: str, attachment: Attachment) -> Attachment:
        """The last step: the spec is true before anybody is told that the device is there."""
        claim = self._book[device_id]
        self._check_still_ours(claim)
        given = claim.allocated_as or attachment
        claim = replace(claim, attachment=attachment, allocated_as=given, serial=attachment.serial or claim.serial)
        self._book.put(claim)
        if claim.container_indexes:
            with self.span("CDI spec", claim.key):
                self._specs.write(claim, attachment)
        self._book.move(replace(claim, blocked_by=""), ClaimEvent.ATTACHED)
        return attachment

    async def _import(self, claim: Claim, grant: Grant, deadline: float) -> Imported:
        """What it returns is to be used without another await in between: it was checked to be within R1 and R6."""
        key = claim.location
        until = min(grant.import_deadline, deadline)
        async for attempt in import_busy(self._clock, self._rng):
            with attempt:
                self._check_window(key, grant)
                left = max(0.0, until - self._clock.monotonic())
                imported = await self._client.import_device(key, timeout=left)
                try:
                    self._check_still_ours(claim)
                    self._check_window(key, grant)
                except LockError:
                    imported.close()
                    raise
                return imported
        raise AssertionError("the retry policy re-raises")

    async def _enumerate(self, device_id: str, descriptor: Descriptor, port: int) -> Attachment:
        claim = self._book[device_id]
        try:
            found = await self._driver.enumerate(
                claim.location,
                descriptor,
                port,
                children=claim.children,
                children_timeout=claim.children_timeout,
                serial=claim.serial,
                timeout=ENUMERATE_TIMEOUT + claim.extra_timeout,
            )
        except AttachStuck:
            self._book.put(replace(self._book[device_id], port=None))
            if self._book[device_id].state is ClaimState.ATTACHING:
                self._book.move(self._book[device_id], ClaimEvent.STUCK)
            raise
        if lacking := missing(claim.children, found.nodes):
            kinds = sorted({node.kind for node in found.nodes[1:]})
            raise NodesMissing(claim.location, lacking, kinds, claim.children_timeout)
        return replace(found, key=claim.key)

    def _check_window(self, key: DeviceKey, grant: Grant) -> None:
        """R1: no import, and no use of what was imported, after the window."""
        if not self._locks.rules.may_import(grant.import_deadline, self._clock.monotonic()):
            raise LockUnavailable(str(key), "the import window after the lock write passed (rule R1)")

    def _check_still_ours(self, claim: Claim) -> None:
        """R6 once more, before and after the device is touched: what the watch has said meanwhile."""
        now = self._book.get(claim.id)
        # a lock that names this node again after somebody else had it was lost all the same
        if not self.is_mine(claim.id) or (now is not None and now.state is ClaimState.LOST):
            raise LockLost(str(claim.key), self._holder(claim.id))
        if not self.is_mine(claim.location.id):
            if holder := self._holder(claim.location.id):
                raise LockHeld(str(claim.location), holder)
            raise LockUnavailable(str(claim.location), "it was released meanwhile")

    def _holder(self, device_id: str) -> str:
        lock = self._locks.locks.get(device_id)
        return lock.holder if lock is not None else ""

    # letting go

    async def detach(self, device_id: str) -> None:
        """Frees the claim's port if, and only if, it still carries the claim's device; its record goes either way.

        Raises VhciError.
        """
        claim = self._book[device_id]
        if claim.port is None and claim.state is not ClaimState.LOST and not self.is_mine(claim.location.id):
            return
        ports = await self._driver.ports()
        # a port without a number in the claim can only be one that a cancelled attach left behind. Whatever the device
        # on it calls itself by now: the driver knows the connection, and leaves that of somebody else alone
        own = own_port(claim.location, ports, claim.port)
        if own is not None:
            with self.span("detach", claim.location):
                await self._driver.detach(own.number, timeout=DETACH_TIMEOUT)
        else:  # it fell free, perhaps unseen
            await self._driver.forget(claim.location)
        self._book.put(replace(self._book[device_id], port=None))

    async def current_attachment(self, claim: Claim, ports: Sequence[PortState]) -> Attachment | None:
        """The attachment as it is now, perhaps with other child nodes, while its port carries what was attached.

        The port alone does not say so: what stands there may have left the bus and come back as something else. The USB
        node tells, because the kernel numbers devices anew at each enumeration.
        """
        if claim.port is None or claim.attachment is None or own_port(claim.location, ports, claim.port) is None:
            return None
        now = await self._driver.inspect(claim.location, claim.port)
        if now is None or (now.nodes[0], now.usb_id) != (claim.attachment.nodes[0], claim.attachment.usb_id):
            return None
        return replace(now, key=claim.key)

    def is_mine(self, device_id: str) -> bool:
        """True if the lock, as last seen, names this node."""
        return self._holder(device_id) == self._me.node

    # who it is

    async def probe(self, key: DeviceKey, descriptor: Descriptor) -> Identity:
        """Asks for serial number and interfaces, once for all nodes: under the lock (R1), in user space.

        Kept on the Lease. Raises LockHeld, LockUnavailable, LockLost or UsbipError. The lock is released.
        """
        with self.span("probe", key):
            grant = await self._locks.acquire(key, LockMeta(usb_id=str(descriptor.usb_id)))
            try:
                claim = Claim(key, descriptor.usb_id)
                imported = await self._import(claim, grant, self._clock.monotonic() + PROBE_TIMEOUT)
                identity = await self._client.probe(imported, timeout=PROBE_TIMEOUT)
                told = Identity(imported.descriptor.devid, identity.serial or "", identity.interfaces)
                await self._locks.annotate(key, told=told)
            finally:
                await self._locks.release(key)
        return told

    @contextlib.contextmanager
    def span(self, name: str, key: DeviceKey, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
        """A span of the current trace with the attributes all of ours have; its time goes to on_step too."""
        began = self._clock.monotonic()
        with span(self._tracer, name, device_attributes(key), kind=kind) as step:
            yield step
        self._on_step(name, self._clock.monotonic() - began)


def _mark_takeover(allocate: Span, former: Lock) -> None:
    """The trace of the new holder says whom it took the device from, and links to what that one did with it."""
    allocate.set_attribute("usbip.lock.former_holder", former.holder)
    linked = span_context_from(former.traceparent)
    if linked is not None:
        allocate.add_link(linked)
