"""Publishes what the inventory offers to the kubelet, the Node and the operator. Publishes differences only."""

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
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, short_name
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import Advertised, Lock, Reason
from usbip_plugin.observe.spans import device_attributes, failed, span
from usbip_plugin.observe.tracing import remote_parent, within
from usbip_plugin.sync import done_within

log = logging.getLogger(__name__)

RPC: Mapping[str, AttributeValue] = {"rpc.system.name": "grpc", "rpc.method": "v1beta1.DevicePlugin/ListAndWatch"}
SENT_TIMEOUT = 1.0
"""Maximum time in seconds to wait until the kubelet has been sent a list, or the Node has been written."""
REFUSAL_SHARE, REFUSAL_MAX_S = 0.1, 1.0
"""Share of allocateTimeout reserved for publishing the device's state before a failed Allocate answers; at most 1 s."""
USERS_SHARE, FLUSH_SHARE = 0.15, 0.8
"""Shares of refusal_time(): to read which pods have which devices, and to publish. The rest is for the answer."""

_ROUTINE = frozenset({Reason.FREE, Reason.HELD_ELSEWHERE, Reason.HANDED_OVER})


def refusal_time(config: Config) -> float:
    """Returns the seconds of allocateTimeout that are reserved for what follows a failed Allocate."""
    return min(REFUSAL_MAX_S, REFUSAL_SHARE * config.allocate_timeout)


class Publish(Protocol):
    """Callback for each change of what one resource advertises. devices is empty once the resource is not offered."""

    def __call__(self, resource: str, devices: tuple[Advertised, ...], /) -> None: ...


class KubeletPublisher:
    """Publisher of what an inventory offers, to the kubelet and, if node_status is given, to the Node."""

    def __init__(
        self,
        context: NodeContext,
        *,
        inventory: Inventory,
        locks: LockManager,
        node_status: NodeStatusPublisher | None,
        on_advertised: Publish,
        on_withdrawn: Callable[[float], None],
    ) -> None:
        """Subscribes to the inventory.

        node_status: writes the number of devices to the Node; None to write nothing.
        on_advertised: called when what a resource advertises has changed.
        on_withdrawn: called with the seconds from seeing that another node took a device until a listening kubelet has
            the new list.
        """
        self._clock = context.clock
        self._tracer = context.tracer
        self._inventory = inventory
        self._locks = locks
        self._node_status = node_status
        self._on_advertised = on_advertised
        self._on_withdrawn = on_withdrawn
        self._servers: dict[str, DevicePluginServer] = {}
        self.publishing = False
        """Whether lists are published, which is so from begin() on."""
        inventory.subscribe(self._evaluated)
        inventory.subscribe_taken(self._withdraw)

    def begin(self) -> None:
        """Starts publishing to the kubelet and the Node.

        To be called once the claims that a previous process left are adopted: until then, lists may be incomplete.
        """
        self.publishing = True
        self._inventory.evaluate()

    def attach(self, server: DevicePluginServer) -> None:
        """Publishes to this device-plugin server what its resource advertises, now and after each change."""
        self._servers[server.resource] = server
        server.on_announced = partial(self._announced, server)
        self._publish(server)

    def _announced(self, server: DevicePluginServer) -> None:
        if self._servers.get(server.resource) is server:
            self._publish(server)

    async def detach(self, server: DevicePluginServer) -> None:
        """Forgets the server of a resource that is no longer offered.

        First waits until the kubelet has the last list, and writes 0 to the Node: at most 2 * SENT_TIMEOUT seconds.
        """
        await done_within(self._clock, SENT_TIMEOUT, server.wait_sent())
        if self._servers.get(server.resource) is not server:
            return  # offered again meanwhile
        if self._node_status is not None:
            if server.announced:
                await self._node_status.publish_now({server.resource: 0}, SENT_TIMEOUT)
            self._node_status.forget(server.resource)
        if self._servers.get(server.resource) is server:
            del self._servers[server.resource]

    def kubelet_gone(self, resource: str) -> None:
        """Stops writing a resource that the kubelet has forgotten to the Node. The kubelet then writes 0 itself."""
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
        """Waits until kubelet and Node have what the resource offers now, at most limit seconds.

        A failed Allocate awaits this before it answers. Otherwise the scheduler sends the replacement pod straight back
        to this node (measured: up to 51 failed pods).
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
        """Records, in the trace of the node that took a device, the time until the kubelet here has the new list."""
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
            for server in [server for name, server in self._servers.items() if short_name(name) in names]:
                attributes = {**RPC, "usbip.resource": server.resource, "usbip.streams": server.open_streams}
                with span(self._tracer, "ListAndWatch", attributes, kind=SpanKind.PRODUCER) as sent:
                    try:
                        async with self._clock.timeout(SENT_TIMEOUT):
                            await server.wait_sent()
                    except TimeoutError as error:
                        failed(sent, error)
                if server.open_streams:
                    self._on_withdrawn(self._clock.monotonic() - seen_at)

    def _publish(self, server: DevicePluginServer) -> None:
        if not self.publishing:
            return
        server.publish(self._inventory.advertised.get(short_name(server.resource), ()))
        if self._node_status is not None and server.announced:
            self._node_status.publish({server.resource: server.healthy})


def log_changes(
    resource: str, changed: Iterable[tuple[Advertised | None, Advertised]], locks: Mapping[str, Lock]
) -> None:
    """Logs one line for each device whose health has another reason than before.

    What other nodes take and release is logged at debug level only: every node sees all of it.

    changed: pairs of (before or None, now).
    """
    for old, device in changed:
        if old is not None and old.health.reason is device.health.reason:
            continue
        routine = old is not None and {old.health.reason, device.health.reason} <= _ROUTINE
        if routine and not log.isEnabledFor(logging.DEBUG):
            continue
        lock = locks.get(device.id)
        extra = {
            "resource": resource,
            "device": str(device.key),
            "reason": device.health.reason.value,
            "detail": device.health.detail,
        }
        # the change of another device may have caused this call: each line belongs to the trace of its own device
        with within(lock.traceparent if lock is not None else None):
            if routine and device.health.healthy:
                log.debug("device available again", extra=extra)
            elif routine and device.health.reason is Reason.HANDED_OVER:
                log.debug("device offered by another node first", extra=extra)
            elif routine:
                log.debug("device taken by another node", extra=extra)
            elif device.health.healthy:
                log.info("device healthy", extra=extra)
            else:
                log.info("device unhealthy", extra=extra)
