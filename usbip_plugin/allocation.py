"""What an Allocate answers: from the kubelet's request to attached devices, and to what the container gets."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import chain

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from usbip_plugin.attacher import Attacher
from usbip_plugin.attaching import Wanted
from usbip_plugin.claims import State
from usbip_plugin.config import ResourceConfig
from usbip_plugin.config.templates import render
from usbip_plugin.errors import PluginError, UnknownDevice
from usbip_plugin.inventory import Seen, preferred
from usbip_plugin.kubelet.device_plugin import ContainerResponse, DeviceSpec
from usbip_plugin.model import Attachment, DeviceNode, Health

log = logging.getLogger(__name__)

_NOT_ENV = re.compile(r"[^A-Z0-9]")
_PER_NODE_FIELDS = ("{kind}", "{name}")


def environment(resource: str, index: int, attachment: Attachment, specs: Sequence[DeviceSpec]) -> dict[str, str]:
    """USBIP_<RESOURCE>_<index>_{DEVICE,BUSID} and, where the device has them, _TTY and _SERIAL.

    Paths are those in the container, as specs (of this attachment) put them; a node the container does not get is
    left out.
    """
    prefix = f"USBIP_{_NOT_ENV.sub('_', resource.upper())}_{index}_"
    inside = {spec.host_path: spec.container_path for spec in specs}
    env = {prefix + "DEVICE": inside[attachment.nodes[0].path], prefix + "BUSID": attachment.key.busid}
    tty = next((inside[n.path] for n in attachment.nodes if n.kind == "tty" and n.path in inside), None)
    if tty is not None:
        env[prefix + "TTY"] = tty
    if attachment.serial:
        env[prefix + "SERIAL"] = attachment.serial
    return env


def node_specs(resource: ResourceConfig, index: int, attachment: Attachment) -> tuple[DeviceSpec, ...]:
    """The USB node and the children the resource wants, under the paths its containerPath gives.

    A template that tells nodes apart ({kind}, {name}) names them all; any other names the one node people mean: the
    first child, or the USB node of a device without children.
    """
    kinds = resource.children
    usb, children = attachment.nodes[:1], attachment.nodes[1:]
    wanted = usb + tuple(node for node in children if kinds is None or node.kind in kinds)
    template = resource.container_path
    if template is None:
        return tuple(DeviceSpec(node.path, node.path) for node in wanted)
    names_all = any(text in template for text in _PER_NODE_FIELDS)
    main = wanted[1] if len(wanted) > 1 else wanted[0]
    return tuple(
        DeviceSpec(
            node.path,
            render(template, _fields(resource.name, index, attachment, node))
            if names_all or node is main
            else node.path,
        )
        for node in wanted
    )


def _fields(resource: str, index: int, attachment: Attachment, node: DeviceNode) -> dict[str, str]:
    return {
        "resource": resource,
        "index": str(index),
        "kind": node.kind,
        "name": node.path.rpartition("/")[2],
        "busid": attachment.key.busid,
        "serial": attachment.serial or "",
    }


def container_response(resource: ResourceConfig, devices: Sequence[tuple[Seen, Attachment]]) -> ContainerResponse:
    """What one container gets for its devices, in the order asked; extras of several devices only once."""
    envs: dict[str, str] = {}
    specs: dict[str, DeviceSpec] = {}
    for index, (seen, attachment) in enumerate(devices):
        nodes = node_specs(resource, index, attachment)
        envs.update(environment(resource.name, index, attachment, nodes))
        extras = (DeviceSpec(e.host_path, e.container_path, e.permissions) for e in seen.selector.extras)
        for spec in chain(nodes, extras):
            specs.setdefault(spec.container_path, spec)
    return ContainerResponse(envs=envs, devices=tuple(specs.values()))


class Allocator:
    """The AllocateBackend of one node.

    lookup(resource) gives the configuration of a resource by its full name and the devices it offers; health() what is
    advertised now, by ID; after_denial(resource) is awaited before a failed Allocate answers (design: publish first).
    """

    def __init__(
        self,
        *,
        node: str,
        attacher: Attacher,
        lookup: Callable[[str], tuple[ResourceConfig, Mapping[str, Seen]] | None],
        health: Callable[[], Mapping[str, Health]],
        timeout: Callable[[], float],
        after_denial: Callable[[str], Awaitable[None]],
        tracer: Tracer,
        on_result: Callable[[str, PluginError | None], None],
    ) -> None:
        self._node = node
        self._attacher = attacher
        self._lookup = lookup
        self._health = health
        self._timeout = timeout
        self._after_denial = after_denial
        self._tracer = tracer
        self._on_result = on_result

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        """See AllocateBackend. Ends within allocateTimeout, whatever servers and API server do."""
        # the kubelet puts no trace context on its calls: this is the root
        with self._tracer.start_as_current_span(
            "Allocate", context=Context(), kind=SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            span.set_attribute("usbip.resource", resource)
            span.set_attribute("usbip.device.ids", [device_id for ids in requests for device_id in ids])
            try:
                responses = await self._allocate(resource, requests)
            except PluginError as error:
                span.record_exception(error)
                span.set_status(StatusCode.ERROR, str(error))
                log.warning("Allocate failed", extra={"resource": resource, "cause": str(error)})
                self._on_result(resource, error)
                await self._after_denial(resource)
                raise
            self._on_result(resource, None)
            log.info("allocated", extra={"resource": resource, "devices": [i for ids in requests for i in ids]})
            return responses

    async def _allocate(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        found = self._lookup(resource)
        if found is None:
            raise UnknownDevice(f"resource {resource} is not in the configuration any more")
        config, offered = found
        seen = {device_id: _known(offered, resource, device_id) for ids in requests for device_id in ids}
        wanted = [Wanted(s.key, s.usb_id, config.name, config.children, s.serial) for s in seen.values()]
        attached = await self._attacher.allocate(wanted, self._timeout())
        by_id = {attachment.key.id: attachment for attachment in attached}
        with self._tracer.start_as_current_span("response"):
            return tuple(container_response(config, [(seen[i], by_id[i]) for i in ids]) for ids in requests)

    def preferred(
        self,
        resource: str,  # noqa: ARG002 - IDs are unique over all resources
        available: tuple[str, ...],
        must: tuple[str, ...],
        size: int,
    ) -> tuple[str, ...]:
        """See AllocateBackend and inventory.preferred."""
        return preferred(available, must, size, self._node, self._health())

    async def pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        """Fails unless every device is attached here. The plugin does not ask for this call yet."""
        for device_id in device_ids:
            claim = self._attacher.claims.get(device_id)
            if claim is None or claim.state is not State.ATTACHED:
                raise UnknownDevice(f"{resource}: {device_id} is not attached to this node")


def _known(offered: Mapping[str, Seen], resource: str, device_id: str) -> Seen:
    seen = offered.get(device_id)
    if seen is None:
        raise UnknownDevice(f"{resource} has no device {device_id} on this node")
    return seen
