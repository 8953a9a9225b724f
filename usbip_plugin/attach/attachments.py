"""Devices in use on one node: makes the parts of this package, and runs them. The face of the package."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from usbip_plugin.attach.adopt import Adopter
from usbip_plugin.attach.attacher import AllocateOutcome, Attacher
from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.events import EventSink, Reattach
from usbip_plugin.attach.half_open import HalfOpenConnections
from usbip_plugin.attach.locate import DeviceLocator
from usbip_plugin.attach.monitor import AttachmentMonitor
from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.reattach import Reattacher
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.attach.usage import UsageTracker
from usbip_plugin.claims import ClaimBook, Resources
from usbip_plugin.context import NodeContext
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import PodRef
from usbip_plugin.usbip.client import UsbipClient
from usbip_plugin.usbip.poller import ServerPoller
from usbip_plugin.vhci.driver import VhciDriver


class Attachments:
    """The parts that attach, watch, re-attach, adopt and release the devices of one node.

    attacher: attaches the devices of an Allocate.
    monitor: watches attached devices, and prepares them for a container that is about to start.
    usage: records which pods use the devices, and releases those that no pod uses.
    adopter: adopts what the previous process left.
    locator: reads the serial numbers of devices.
    """

    def __init__(
        self,
        context: NodeContext,
        *,
        claims: ClaimBook,
        client: UsbipClient,
        driver: VhciDriver,
        locks: LockManager,
        poller: ServerPoller,
        resources: Resources,
        specs: CdiSpecs,
        events: EventSink,
        evict: Callable[[PodRef, str], None],
        on_step: Callable[[str, float], None],
        on_reattach: Callable[[Reattach], None],
        on_outcome: AllocateOutcome,
    ) -> None:
        """Makes the parts. Nothing runs before run().

        evict(pod, cause): begins to evict a pod that has lost its device, or whose device has other device nodes now.
        on_step(step, seconds): called when a step of an attach or a release has ended.
        on_reattach(result): called when a try to re-attach a device has ended.
        on_outcome: called when an Allocate has ended for one device, before it answers.
        """
        self._locks = locks
        self._specs = specs
        self._tasks = tasks = DeviceTasks(context, claims, locks)
        pipeline = Pipeline(
            context,
            client=client,
            driver=driver,
            locks=locks,
            specs=specs,
            tasks=tasks,
            resources=resources,
            events=events,
            on_step=on_step,
            on_flaw=poller.note_flaw,
        )
        releaser = Releaser(context, locks=locks, specs=specs, tasks=tasks, pipeline=pipeline, on_step=on_step)
        self.locator = DeviceLocator(
            context, locks=locks, poller=poller, resources=resources, tasks=tasks, pipeline=pipeline
        )
        reattacher = Reattacher(
            context,
            locks=locks,
            poller=poller,
            resources=resources,
            tasks=tasks,
            pipeline=pipeline,
            locator=self.locator,
            events=events,
            evict=evict,
            on_reattach=on_reattach,
        )
        self.monitor = AttachmentMonitor(
            context,
            driver=driver,
            locks=locks,
            specs=specs,
            resources=resources,
            tasks=tasks,
            pipeline=pipeline,
            releaser=releaser,
            reattacher=reattacher,
            events=events,
            evict=evict,
            on_flaw=poller.note_flaw,
        )
        self.adopter = Adopter(
            context,
            driver=driver,
            locks=locks,
            specs=specs,
            resources=resources,
            tasks=tasks,
            releaser=releaser,
            monitor=self.monitor,
        )
        self.attacher = Attacher(
            context,
            locks=locks,
            specs=specs,
            tasks=tasks,
            pipeline=pipeline,
            releaser=releaser,
            on_outcome=on_outcome,
        )
        self._half_open = HalfOpenConnections(context, client=client, locks=locks, poller=poller, tasks=tasks)
        self.usage = UsageTracker(context, tasks=tasks, releaser=releaser, reattacher=reattacher, events=events)

    async def run(self) -> None:
        """Watches attached devices and runs the tasks that work on them. Runs until cancelled.

        Cancellation leaves attachments and locks for the next process.
        """
        await self._tasks.run(self._watch())

    async def _watch(self) -> None:
        async with asyncio.TaskGroup() as watches:
            watches.create_task(self.monitor.run(), name="AttachmentMonitor")
            watches.create_task(self._half_open.run(), name="HalfOpenConnections")

    async def started(self) -> None:
        """Waits until run() has begun, so that work on devices is accepted."""
        await self._tasks.started()

    def sweep(self) -> None:
        """Removes the CDI specs of devices that this node does not have. Call it once the locks are read."""
        self._specs.sweep({*self._tasks.book.view, *(lock.device_id for lock in self._locks.mine())})
