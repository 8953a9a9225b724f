"""Brings what is offered before the kubelet, the scheduler and the operator; only differences go out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

from opentelemetry.trace import SpanKind
from opentelemetry.util.types import AttributeValue

from usbip_plugin.config.schema import Config
from usbip_plugin.context import NodeContext
from usbip_plugin.inventory.evaluate import Evaluation, differing
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.kube.node_status import NodeStatusPublisher
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Advertised, Lock, Reason
from usbip_plugin.observe.spans import device_attributes, failed, span
from usbip_plugin.observe.tracing import remote_parent, within

log = logging.getLogger(__name__)


RPC: Mapping[str, AttributeValue] = {"rpc.system.name": "grpc", "rpc.method": "v1beta1.DevicePlugin/ListAndWatch"}
SENT_TIMEOUT = 1.0
"""Seconds a withdrawal's span waits at most for the kubelet to be told."""
KEPT_SHARE, KEPT_MAX_S = 0.1, 1.0
"""Of allocateTimeout, for what follows a failure: kubelet and Node are told, and the Allocate answers."""
LOOKING_SHARE, TELLING_SHARE = 0.15, 0.8
"""Of that, for a look at whose the devices are, and for the telling."""

_DAILY = frozenset({Reason.FREE, Reason.HELD_ELSEWHERE})


def time_kept(config: Config) -> float:
    """Seconds of allocateTimeout that the work on devices leaves for KubeletPublisher.flush and the answer."""
    return min(KEPT_MAX_S, KEPT_SHARE * config.allocate_timeout)


class Publish(Protocol):
    """Told what one resource advertises whenever that changes; nothing, when it is not offered any more."""

    def __call__(self, resource: str, devices: tuple[Advertised, ...], /) -> None: ...


class KubeletPublisher:
    """Brings what an inventory offers before the kubelet and, with node_status, onto the Node."""

    def __init__(
        self,
        context: NodeContext,
        *,
        inventory: Inventory,
        locks: LockManager,
        domain: str,
        node_status: NodeStatusPublisher | None,
        on_advertised: Publish,
        on_withdrawn: Callable[[float], None],
    ) -> None:
        """domain: of the resource names.

        on_withdrawn: seconds from seeing that another node took a device until a listening kubelet was told.
        """
        self._clock = context.clock
        self._tracer = context.tracer
        self._inventory = inventory
        self._locks = locks
        self._domain = domain
        self._node_status = node_status
        self._on_advertised = on_advertised
        self._on_withdrawn = on_withdrawn
        self._servers: dict[str, DevicePluginServer] = {}
        self._begun = False
        inventory.subscribe(self._evaluated)
        inventory.subscribe_taken(self._withdraw)

    @property
    def publishing(self) -> bool:
        """Since begin()."""
        return self._begun

    def begin(self) -> None:
        """What a previous process left has been adopted: lists are complete enough for the kubelet and the Node."""
        self._begun = True
        self._inventory.evaluate()

    def _short(self, resource: str) -> str:
        """A resource's name in the configuration."""
        return resource.removeprefix(f"{self._domain}/")

    def attach(self, server: DevicePluginServer) -> None:
        """From now on this device-plugin server is told what its resource advertises."""
        self._servers[server.resource] = server
        server.on_announced = partial(self._announced, server)
        self._publish(server)

    def _announced(self, server: DevicePluginServer) -> None:
        """A kubelet that has begun to listen has the list: now the Node may say how many there are."""
        if self._servers.get(server.resource) is server:
            self._publish(server)

    async def detach(self, server: DevicePluginServer) -> None:
        """Its resource is not offered any more: the last that kubelet and Node are told. Within 2 * SENT_TIMEOUT."""
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(SENT_TIMEOUT):
                await server.wait_sent()
        if self._servers.get(server.resource) is not server:
            return  # offered again meanwhile
        if self._node_status is not None:
            if server.announced:
                await self._node_status.publish_now({server.resource: 0}, SENT_TIMEOUT)
            self._node_status.forget(server.resource)
        if self._servers.get(server.resource) is server:
            del self._servers[server.resource]

    def kubelet_gone(self, resource: str) -> None:
        """The kubelet forgot this resource and writes 0 for it: nothing is published until it listens again."""
        if self._node_status is not None:
            self._node_status.forget(resource)

    def _evaluated(self, evaluation: Evaluation) -> None:
        before, lists = evaluation.before, evaluation.lists
        for name, devices in lists.items():
            if devices is not before.get(name) and devices != before.get(name):
                log_changes(name, differing(before.get(name, ()), devices), self._locks.locks)
                self._on_advertised(name, devices)
        for name in before.keys() - lists.keys():
            self._on_advertised(name, ())
        for server in self._servers.values():
            self._publish(server)

    async def flush(self, resource: str, limit: float) -> None:
        """Returns when kubelet and Node know what is offered of the resource now, or after limit seconds.

        For a failed Allocate, before it answers. Otherwise the scheduler sends the replacement straight back here
        (measured: up to 51 failed pods).
        """
        self._inventory.evaluate()
        server = self._servers.get(resource)
        if server is None:
            return
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(limit):
                await server.wait_sent()
                if self._node_status is not None and server.announced:
                    await self._node_status.publish_now({resource: server.healthy}, limit)

    async def _withdraw(self, change: LockChange, seen_at: float) -> None:
        """Another node took a device: this joins its trace, up to the moment the kubelet has been told."""
        lock = change.new
        assert lock is not None  # noqa: S101 - the caller looked
        key = lock.key
        attributes = device_attributes(key) if key is not None else {}
        attributes["usbip.device.id"] = change.device_id
        attributes.update({"usbip.lock.holder": lock.holder, "usbip.lock.epoch": lock.epoch})
        context = remote_parent(lock.traceparent)
        with span(self._tracer, "withdraw", attributes, context=context, kind=SpanKind.CONSUMER):
            self._inventory.evaluate_if_due()
            names = self._inventory.offering(change.device_id)
            for server in [server for name, server in self._servers.items() if self._short(name) in names]:
                await self._sent(server)
                if server.open_streams:
                    self._on_withdrawn(self._clock.monotonic() - seen_at)

    async def _sent(self, server: DevicePluginServer) -> None:
        """The part of a withdrawal that is the kubelet's: it ends when the new list is written to its stream."""
        attributes = {**RPC, "usbip.resource": server.resource, "usbip.streams": server.open_streams}
        with span(self._tracer, "ListAndWatch", attributes, kind=SpanKind.PRODUCER) as sent:
            try:
                async with self._clock.timeout(SENT_TIMEOUT):
                    await server.wait_sent()
            except TimeoutError as error:
                failed(sent, error)

    def _publish(self, server: DevicePluginServer) -> None:
        if not self._begun:
            return
        server.publish(self._inventory.advertised.get(self._short(server.resource), ()))
        if self._node_status is not None and server.announced:
            self._node_status.publish({server.resource: server.healthy})


def log_changes(
    resource: str, changed: Iterable[tuple[Advertised | None, Advertised]], locks: Mapping[str, Lock]
) -> None:
    """A line for each device that can be had for another reason than before, or not. changed: as was and is.

    What other nodes take and release all day, every node sees: with thousands of them that is not for each one's log.
    """
    debugging = log.isEnabledFor(logging.DEBUG)
    for old, device in changed:
        if old is not None and old.health.reason is device.health.reason:
            continue
        daily = old is not None and {old.health.reason, device.health.reason} <= _DAILY
        if daily and not debugging:
            continue
        lock = locks.get(device.id)
        extra = {
            "resource": resource,
            "device": str(device.key),
            "reason": device.health.reason.value,
            "detail": device.health.detail,
        }
        # this may have been called on account of another device: each line belongs to the trace of its own
        with within(lock.traceparent if lock is not None else None):
            if daily and device.health.healthy:
                log.debug("free again", extra=extra)
            elif daily:
                log.debug("taken by another node", extra=extra)
            elif device.health.healthy:
                log.info("healthy", extra=extra)
            else:
                log.info("unhealthy", extra=extra)
