"""Shared state of all work on devices: claims, one mutex for each device, tasks, and annotations of their locks."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine

from usbip_plugin.claims import ClaimBook
from usbip_plugin.clock import backoff
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import ClaimBusy, KubeError, LockError, LockLost
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.protocol import UNKNOWN_POD
from usbip_plugin.model import DeviceKey, Identity, PodRef, UsbId
from usbip_plugin.observe.spans import device_attributes, failed, pod_attributes, span
from usbip_plugin.observe.tracing import remote_parent
from usbip_plugin.sync import Broadcast, done_within, start_task

log = logging.getLogger(__name__)


RELEASE_FIRST_WAIT = 0.2
"""Seconds between the first two tries to release a device or to annotate its lock. The wait doubles with each try."""
RELEASE_MAX_WAIT = 5.0
"""Longest wait in seconds, without jitter (20 %), between two tries to release a device or to annotate its lock."""


async def failure_of(write: Awaitable[object]) -> LockError | KubeError | None:
    """Awaits a write to a lock, and returns the error with which it failed, None if it succeeded."""
    try:
        await write
    except (LockError, KubeError) as error:
        return error
    return None


class DeviceTasks:
    """The claims of one node, the tasks that work on them, and the annotations that they write to locks.

    A task works on a device under its mutex, and outlives its caller. All methods belong to one event loop.
    """

    def __init__(self, context: NodeContext, book: ClaimBook, locks: LockManager) -> None:
        self.book = book
        self._locks = locks
        self._clock = context.clock
        self._rng = context.rng
        self._tracer = context.tracer
        # only of the devices that work is done on: a server may list other bus IDs at each poll
        self._mutexes: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._group: asyncio.TaskGroup | None = None
        self._running = asyncio.Event()
        self._adopted = asyncio.Event()
        self._api = Broadcast()

    async def run(self, main: Coroutine[object, object, None]) -> None:
        """Runs main, and owns the tasks for as long as main runs."""
        unsubscribe = self._locks.subscribe_api(lambda _state: self._api.fire())
        try:
            async with asyncio.TaskGroup() as tasks:
                self._group = tasks
                self._running.set()
                await main
        finally:
            self._group = None
            unsubscribe()

    async def started(self) -> None:
        """Waits until run() has begun, so that spawn() accepts work."""
        await self._running.wait()

    def set_adopted(self) -> None:
        """To be called once all locks are known, and this node's have claims."""
        self._adopted.set()

    async def until_adopted(self) -> None:
        """Waits for set_adopted(): before, a device without a claim may be that of a pod. Cancel-safe."""
        await self._adopted.wait()

    def spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Runs work in a task of its own. Raises ClaimBusy if the plugin is being stopped."""
        task = start_task(self._group, work, name)
        if task is None:
            raise ClaimBusy("the plugin on this node is stopping; try again")
        return task

    def mutex(self, device_id: str) -> asyncio.Lock:
        """Returns the mutex under which all work on this device is done."""
        return self._mutexes.setdefault(device_id, asyncio.Lock())

    async def note_pod(self, key: DeviceKey, pod: PodRef | None) -> None:
        """Writes the pod to the device's lock: a person's release holds for the pod that the lock names (R6).

        Tries until the write succeeds, the lock is lost or the pod has the device no more. pod: None if another pod has
        got the device, and it is not known yet which. The next process must not take it for that of the earlier pod.
        """

        def has_it() -> bool:
            claim = self.book.get(key.id) or self.book.moved_here(key.id)
            return claim is not None and claim.pod == pod

        claim = self.book.get(key.id)
        context = remote_parent(claim.traceparent if claim is not None else None)
        written = pod or UNKNOWN_POD
        with span(self._tracer, "pod", device_attributes(key) | pod_attributes(pod), context=context) as noted:
            error = await failure_of(self._locks.annotate(key, pod=written))
            if error is not None:
                failed(noted, error)
                extra = {"device": str(key), "pod": str(pod) if pod is not None else None, "cause": str(error)}
                log.warning("pod not recorded on the lock", extra=extra)
        if error is not None:
            await self.try_again(error, lambda: self._locks.annotate(key, pod=written), has_it)

    async def try_again(
        self,
        error: LockError | KubeError | None,
        write: Callable[[], Awaitable[object]],
        needed: Callable[[], bool],
    ) -> None:
        """Repeats a write to a lock that has failed until it succeeds, the lock is lost or needed() is false.

        error: of the first try; None if that succeeded. Logs nothing.
        """
        waits = backoff(self._rng, RELEASE_FIRST_WAIT, RELEASE_MAX_WAIT)
        while error is not None and not isinstance(error, LockLost) and needed():
            await self.until_api_returns(next(waits))
            if needed():  # a later write may have replaced what this one says
                error = await failure_of(write())

    def note_port(self, key: DeviceKey, port: int, usb_id: UsbId, devid: int | None = None) -> None:
        """Starts writing the number of the device's vhci port, and its USB ID, to its lock.

        devid: of the device; what the lock has of one with another devid is removed. None to leave that.
        """
        self.spawn(self._write_port(key, port, usb_id, Identity(devid)), f"note port {port}")

    async def _write_port(self, key: DeviceKey, port: int, usb_id: UsbId, read: Identity) -> None:
        error = await failure_of(self._locks.annotate(key, port=port, usb_id=usb_id, identity=read))
        if error is not None:
            # only people and adoption need it, and the port record has the same
            log.warning("port not recorded on the lock", extra={"device": str(key), "port": port, "cause": str(error)})

    def note_identity(self, key: DeviceKey, identity: Identity) -> None:
        """Starts writing to a lock the identity that was read from its device.

        Tries until the write succeeds or the device is no longer in use here: after a restart of the plugin, a lost
        device is recognized by its identity.
        """
        self.spawn(self._keep_writing_identity(key, identity), f"note serial number of {key}")

    async def _keep_writing_identity(self, key: DeviceKey, identity: Identity) -> None:
        error = await self.record_identity(key, identity)
        await self.try_again(
            error, lambda: self._locks.annotate(key, identity=identity), lambda: self.book.in_use(key.id)
        )

    async def record_identity(self, key: DeviceKey, identity: Identity) -> LockError | KubeError | None:
        """Writes the identity that was read from a device to its lock, which must be this node's.

        Returns the error if that failed, and logs it unless the lock is lost.
        """
        error = await failure_of(self._locks.annotate(key, identity=identity))
        if error is not None and not isinstance(error, LockLost):
            log.warning("serial number not recorded on the lock", extra={"device": str(key), "cause": str(error)})
        return error

    async def until_api_returns(self, seconds: float) -> None:
        """Waits until the API server is reachable, for at most this many seconds.

        Waits the whole time if it is reachable already: then the last failure has another cause.
        """
        if self._locks.api.reachable:
            await self._clock.sleep(seconds)
            return
        await done_within(self._clock, seconds, self._api.until(lambda: self._locks.api.reachable))
