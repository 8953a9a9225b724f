"""Answers the kubelet's calls for devices: GetPreferredAllocation, Allocate and PreStartContainer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from opentelemetry.util.types import AttributeValue

from usbip_plugin.attach.attacher import Attacher, DeviceRequest
from usbip_plugin.attach.cdi import device_name
from usbip_plugin.attach.containers import (
    ContainerResponse,
    DeviceSpec,
    check_paths,
    device_specs,
    environment,
    place,
    refuse_shared_paths,
)
from usbip_plugin.attach.events import EventSink, refused
from usbip_plugin.attach.monitor import AttachmentMonitor
from usbip_plugin.attach.usage import UsageTracker
from usbip_plugin.claims import ClaimBook
from usbip_plugin.config.schema import DeviceSelector, ResourceConfig
from usbip_plugin.config.selectors import selector_for
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import NotAttached, PluginError, UnknownDevice
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.inventory.snapshot import OfferedDevice
from usbip_plugin.kubelet.device_plugin import short_name, status_code
from usbip_plugin.kubelet.pod_resources import PodResourcesWatcher
from usbip_plugin.kubelet.publish import FLUSH_SHARE, USERS_SHARE, KubeletPublisher, refusal_time
from usbip_plugin.model import Attachment, Health, Identity, Reason
from usbip_plugin.observe.spans import span

log = logging.getLogger(__name__)


def preferred(
    available: Iterable[str],
    must: Iterable[str],
    size: int,
    node: str,
    health_by_id: Mapping[str, Health],
    unwanted: Collection[str] = (),
) -> tuple[str, ...]:
    """Returns the answer to GetPreferredAllocation: must-haves first, then devices attached here, then healthy ones.

    Each group after the must-haves is in rendezvous order of (node, device), so that different nodes prefer different
    devices. The answer has size devices, or all if there are fewer. Raises UnknownDevice if must-haves are not
    available or more than size: the kubelet then fails the pod.

    unwanted: devices that an Allocate would refuse; they come last, with the unhealthy ones.
    """
    chosen, offered = list(dict.fromkeys(must)), set(available)
    if not offered.issuperset(chosen):
        raise UnknownDevice(f"required devices are not available: {', '.join(sorted({*chosen} - offered))}")
    room = max(0, size) - len(chosen)
    if room < 0:
        raise UnknownDevice(f"expected at most {size} required devices, got {len(chosen)}")

    def order(device_id: str) -> tuple[int, bytes]:
        known = health_by_id.get(device_id)
        rank = 2 if known is None or not known.healthy or device_id in unwanted else 1
        if rank == 1 and known is not None and known.reason is Reason.ATTACHED:
            rank = 0
        return rank, hashlib.sha256(f"{node}/{device_id}".encode()).digest()

    rest = sorted(offered.difference(chosen), key=order)
    return tuple(chosen + rest[:room])


def container_response(
    resource: ResourceConfig, domain: str, devices: Sequence[tuple[DeviceSelector, Attachment]]
) -> ContainerResponse:
    """Returns what one container gets for its devices, in the order requested; extras of several devices only once.

    With CDI, the answer has only the extras, and the names under which the CDI spec has the rest. The kubelet keeps
    the answer and uses it again, so with CDI nothing in it depends on device nodes.
    """
    envs: dict[str, str] = {}
    specs: dict[str, DeviceSpec] = {}
    cdi_names: list[str] = []
    for index, (selector, attachment) in enumerate(devices):
        nodes: tuple[DeviceSpec, ...] = ()
        if resource.cdi:
            cdi_names.append(device_name(domain, resource.name, attachment.key.id, index))
        else:
            placed = place(resource, index, attachment)
            nodes = tuple(spec for spec, _ in device_specs(resource, placed))
            envs.update(environment(resource.name, index, attachment, placed))
        extras = (DeviceSpec(e.host_path, e.container_path, e.permissions) for e in selector.extras)
        for spec in chain(nodes, extras):
            specs.setdefault(spec.container_path, spec)
    return ContainerResponse(envs=envs, devices=tuple(specs.values()), cdi_devices=tuple(cdi_names))


def entry_of(resource: ResourceConfig, device: OfferedDevice, attachment: Attachment) -> DeviceSelector:
    """Returns the entry that selects an attached device. It is another one if the device has another USB ID by now."""
    if device.descriptor is None or device.usb_id == attachment.usb_id:
        return device.selector
    now = replace(device.descriptor, usb_id=attachment.usb_id)
    return selector_for(resource, device.key, now, Identity(serial=attachment.serial)) or device.selector


def listed_identity(device: OfferedDevice) -> Identity | None:
    """Returns the identity for a device's lock, by which it is known while not listed; None if it has no interfaces."""
    descriptor = device.descriptor
    if descriptor is None or not descriptor.interfaces:
        return None
    return Identity(descriptor.devid, interfaces=descriptor.interfaces)


RPC: Mapping[str, AttributeValue] = {"rpc.system.name": "grpc", "rpc.method": "v1beta1.DevicePlugin/Allocate"}
PRE_START_WAIT = 25.0
"""Maximum time in seconds that PreStartContainer waits for devices being re-attached. The kubelet waits 30 s."""


class Allocator:
    """AllocateBackend of one node, which attaches the devices of its inventory."""

    def __init__(
        self,
        context: NodeContext,
        *,
        domain: str,
        attacher: Attacher,
        monitor: AttachmentMonitor,
        usage: UsageTracker,
        claims: ClaimBook,
        inventory: Inventory,
        users: PodResourcesWatcher,
        publisher: KubeletPublisher,
        events: EventSink,
        on_result: Callable[[str, PluginError | None, float], None],
        on_pre_start_failed: Callable[[str, PluginError], None],
    ) -> None:
        """Creates the backend for the resources named DOMAIN/NAME.

        on_result(resource, error, seconds): called when an Allocate has ended; error is None if it succeeded.
        on_pre_start_failed(resource, error): called when a PreStartContainer has failed.
        """
        self._node = context.me.node
        self._clock = context.clock
        self._tracer = context.tracer
        self._domain = domain
        self._attacher = attacher
        self._monitor = monitor
        self._usage = usage
        self._claims = claims
        self._inventory = inventory
        self._users = users
        self._publisher = publisher
        self._events = events
        self._on_result = on_result
        self._on_pre_start_failed = on_pre_start_failed

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        """Attaches the devices of all requests within allocateTimeout, whatever servers and the API server do."""
        began = self._clock.monotonic()
        # the kubelet puts no trace context on its calls: this is the root
        ids = [device_id for asked in requests for device_id in asked]
        attributes = {**RPC, "usbip.resource": resource, "usbip.device.ids": ids}
        with span(self._tracer, "Allocate", attributes, context=Context(), kind=SpanKind.SERVER) as root:
            try:
                responses = await self._allocate(resource, requests)
            except PluginError as error:
                root.set_attribute("rpc.response.status_code", status_code(error).name)
                log.warning("Allocate failed", extra={"resource": resource, "cause": str(error)})
                self._on_result(resource, error, self._clock.monotonic() - began)
                self._events(refused(resource, error))
                await self._publish_refusal(resource)
                raise
            root.set_attribute("rpc.response.status_code", "OK")
            self._on_result(resource, None, self._clock.monotonic() - began)
            log.info("devices allocated", extra={"resource": resource, "devices": ids})
            return responses

    async def _publish_refusal(self, resource: str) -> None:
        """Publishes the device states that made the Allocate fail. Takes at most refusal_time() seconds."""
        limit = refusal_time(self._inventory.config)
        # the pod fails with this answer: until then the kubelet lists the other devices that the pod has got
        await self._users.refresh_users(USERS_SHARE * limit)
        await self._publisher.flush(resource, FLUSH_SHARE * limit)

    async def _allocate(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        found = self._inventory.lookup(short_name(resource))
        if found is None:
            raise UnknownDevice(f"resource {resource} is no longer in the configuration")
        config, offered = found
        devices = {device_id: self._checked(offered, resource, device_id) for ids in requests for device_id in ids}
        # The kubelet asks in any order. Sorting gives init container, app and PreStartContainer the same indexes.
        containers = [sorted(ids) for ids in requests]
        indexes = {i: {ids.index(i) for ids in containers if i in ids} if config.cdi else () for i in devices}
        device_requests = [
            DeviceRequest(
                device.key,
                device.usb_id,
                config.name,
                children=config.children,
                children_timeout=config.children_timeout,
                serial=device.selector.selector.serial,
                container_indexes=tuple(sorted(indexes[i])),
                identity=listed_identity(device),
            )
            for i, device in devices.items()
        ]
        refuse_shared_paths(config, max(map(len, containers), default=0))

        def accept(attached: Sequence[Attachment]) -> None:
            by_id = dict(zip(devices, attached, strict=True))
            for ids in containers:
                check_paths(config, [by_id[i] for i in ids])

        timeout = self._inventory.config.allocate_timeout - refusal_time(self._inventory.config)
        attached = await self._attacher.allocate(device_requests, timeout, accept)
        by_id = dict(zip(devices, attached, strict=True))
        with span(self._tracer, "response"):
            return tuple(
                container_response(
                    config, self._domain, [(entry_of(config, devices[i], by_id[i]), by_id[i]) for i in ids]
                )
                for ids in containers
            )

    def _checked(self, offered: Mapping[str, OfferedDevice], resource: str, device_id: str) -> OfferedDevice:
        device = offered.get(device_id)
        if device is None:
            raise UnknownDevice(f"{resource} has no device {device_id} on this node")
        claim = self._claims.get(device_id)
        # If the claim's pod is known, the request is another pod's: pod-resources does not list a device that an init
        # container passes on to its pod's app container.
        if not device.configured and (claim is None or claim.pod is not None):
            self._usage.pod_ended(device_id)
            raise UnknownDevice(f"{device.key} is no longer in {resource}: the configuration has changed")
        return device

    def preferred(self, resource: str, available: tuple[str, ...], must: tuple[str, ...], size: int) -> tuple[str, ...]:
        _, offered = self._inventory.lookup(short_name(resource)) or (None, {})
        unwanted = {device_id for device_id, device in offered.items() if not device.configured}
        return preferred(available, must, size, self._node, self._inventory.health(), unwanted)

    async def pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        """Waits up to PRE_START_WAIT for devices that are being re-attached.

        Raises NotAttached, VhciError if the attachment cannot be checked, and CdiError if its spec cannot be written.
        """
        try:
            await self._pre_start(resource, device_ids)
        except PluginError as error:
            self._on_pre_start_failed(resource, error)
            raise

    async def _pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        name = short_name(resource)
        found = self._inventory.lookup(name)
        by_cdi = found is not None and found[0].cdi
        deadline = self._clock.monotonic() + PRE_START_WAIT
        for index, device_id in enumerate(sorted(device_ids)):
            try:
                async with self._clock.timeout(max(0.0, deadline - self._clock.monotonic())):
                    ready = await self._monitor.prepare(device_id, name, index if by_cdi else None)
            except TimeoutError:
                ready = False
            if not ready:
                raise NotAttached(self._why_not(resource, device_id))

    def _why_not(self, resource: str, device_id: str) -> str:
        claim = self._claims.get(device_id)
        health = self._inventory.health().get(device_id)
        text = f"{resource}: {claim.key if claim is not None else device_id} is not attached to node {self._node}"
        if health is not None:
            text += f": {health.reason.value}" + (f" ({health.detail})" if health.detail else "")
        return text + "; the kubelet will retry"
