"""One lock operation on the store: decide, write, and find out whether the write took effect."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from opentelemetry.trace import SpanKind, Tracer

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeConflict, KubeError, KubeNotFound, LockUnavailable
from usbip_plugin.kube.retry import api_write
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.protocol import Create, Decision, Denied, Replace, Write
from usbip_plugin.locks.record import Lease, LeaseStore
from usbip_plugin.locks.watch import LockCache, read_lock
from usbip_plugin.model import DeviceKey, NodeIdentity
from usbip_plugin.observe.spans import device_attributes, span

# Most decisions of one attempt. Each follows a failed compare-and-swap.
CONFLICT_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class AcknowledgedWrite:
    """A record that is known to have been written. sent_at: monotonic seconds; the import window begins here (R1)."""

    lease: Lease
    sent_at: float


@dataclass(slots=True)
class WriteAttempts:
    """The writes that one operation has sent, whether or not they took effect.

    sent: by write id, the record as sent and when.
    tenure: the epoch that the operation may have begun, None if it has begun none.
    """

    sent: dict[str, AcknowledgedWrite] = field(default_factory=dict)
    tenure: int | None = None

    def landed(self, lease: Lease | None) -> AcknowledgedWrite | None:
        """Returns the write that a record, read from the store, shows to have taken effect, or None."""
        mark = lease.annotations.get(record.WRITE_ID) if lease is not None else None
        sent = self.sent.get(mark) if mark is not None else None
        if lease is None or sent is None or sent.lease.holder != lease.holder:
            return None
        return AcknowledgedWrite(lease, sent.sent_at)


Decide = Callable[[Lease | None, Write], Awaitable[Decision]]


class Writer:
    """Runs lock operations on the store. Calls before_write right before each write."""

    def __init__(
        self,
        store: LeaseStore,
        view: LockCache,
        me: NodeIdentity,
        clock: Clock,
        rng: random.Random,
        duration: float,
        tracer: Tracer,
        before_write: Callable[[], None],
    ) -> None:
        self._store, self._view, self._me, self._clock, self._rng = store, view, me, clock, rng
        self._duration, self._tracer, self._before_write = duration, tracer, before_write

    def new_write(self) -> Write:
        return Write(self._me, self._clock.now(), f"{self._rng.getrandbits(64):016x}", self._duration)

    async def drive(
        self, key: DeviceKey, decide: Decide, attempts: WriteAttempts | None = None
    ) -> AcknowledgedWrite | Denied:
        """Decides and writes until a write is known to have happened, or a record just read forbids it.

        Raises LockUnavailable if the API server does not answer, refuses for another reason than a conflict, or if the
        record kept changing for CONFLICT_ROUNDS decisions. Cancel-safe: attempts then lists what may have been written.
        """
        attempts = attempts or WriteAttempts()
        try:
            async for attempt in api_write(self._clock, self._rng):
                with attempt:
                    again = attempt.retry_state.attempt_number > 1
                    return await self._rounds(key, decide, attempts, again=again)
        except KubeError as error:
            raise LockUnavailable(str(key), str(error)) from error
        raise AssertionError  # a retry policy ends by returning or raising

    async def _rounds(
        self, key: DeviceKey, decide: Decide, attempts: WriteAttempts, *, again: bool
    ) -> AcknowledgedWrite | Denied:
        """Makes one attempt of drive(). With again=True, first reads whether an earlier attempt took effect."""
        fresh = again
        lease = await self.read(key.id) if again else self._view.lease(key.id)
        for _ in range(CONFLICT_ROUNDS):
            landed = attempts.landed(lease)
            if landed is not None:
                return landed
            write = self.new_write()
            decision = await decide(lease, write)
            if not isinstance(decision, Denied):
                # a record of this node, but of none of these writes, is of an epoch that another operation began
                attempts.tenure = None if protocol.is_mine(lease, self._me) else decision.lease.transitions
                written = await self._write(key, decision, write, attempts)
                if written is not None:
                    return written
            elif fresh:
                return decision
            lease, fresh = await self.read(key.id), True
        raise KubeConflict(
            "update", "leases.coordination.k8s.io", f'"{key.id}" changed before each of {CONFLICT_ROUNDS} writes'
        )

    async def _write(
        self, key: DeviceKey, decision: Create | Replace, write: Write, attempts: WriteAttempts
    ) -> AcknowledgedWrite | None:
        """Sends one write: a create or a compare-and-swap. Returns None after a conflict, or if the Lease is gone."""
        self._before_write()
        with span(self._tracer, "lock.write", device_attributes(key), kind=SpanKind.CLIENT) as written:
            # R1 counts from here, not from the answer: others may see the write as soon as it is sent.
            sent = attempts.sent[write.write_id] = AcknowledgedWrite(decision.lease, self._clock.monotonic())
            try:
                with self._view.call(key.id) as call:
                    if isinstance(decision, Create):
                        lease = await self._store.create(decision.lease)
                    else:
                        lease = await self._store.replace(decision.lease)
                    certain = self._view.answered(call, lease)
            except KubeConflict:
                written.set_attribute("usbip.lock.conflict", True)
                return None
            except KubeNotFound:
                if isinstance(decision, Create):
                    raise  # the namespace is missing
                return None
        if not certain:
            await self.read(key.id)
        return AcknowledgedWrite(lease, sent.sent_at)

    async def read(self, device_id: str) -> Lease | None:
        """Reads the record, and returns it, or a newer one that came meanwhile. Raises KubeError."""
        return await read_lock(self._store, self._view, device_id)
