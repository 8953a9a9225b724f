"""The locks of a claim: that of its device and, if the device was found elsewhere, that of the place where it is now.

Writes them before an import, and checks around each step that they still name this node. R1 to R6 are the lock rules of
docs/internals/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from usbip_plugin.claims import Claim, ClaimBook, ClaimState
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import OTHER_BOOT, LockHeld, LockLost, LockUnavailable
from usbip_plugin.locks.manager import Grant, LockManager
from usbip_plugin.locks.protocol import UNKNOWN_POD, LockMeta
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import DeviceKey, Endpoint, Hold, Lock


class ClaimLocks:
    """Writes and checks the locks of single claims."""

    def __init__(self, context: NodeContext, locks: LockManager, book: ClaimBook) -> None:
        self._me = context.me
        self._clock = context.clock
        self._locks = locks
        self._book = book

    async def write_again(self, claim: Claim, import_from: Endpoint | None, *, attached: bool = False) -> Grant:
        """Writes the claim's lock before a re-attach (R1), or for a device that is still attached (attached=True).

        Only the lock of the location names the source port.

        A lock that is of another boot is acquired as for an Allocate (R2, R3, R4). One that names the import of another
        node is acquired only if the server lists the device. Raises LockLost if another node holds it, or if the claim
        is Lost by now: the caller decides whether its lock may be acquired again. Raises LockUnavailable if another
        boot of this node holds it (R3), or the server does not list the device.
        """
        if claim.state is ClaimState.LOST:
            raise LockLost(str(claim.key), self.holder(claim.id))
        meta = _meta(claim, claim.key, import_from)
        if self.is_mine(claim.id):
            return await self._locks.renew(claim.key, meta)
        lock = self._locks.locks.get(claim.id)
        by_others = lock is not None and lock.import_from not in (None, import_from, claim.import_from)
        listed = by_others and not attached
        try:
            return await self._locks.acquire(claim.key, meta, claimed=True, attached=attached, listed=listed)
        except LockHeld as held:
            if held.holder == self._me.node:
                cause = f"held by node {held.holder} {OTHER_BOOT}, and its server does not list it as free (rule R3)"
                raise LockUnavailable(str(claim.key), cause) from held
            raise LockLost(str(claim.key), held.holder) from held

    async def write_location(self, claim: Claim, import_from: Endpoint | None, *, attached: bool = False) -> Grant:
        """Writes the lock of the place to which the claim's device has moved, besides the claim's own.

        attached: whether the device is attached from there. Raises LockHeld, LockReleased or LockUnavailable.
        """
        meta = _meta(claim, claim.location, import_from)
        return await self._locks.acquire(claim.location, meta, claimed=True, attached=attached)

    async def correct(self, claim: Claim) -> None:
        """Writes to the locks of an attached device all that they record of it, where they record something else.

        Raises LockLost or LockUnavailable.
        """
        locks = [(key, self._locks.locks.get(key.id)) for key in claim.locked]
        for key in [key for key, lock in locks if lock is None or is_outdated(lock, claim)]:
            await self._locks.renew(key, replace(_meta(claim, key, claim.import_from), port=claim.port))

    async def take_back(self, claim: Claim) -> tuple[DeviceKey, ...]:
        """Takes those locks of an attached device again that no longer name this node (R6). Returns which."""
        taken = tuple(key for key in claim.locked if not self.is_mine(key.id))
        if claim.key in taken:
            await self.write_again(claim, claim.import_from, attached=True)
        if claim.moved_to in taken:
            await self.write_location(claim, claim.import_from, attached=True)
        return taken

    @contextlib.asynccontextmanager
    async def while_ours(self, claim: Claim) -> AsyncIterator[None]:
        """Cancels the block as soon as a lock of this claim no longer names this node (R6).

        Raises the errors of check_still_ours. An enumeration may take minutes; a device must not be attached that long
        without its lock.
        """
        self.check_still_ours(claim)
        scope = asyncio.timeout(None)

        def lock_changed(_change: LockChange) -> None:
            if not (self.is_mine(claim.id) and self.is_mine(claim.location.id)) and not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())

        try:
            async with scope:
                unsubscribe = self._locks.subscribe(lock_changed)
                try:
                    yield
                finally:
                    unsubscribe()
        except TimeoutError:
            self.check_still_ours(claim)
            raise LockLost(str(claim.key), self.holder(claim.id)) from None

    def check_window(self, key: DeviceKey, grant: Grant) -> None:
        """Raises LockUnavailable if the import window is over: R1 then forbids an import and the use of its result."""
        if not self._locks.rules.may_import(grant.import_deadline, self._clock.monotonic()):
            raise LockUnavailable(str(key), "the import did not finish in time after the lock was written; try again")

    def check_still_ours(self, claim: Claim) -> None:
        """Raises LockLost, LockHeld or LockUnavailable if a lock of this claim no longer names this node (R6).

        Called before and after the device is touched, because the watch may have seen a change meanwhile.
        """
        now = self._book.get(claim.id)
        # if the claim is Lost, another node had the lock in between, even if the lock names this node again
        if not self.is_mine(claim.id) or (now is not None and now.state is ClaimState.LOST):
            raise LockLost(str(claim.key), self.holder(claim.id))
        if not self.is_mine(claim.location.id):
            if holder := self.holder(claim.location.id):
                raise LockHeld(str(claim.location), holder)
            raise LockUnavailable(str(claim.location), "the lock was released during the attach; try again")

    def holder(self, device_id: str) -> str:
        """Returns the node that the lock, as last seen, names; "" for nobody."""
        lock = self._locks.locks.get(device_id)
        return lock.holder if lock is not None else ""

    def holds(self, claim: Claim) -> tuple[Hold, ...]:
        """Returns this boot's holds of the claim's locks, that of its device first; none if one is not known."""
        tenures = [(key, self._locks.tenure(key.id)) for key in claim.locked]
        holds = tuple(Hold(key, tenure) for key, tenure in tenures if tenure is not None and tenure.uid)
        return holds if len(holds) == len(tenures) else ()

    def is_mine(self, device_id: str) -> bool:
        """Returns whether the lock, as last seen, names this boot of this node (R3)."""
        lock = self._locks.locks.get(device_id)
        return lock is not None and lock.names(self._me)


def is_outdated(lock: Lock, claim: Claim) -> bool:
    """Returns whether a lock of an attached device records something else than its claim, as after a restore of etcd.

    What the claim does not know counts as the same.
    """
    pairs = (
        (claim.port, lock.port),
        (claim.usb_id, lock.usb_id),
        (claim.pod, lock.pod),
        (claim.serial, lock.serial),
        (claim.import_from if lock.device_id == claim.location.id else None, lock.import_from),
    )
    return any(known is not None and known != recorded for known, recorded in pairs)


def _meta(claim: Claim, key: DeviceKey, import_from: Endpoint | None) -> LockMeta:
    """Returns what the lock on key, one of the claim's, records. Only that of the location names the source port."""
    return LockMeta(
        str(claim.usb_id),
        traceparent=claim.traceparent,
        in_place_of=claim.id if key != claim.key else None,
        import_from=import_from if key == claim.location else None,
        serial=claim.serial or "",
        pod=claim.pod or UNKNOWN_POD,
    )
