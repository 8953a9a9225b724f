"""What an Allocate answers: from the kubelet's request to attached devices, and to what the container gets."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Tracer
from opentelemetry.util.types import AttributeValue

from usbip_plugin.attacher import Attacher
from usbip_plugin.attaching import Wanted
from usbip_plugin.clock import Clock
from usbip_plugin.config import ResourceConfig
from usbip_plugin.containers import container_response
from usbip_plugin.errors import NotAttached, PluginError, UnknownDevice
from usbip_plugin.inventory import Seen, preferred
from usbip_plugin.kubelet.device_plugin import ContainerResponse
from usbip_plugin.kubelet.status import status_code
from usbip_plugin.model import Health
from usbip_plugin.notices import Notice, refused
from usbip_plugin.spans import span

log = logging.getLogger(__name__)

RPC: Mapping[str, AttributeValue] = {"rpc.system.name": "grpc", "rpc.method": "v1beta1.DevicePlugin/Allocate"}
PRE_START_WAIT = 25.0
"""Seconds a PreStartContainer waits for devices that are being attached again. The kubelet gives it 30."""


class Allocator:
    """The AllocateBackend of one node.

    lookup(resource) gives the configuration of a resource by its full name and the devices it offers; health() what is
    advertised now, by ID; after_denial(resource) is awaited before a failed Allocate answers (design: publish first).
    on_result(resource, error, seconds) is told what each came to, and how long that took.
    """

    def __init__(
        self,
        *,
        node: str,
        domain: str,
        clock: Clock,
        attacher: Attacher,
        lookup: Callable[[str], tuple[ResourceConfig, Mapping[str, Seen]] | None],
        health: Callable[[], Mapping[str, Health]],
        timeout: Callable[[], float],
        after_denial: Callable[[str], Awaitable[None]],
        tracer: Tracer,
        on_result: Callable[[str, PluginError | None, float], None],
        on_notice: Callable[[Notice], None],
    ) -> None:
        self._node = node
        self._domain = domain
        self._clock = clock
        self._attacher = attacher
        self._lookup = lookup
        self._health = health
        self._timeout = timeout
        self._after_denial = after_denial
        self._tracer = tracer
        self._on_result = on_result
        self._on_notice = on_notice

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        """See AllocateBackend. Ends within allocateTimeout, whatever servers and API server do."""
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
                self._on_notice(refused(resource, error))
                await self._after_denial(resource)
                raise
            root.set_attribute("rpc.response.status_code", "OK")
            self._on_result(resource, None, self._clock.monotonic() - began)
            log.info("allocated", extra={"resource": resource, "devices": ids})
            return responses

    async def _allocate(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        found = self._lookup(resource)
        if found is None:
            raise UnknownDevice(f"resource {resource} is not in the configuration any more")
        config, offered = found
        seen = {device_id: _known(offered, resource, device_id) for ids in requests for device_id in ids}
        # The kubelet asks in any order: sorted, the init container, the app and a PreStartContainer count alike.
        containers = [sorted(ids) for ids in requests]
        numbers = {i: {ids.index(i) for ids in containers if i in ids} if config.cdi else () for i in seen}
        wanted = [
            Wanted(s.key, s.usb_id, config.name, config.children, s.serial, tuple(sorted(numbers[i])))
            for i, s in seen.items()
        ]
        attached = await self._attacher.allocate(wanted, self._timeout())
        by_id = dict(zip(seen, attached, strict=True))
        with span(self._tracer, "response"):
            return tuple(
                container_response(config, self._domain, [(seen[i].selector, by_id[i]) for i in ids])
                for ids in containers
            )

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
        """See AllocateBackend. Waits up to PRE_START_WAIT for a device that is being attached again, else NotAttached.

        VhciError and CdiError if it cannot be found out or made so that what the container gets is true.
        """
        found = self._lookup(resource)
        by_cdi = found is not None and found[0].cdi
        name = resource.removeprefix(f"{self._domain}/")
        deadline = self._clock.monotonic() + PRE_START_WAIT
        for number, device_id in enumerate(sorted(device_ids)):
            try:
                async with self._clock.timeout(max(0.0, deadline - self._clock.monotonic())):
                    ready = await self._attacher.prepare(device_id, name, number if by_cdi else None)
            except TimeoutError:
                ready = False
            if not ready:
                raise NotAttached(self._why_not(resource, device_id))

    def _why_not(self, resource: str, device_id: str) -> str:
        claim = self._attacher.claims.get(device_id)
        health = self._health().get(device_id)
        text = f"{resource}: {claim.key if claim is not None else device_id} is not attached to node {self._node}"
        if health is not None:
            text += f": {health.reason.value}" + (f" ({health.detail})" if health.detail else "")
        return text + "; the kubelet tries again"


def _known(offered: Mapping[str, Seen], resource: str, device_id: str) -> Seen:
    seen = offered.get(device_id)
    if seen is None:
        raise UnknownDevice(f"{resource} has no device {device_id} on this node")
    return seen
