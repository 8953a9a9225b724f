"""The DevicePlugin service of one resource (kubelet API deviceplugin/v1beta1), and its errors as gRPC statuses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from usbip_plugin.attach.containers import ContainerResponse
from usbip_plugin.errors import (
    AllocateError,
    AllocateTimeout,
    AttachStuck,
    ClaimBusy,
    DeviceBusy,
    DeviceUnknown,
    KubeServerError,
    KubeThrottled,
    KubeUnreachable,
    LockHeld,
    LockLost,
    LockUnavailable,
    NotAttached,
    PluginError,
    PortsExhausted,
    RegistrationFailed,
    ServerTimeout,
    ServerUnreachable,
    UnknownDevice,
)
from usbip_plugin.inventory.evaluate import changed_places
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import add_DevicePluginServicer_to_server
from usbip_plugin.model import Advertised
from usbip_plugin.sync import Broadcast

# Details travel in an HTTP/2 header, which gRPC bounds at 8 KiB with everything else in it, and where each byte that is
# not printable ASCII takes three.
MAX_DETAIL_CHARACTERS = 1024
MAX_HEADER_BYTES = 6 * 1024

_CODES: tuple[tuple[tuple[type[PluginError], ...], grpc.StatusCode], ...] = (
    ((LockHeld, LockLost, DeviceBusy, ClaimBusy), grpc.StatusCode.FAILED_PRECONDITION),
    ((ServerTimeout, AllocateTimeout, AttachStuck), grpc.StatusCode.DEADLINE_EXCEEDED),
    (
        (ServerUnreachable, LockUnavailable, KubeUnreachable, KubeThrottled, KubeServerError, NotAttached),
        grpc.StatusCode.UNAVAILABLE,
    ),
    ((UnknownDevice, DeviceUnknown), grpc.StatusCode.NOT_FOUND),
    ((PortsExhausted,), grpc.StatusCode.RESOURCE_EXHAUSTED),
)


def status_code(error: PluginError) -> grpc.StatusCode:
    """FAILED_PRECONDITION: somebody has the device. UNAVAILABLE: server or API does not answer. DEADLINE_EXCEEDED: time
    is up. NOT_FOUND: no such device. RESOURCE_EXHAUSTED: no port. INTERNAL: anything else.

    A bare AllocateError stands for the error it was raised from.
    """
    for classes, code in _CODES:
        if isinstance(error, classes):
            return code
    if isinstance(error, AllocateError) and isinstance(error.__cause__, PluginError):
        return status_code(error.__cause__)
    return grpc.StatusCode.INTERNAL


def status_details(error: PluginError) -> str:
    """The error's message on one line, printable, at most MAX_DETAIL_CHARACTERS long and MAX_HEADER_BYTES encoded."""
    words = " ".join(str(error).split()) or type(error).__name__
    text = "".join(char if char.isprintable() else "?" for char in words[: MAX_DETAIL_CHARACTERS + 1])
    if len(text) > MAX_DETAIL_CHARACTERS:
        text = text[: MAX_DETAIL_CHARACTERS - 1] + "…"
    while sum(1 if char.isascii() and char != "%" else 3 * len(char.encode()) for char in text) > MAX_HEADER_BYTES:
        text = text[: len(text) * 3 // 4] + "…"
    return text


HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"
MAX_REQUEST_BYTES = 1 << 20
MAX_CONTAINERS = 64
MAX_DEVICES_PER_CONTAINER = 1024
# A kubelet has one ListAndWatch and one Allocate open, and a PreStartContainer per container that is starting.
MAX_CONCURRENT_RPCS = 256
# Seconds an Allocate in flight may still take when the server goes down; streams are ended at once.
STOP_GRACE_S = 0.3

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.so_reuseport", 0),
)

DeviceStates = tuple[tuple[str, bool], ...]
"""(device ID, healthy), as the kubelet is told."""


class AllocateBackend(Protocol):
    """Who does the work. resource is the full name, as registered ("usbip.dev/storage").

    Errors are PluginErrors; their message reaches the pod's event. The coroutines bound themselves in time: the kubelet
    sets no deadline on Allocate and admits no other pod meanwhile. They are cancelled when the kubelet goes away.
    """

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        """One response per request (the device IDs of one container), in order; all or nothing."""
        ...

    def preferred(self, resource: str, available: tuple[str, ...], must: tuple[str, ...], size: int) -> tuple[str, ...]:
        """size IDs out of available, must included, best first; fewer if there are not so many. UnknownDevice."""
        ...

    async def pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        """Before each start of a container, if asked for. The kubelet waits 30 s."""
        ...


@dataclass(slots=True, eq=False)
class _Stream:
    sent: int = 0
    ending: bool = False


def device_list(devices: DeviceStates) -> pb.ListAndWatchResponse:
    """(ID, healthy) pairs as the kubelet reads them. Without TopologyInfo: vhci_hcd belongs to no NUMA node."""
    return pb.ListAndWatchResponse(
        devices=[pb.Device(ID=id_, health=HEALTHY if healthy else UNHEALTHY) for id_, healthy in devices]
    )


class DeviceList:
    """The same as device_list for one state after the other. A message is good until the next is asked for."""

    def __init__(self) -> None:
        self._told: DeviceStates = ()
        self._message = device_list(())

    def told(self, state: DeviceStates) -> pb.ListAndWatchResponse:
        if len(state) != len(self._told):
            self._message = device_list(state)
        else:
            # of hundreds of devices few change at a time, and to make them all anew is most of what an event costs
            for place in changed_places(self._told, state):
                device, (device_id, healthy) = self._message.devices[place], state[place]
                device.ID, device.health = device_id, HEALTHY if healthy else UNHEALTHY
        self._told = state
        return self._message


def _states(before: tuple[Advertised, ...], states: DeviceStates, now: tuple[Advertised, ...]) -> DeviceStates:
    """The states of the devices now, given those before; what has not changed stays the very same."""
    if len(before) != len(now):
        return tuple((device.id, device.health.healthy) for device in now)
    found = [*states]
    for place in changed_places(before, now):
        found[place] = now[place].id, now[place].health.healthy
    return tuple(found)


def container_response(response: ContainerResponse) -> pb.ContainerAllocateResponse:
    return pb.ContainerAllocateResponse(
        envs=dict(response.envs),
        devices=[
            pb.DeviceSpec(host_path=d.host_path, container_path=d.container_path, permissions=d.permissions)
            for d in response.devices
        ],
        cdi_devices=[pb.CDIDevice(name=name) for name in response.cdi_devices],
    )


def check_ids(groups: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """The device IDs of each container. UnknownDevice for an empty request or one past the bounds."""
    result = tuple(tuple(ids) for ids in groups)
    if len(result) > MAX_CONTAINERS or any(not 0 < len(ids) <= MAX_DEVICES_PER_CONTAINER for ids in result):
        raise UnknownDevice(
            f"the kubelet asked for {len(result)} containers with {max(map(len, result), default=0)} devices"
        )
    return result


class DevicePluginServer:
    """What one resource tells the kubelet, and what it answers.

    The object outlives kubelet restarts: serving() may be entered again and again, the advertised state stays. Before
    the first publish() an open ListAndWatch says nothing, so a restarted plugin never shows running pods an empty list.
    """

    def __init__(self, resource: str, backend: AllocateBackend, *, pre_start_required: bool = False) -> None:
        self.resource = resource
        self.backend = backend
        self.options = pb.DevicePluginOptions(
            pre_start_required=pre_start_required, get_preferred_allocation_available=True
        )
        self.changed = Broadcast()
        self.healthy = 0
        """How many devices the kubelet will count as allocatable: the healthy ones as published, in use or not."""
        self.on_announced: Callable[[], None] = lambda: None
        """Called when a kubelet has been sent its first list."""
        self._state: DeviceStates = ()
        self._version = 0
        self._published: tuple[Advertised, ...] | None = None
        self._streams: set[_Stream] = set()
        self.streams_opened = 0
        """ListAndWatch streams so far, those that have ended included. `changed` fires when it changes."""

    def publish(self, devices: tuple[Advertised, ...]) -> None:
        """From now on this is the truth: every open ListAndWatch is woken at once, a new one begins with it.

        A slow stream may skip a state, but always ends up with the latest; a list equal to the last is not sent again.
        """
        if devices is self._published:
            return
        before, self._published = self._published or (), devices
        state = _states(before, self._state, devices)
        if self._version and state == self._state:
            return
        self._state = state
        self.healthy = sum(map(itemgetter(1), state))
        self._version += 1
        self.changed.fire()

    @property
    def open_streams(self) -> int:
        """ListAndWatch streams open now. `changed` fires when it changes."""
        return sum(not stream.ending for stream in self._streams)

    @property
    def announced(self) -> bool:
        """A kubelet that is listening now has been sent at least one list."""
        return any(stream.sent and not stream.ending for stream in self._streams)

    async def wait_sent(self) -> None:
        """Returns when what was published so far is written to every stream open now; at once if none is.

        The caller bounds it. Cancel-safe.
        """
        version = self._version
        await self.changed.until(lambda: all(s.sent >= version or s.ending for s in self._streams))

    @contextlib.asynccontextmanager
    async def serving(self, path: Path) -> AsyncIterator[None]:
        """Serves on the unix socket path for the length of the block, then removes the socket.

        At the end streams are ended at once and an Allocate in flight has STOP_GRACE_S before it is cancelled.
        RegistrationFailed if the socket cannot be made.
        """
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS)
        add_DevicePluginServicer_to_server(_Servicer(self), _ByName(server))
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise RegistrationFailed(f"cannot serve on {path}: {error}") from error
        try:
            await server.start()
            yield
        finally:
            for stream in self._streams:
                stream.ending = True
            self.changed.fire()
            await server.stop(STOP_GRACE_S)

    async def follow(self, send: Callable[[DeviceStates], Awaitable[None]]) -> None:
        """One ListAndWatch: send is awaited with the state now, if there is one, and with each later one.

        Returns when the server stops serving; otherwise runs until cancelled or send raises.
        """
        stream = _Stream()
        self._streams.add(stream)
        self.streams_opened += 1
        self.changed.fire()
        try:
            while True:
                await self.changed.until(lambda: stream.ending or stream.sent != self._version)
                if stream.ending:
                    return
                version, state = self._version, self._state
                await send(state)
                first, stream.sent = not stream.sent, version
                self.changed.fire()
                if first:
                    self.on_announced()
        finally:
            self._streams.discard(stream)
            self.changed.fire()


class _ByName:
    """Takes a servicer for a server that finds each call's method by its name.

    A registered method is found sooner, but has a call of its own waiting from the start: 19 KiB for the five.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler[Any, Any], ...]) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Not registered."""


class _Servicer:
    """The RPCs by their names in the interface."""

    def __init__(self, owner: DevicePluginServer) -> None:
        self._owner = owner
        self._list = DeviceList()

    async def GetDevicePluginOptions(  # noqa: N802
        self,
        _request: pb.Empty,
        _context: grpc.aio.ServicerContext[pb.Empty, pb.DevicePluginOptions],
    ) -> pb.DevicePluginOptions:
        return self._owner.options

    async def ListAndWatch(  # noqa: N802
        self,
        _request: pb.Empty,
        context: grpc.aio.ServicerContext[pb.Empty, pb.ListAndWatchResponse],
    ) -> None:
        await self._owner.follow(lambda state: context.write(self._list.told(state)))

    async def GetPreferredAllocation(  # noqa: N802
        self,
        request: pb.PreferredAllocationRequest,
        context: grpc.aio.ServicerContext[pb.PreferredAllocationRequest, pb.PreferredAllocationResponse],
    ) -> pb.PreferredAllocationResponse:
        response = pb.PreferredAllocationResponse()
        taken: set[str] = set()
        try:
            for wish in request.container_requests:
                ids = self._preferred(wish, taken)
                taken.update(ids)
                response.container_responses.add(deviceIDs=ids)
        except PluginError as error:
            await _refuse(context, error)
        return response

    def _preferred(self, wish: pb.ContainerPreferredAllocationRequest, taken: Collection[str]) -> tuple[str, ...]:
        """Containers of one call share no device, if there are enough. The kubelet asks for one at a time (1.37)."""
        available, must = tuple(wish.available_deviceIDs), tuple(wish.must_include_deviceIDs)
        elsewhere = {*taken} - {*must}
        others = tuple(one for one in available if one not in elsewhere)
        enough = len(set(others)) >= wish.allocation_size
        owner = self._owner
        return owner.backend.preferred(owner.resource, others if enough else available, must, wish.allocation_size)

    async def Allocate(  # noqa: N802
        self,
        request: pb.AllocateRequest,
        context: grpc.aio.ServicerContext[pb.AllocateRequest, pb.AllocateResponse],
    ) -> pb.AllocateResponse:
        owner = self._owner
        try:
            requests = check_ids(r.devices_ids for r in request.container_requests)
            responses = await owner.backend.allocate_all(owner.resource, requests)
        except PluginError as error:
            await _refuse(context, error)
        return pb.AllocateResponse(container_responses=[container_response(r) for r in responses])

    async def PreStartContainer(  # noqa: N802
        self,
        request: pb.PreStartContainerRequest,
        context: grpc.aio.ServicerContext[pb.PreStartContainerRequest, pb.PreStartContainerResponse],
    ) -> pb.PreStartContainerResponse:
        owner = self._owner
        try:
            ((*ids,),) = check_ids([request.devices_ids])
            await owner.backend.pre_start(owner.resource, tuple(ids))
        except PluginError as error:
            await _refuse(context, error)
        return pb.PreStartContainerResponse()


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], error: PluginError) -> NoReturn:
    await context.abort(status_code(error), status_details(error))
