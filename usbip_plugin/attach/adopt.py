"""Makes claims at start of what the previous process left: locks that name this node, and devices on vhci ports."""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.monitor import AttachmentMonitor
from usbip_plugin.attach.pipeline import own_port
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimEvent, ClaimState, DeviceUser, Resources
from usbip_plugin.config.selectors import expected_serial
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import CdiError, KubeError, LockError, VhciError
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.model import DeviceKey, Endpoint, Lock, UsbId
from usbip_plugin.observe.spans import device_attributes, pod_attributes, span
from usbip_plugin.observe.tracing import remote_parent
from usbip_plugin.vhci.driver import PortState, VhciDriver

log = logging.getLogger(__name__)


class Adoption(enum.Enum):
    """What to do at start with a lock that names this node."""

    ADOPT = "the port still carries it"
    """A vhci port still has the device attached: it stays attached."""
    REATTACH = "no attachment, but a pod has it"
    """The device is not attached, and a pod has it, or may have it: it is re-attached."""
    RELEASE = "no attachment, nobody uses it"
    """The device is not attached, and no pod has it: its lock is released."""


def decide_adoption(*, attached: bool, used: bool | None, orphan: bool = False) -> Adoption:
    """Decides what to do at start with a lock whose holder is this node.

    attached: whether a vhci port has the device. Then the lock is of this boot.
    used: whether a pod has the device; None if that is not known because pod-resources could not be read. The lock of a
        device that may be used is not released.
    orphan: whether the lock is of a device's new bus ID and must be released, see Adopter._is_orphan().
    """
    if orphan:
        return Adoption.RELEASE
    if attached:
        return Adoption.ADOPT
    return Adoption.RELEASE if used is False else Adoption.REATTACH


def recorded_port(
    key: DeviceKey, moved_to: DeviceKey | None, number: int | None, ports: Sequence[PortState]
) -> PortState | None:
    """Returns the port to which a plugin has attached the device that was allocated as key, in use or stuck, or None.

    The port records count, not the locks: a record is of this attachment, and a restore of etcd may have set the locks
    back. A port that a person has attached with the `usbip` tool is not the plugin's.

    moved_to: where the device is by the locks. The record of an earlier plugin does not say what was allocated.
    number: the port that the lock names, which comes first if several records name the device.
    """
    found = [port for port in ports if port.allocated_as is not None and port.allocated_as in (key, moved_to)]
    return min(found, key=lambda port: port.number != number, default=None)


def records_import(lock: Lock, import_from: Endpoint | None) -> bool:
    """Returns whether a lock of this node is about the attachment that this import made. If not, it was set back.

    import_from: this node's end of the connection, by the port record. What is not known counts as the same.
    """
    return None in (import_from, lock.import_from) or lock.import_from == import_from


def _without_lease(key: DeviceKey) -> Lock:
    """Returns a lock that nobody holds, for an attached device whose Lease was deleted."""
    return Lock(key.id, "", 0, 0.0, "", key=key)


class Adopter:
    """Adopts the devices of this node's previous process: makes claims of them in the book."""

    def __init__(
        self,
        context: NodeContext,
        *,
        driver: VhciDriver,
        locks: LockManager,
        specs: CdiSpecs,
        resources: Resources,
        tasks: DeviceTasks,
        releaser: Releaser,
        monitor: AttachmentMonitor,
    ) -> None:
        self._me = context.me
        self._clock = context.clock
        self._tracer = context.tracer
        self._driver = driver
        self._locks = locks
        self._specs = specs
        self._resources = resources
        self._tasks = tasks
        self._releaser = releaser
        self._monitor = monitor
        self._recorded: dict[DeviceKey, None] = {}
        """The devices whose port records the previous process left. Their servers may no longer be configured."""

    async def adopt(self, used: Mapping[str, DeviceUser], *, complete: bool, also_lost: bool) -> None:
        """Adopts every device that belongs to this node by the locks and the port records.

        Idempotent. To be called when the locks are known, and again whenever the API server is back.

        used: the pods that have devices, by device ID, as far as they are known.
        complete: whether `used` lists every user. If not, no device is released for lack of a pod.
        also_lost: whether to make claims, too, of devices that a pod has, or that are still attached, although their
            locks no longer name this node.
        """
        known = self._locks.ready.is_set()
        try:
            ports = await self._driver.ports()
        except VhciError as error:
            self._monitor.report_unreadable(error)
            ports = ()
        for hold in (hold for port in ports for hold in port.holds):
            self._locks.remember(hold.key.id, hold.tenure)
        found = list(self._locks.mine())
        if also_lost:
            self._recorded.update((p.record, None) for p in ports if p.record is not None and p.by_plugin)
            locks = self._locks.locks
            if self._locks.ready.is_set():
                # left out of the list if another node holds it and its server is no longer configured
                with contextlib.suppress(KubeError):
                    for device_id in sorted(used.keys() - locks.keys()):
                        await self._locks.look_up(device_id)
            # a device that a person has attached with the usbip tool is left alone
            left = {port.allocated_as.id: port.allocated_as for port in ports if port.allocated_as is not None}
            found += [locks[i] for i in sorted(used.keys() | left) if i in locks and locks[i].holder != self._me.node]
            if self._locks.ready.is_set():
                found += [_without_lease(key) for i, key in left.items() if i not in locks]
        # the lock of the place to which a device has moved is adopted with the device
        places = {port.record for port in ports if port.allocated_as not in (None, port.record)}
        for lock in found:
            key = lock.key
            if key is None or key in places or self._tasks.mutex(lock.device_id).locked():
                continue  # another task works on this device
            async with self._tasks.mutex(lock.device_id):
                now = self._locks.locks.get(lock.device_id) or _without_lease(key)
                if self._tasks.book.in_use(lock.device_id) or now.holder != lock.holder:
                    continue
                orphaned = lock.in_place_of is None or self._is_orphan(lock.in_place_of)
                if orphaned or now.holder != self._me.node:
                    await self._adopt_one(key, lock, ports, used, complete=complete)
        if also_lost:
            await self._forget_ended(ports)
        if known:
            self._tasks.set_adopted()

    async def _forget_ended(self, ports: Sequence[PortState]) -> None:
        """Removes the port records of attachments that ended unnoticed and whose locks no longer name this node."""
        locks = self._locks.locks
        locked = [lock.key for lock in tuple(locks.values()) if lock.key is not None]
        recorded = self._recorded if self._locks.ready.is_set() else ()  # before that, their locks may name this node
        for key in dict.fromkeys((*recorded, *locked)):
            mine = key.id in locks and locks[key.id].holder == self._me.node
            if mine or self._tasks.book.in_use(key.id) or self._tasks.mutex(key.id).locked():
                continue
            if own_port(key, ports, None) is None:
                await self._driver.forget(key)

    def _is_orphan(self, in_place_of: str) -> bool:
        """Returns whether the lock of a device's new bus ID must be released.

        It must if this node does not hold the lock of the old bus ID, or has adopted it already without the new one.

        in_place_of: the device ID of the old bus ID.
        """
        own = self._locks.locks.get(in_place_of)
        adopted = self._tasks.book.get(in_place_of) is not None
        return adopted or own is None or own.holder != self._me.node or own.key is None

    async def _adopt_one(
        self, key: DeviceKey, lock: Lock, ports: Sequence[PortState], users: Mapping[str, DeviceUser], *, complete: bool
    ) -> None:
        mine = lock.holder == self._me.node
        others = self._locks.mine() if mine else ()
        moved = next((other for other in others if other.in_place_of == key.id and other.key), None)
        moved_to = moved.key if moved is not None else None
        port = recorded_port(key, moved_to, lock.port, ports)
        location = (port.record if port is not None else moved_to) or key
        latest = self._locks.locks.get(location.id) or lock
        # a lock of another boot of this node was set back by a restore of etcd, or another machine has the name
        mine = mine and (lock.names(self._me) or port is None)
        attachment = await self._driver.inspect(location, port.number) if port is not None else None
        usb_id, source = (port.usb_id, port.import_from) if port is not None else (None, None)
        usb_id = usb_id or lock.usb_id or (attachment.usb_id if attachment is not None else UsbId(0, 0))
        if attachment is not None and attachment.usb_id != usb_id:
            attachment, port = None, None  # the port has another device by now
        user = users.get(key.id)
        handed_out = self._specs.recall(key.id, user.resource if user is not None else None)
        used = True if user is not None else False if complete else None
        claim = Claim(
            key,
            usb_id,
            resource=user.resource if user is not None else handed_out.resource if handed_out is not None else None,
            container_indexes=handed_out.container_indexes if handed_out is not None else None,
            port=port.number if port is not None else None,
            attachment=replace(attachment, key=key) if attachment is not None else None,
            allocated_as=replace(attachment, key=key) if attachment is not None else None,
            traceparent=lock.traceparent,
            allocated_at=self._clock.monotonic(),
            pod=lock.pod if mine and records_import(latest, source) else user.pod if user is not None else None,
            serial=(attachment.serial if attachment is not None else None) or lock.serial or None,
            moved_to=location if location != key else None,
            import_from=source or (latest.import_from if mine else None),
        )
        if attachment is None and not (lock.holder == self._me.node and lock.serial):
            # the lock may have the serial number of what another node had, or found, at this bus ID
            resource = self._resources.resource_of(claim)
            claim = replace(claim, serial=expected_serial(resource, key, claim.serial))
        if not mine:
            self._tasks.book.move(claim, ClaimEvent.DEPRIVED)
            log.error("lock lost", extra={"device": str(key), "holder": lock.holder})
            self._monitor.begin_withdrawal(key.id)
            return
        orphan = lock.in_place_of is not None
        verdict = decide_adoption(attached=attachment is not None, used=used, orphan=orphan)
        if verdict is Adoption.RELEASE and lock.boot_id != self._me.boot_id:
            self._tasks.spawn(self._release_earlier(claim), f"release {key}")
            return
        attributes = device_attributes(key) | pod_attributes(lock.pod) | {"usbip.adoption": verdict.name.lower()}
        with span(self._tracer, "adopt", attributes, context=remote_parent(claim.traceparent)):
            match verdict:
                case Adoption.ADOPT if port is not None:
                    await self._adopt_attached(claim, port)
                case Adoption.REATTACH:
                    self._tasks.book.move(claim, ClaimEvent.ORPHANED)
                    self._monitor.begin_reattach(key.id)
                case Adoption.RELEASE:
                    self._tasks.book.move(claim, ClaimEvent.UNUSED)
                    release = self._releaser.finish_locked(key.id, ClaimState.RELEASING)
                    self._tasks.spawn(release, f"release {key}")

    async def _release_earlier(self, claim: Claim) -> None:
        """Releases the lock of a device that another boot had, if the server answers (R3).

        There is no claim on the device meanwhile, so that no Allocate waits for it. The next adopt() tries again.
        """
        async with self._tasks.mutex(claim.id):
            lock = self._locks.locks.get(claim.id)
            if lock is None or lock.boot_id == self._me.boot_id or self._tasks.book.in_use(claim.id):
                return
            with contextlib.suppress(LockError, CdiError):
                self._specs.remove(claim)
                await self._locks.release(claim.key)
                log.info(
                    "device released", extra={"device": str(claim.key), "pod": str(lock.pod) if lock.pod else None}
                )

    async def _adopt_attached(self, claim: Claim, port: PortState) -> None:
        try:
            if claim.attachment is not None:
                self._specs.write(claim, claim.attachment)  # the previous process may have died before it did
        except CdiError as error:
            log.warning("CDI spec out of date", extra={"device": str(claim.key), "cause": str(error)})
            self._tasks.book.move(claim, ClaimEvent.ORPHANED)
            self._monitor.begin_reattach(claim.id)
        else:
            self._tasks.book.move(claim, ClaimEvent.ADOPTED)
            await self._monitor.check_locks(claim.id, port)
            log.info(
                "device adopted", extra={"device": str(claim.key), "port": claim.port, "place": str(claim.location)}
            )
