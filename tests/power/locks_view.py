"""The locks of all devices, as the API server has them."""

from __future__ import annotations

import asyncio
import contextlib
import time

from tests.power.guests import PATIENCE_S
from usbip_plugin.errors import KubeError
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LOCK_LABELS, ChangeType, lock_of
from usbip_plugin.model import DeviceKey, Lock, PodRef
from usbip_plugin.sync import Broadcast

RELIST_S = 0.2


class LocksView:
    """What the API server says of the locks. `run` must be running."""

    def __init__(self, leases: KubernetesLeases) -> None:
        self._leases = leases
        self._locks: dict[str, Lock] = {}
        self.history: list[tuple[float, str, str]] = []
        """When a lock had which holder: (time.monotonic(), device ID, holder)."""
        self.changed = Broadcast()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(KubeError):
                listed = await self._leases.list(LOCK_LABELS)
                self._locks = {}
                for lease in listed.items:
                    self._note(lock_of(lease))
                self.changed.fire()
                async with contextlib.aclosing(self._leases.watch(LOCK_LABELS, listed.resource_version)) as changes:
                    async for change in changes:
                        if change.lease is None:
                            continue
                        if change.type is ChangeType.DELETED:
                            self._locks.pop(change.lease.name, None)
                        else:
                            self._note(lock_of(change.lease))
                        self.changed.fire()
            await asyncio.sleep(RELIST_S)

    def _note(self, lock: Lock) -> None:
        self._locks[lock.device_id] = lock
        self.history.append((time.monotonic(), lock.device_id, lock.holder))

    def holders_since(self, at: float, key: DeviceKey) -> set[str]:
        """Returns every holder that the lock has had since a moment."""
        return {self.holder(key), *(holder for when, name, holder in self.history if when > at and name == key.id)}

    def holder(self, key: DeviceKey) -> str:
        lock = self._locks.get(key.id)
        return lock.holder if lock is not None else ""

    def pod(self, key: DeviceKey) -> PodRef | None:
        lock = self._locks.get(key.id)
        return lock.pod if lock is not None else None

    async def until_pod(self, key: DeviceKey, pod: PodRef) -> None:
        """Waits until the lock names the pod. If the pod ended before, its device would stay in use for a while."""
        async with asyncio.timeout(PATIENCE_S):
            await self.changed.until(lambda: self.pod(key) == pod)

    async def until_held(self, key: DeviceKey, holder: str, limit: float = PATIENCE_S) -> float:
        """Waits until the lock has this holder, "" for none. Returns when."""
        async with asyncio.timeout(limit):
            await self.changed.until(lambda: self.holder(key) == holder)
        return time.monotonic()
