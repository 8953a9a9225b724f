"""The DevicePlugin service of one resource (kubelet API deviceplugin/v1beta1), and its errors as gRPC statuses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
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
from usbip_plugin.inventory.evaluate import changed_indexes
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import add_DevicePluginServicer_to_server
from usbip_plugin.model import Advertised
from usbip_plugin.sync import Broadcast

MAX_DETAIL_CHARACTERS = 1024
"""Maximum length of an error's details, in characters."""
MAX_HEADER_BYTES = 6 * 1024
"""Maximum length of an error's details in the HTTP/2 header, in bytes.

gRPC limits all headers together to 8 KiB. In a header each byte that is not printable ASCII takes three bytes.
"""

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
    """Returns the gRPC status code for an error. For a bare AllocateError, the code of the error it was raised from."""
    for classes, code in _CODES:
        if isinstance(error, classes):
            return code
    if isinstance(error, AllocateError) and isinstance(error.__cause__, PluginError):
        return status_code(error.__cause__)
    return grpc.StatusCode.INTERNAL


def status_details(error: PluginError) -> str:
    """Returns the error's message as one printable line within MAX_DETAIL_CHARACTERS and MAX_HEADER_BYTES."""
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
"""Maximum size of one request in bytes."""
MAX_CONTAINERS = 64
"""Maximum number of containers in one Allocate request."""
MAX_DEVICES_PER_CONTAINER = 1024
"""Maximum number of device IDs that one request names for one container."""
MAX_CONCURRENT_RPCS = 256
"""Maximum number of open calls per socket.

A kubelet has one ListAndWatch and one Allocate open, and a PreStartContainer for each container that is starting.
"""
STOP_GRACE_S = 0.3
"""Seconds that an Allocate in flight may still take when the server stops. Streams end at once."""

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.so_reuseport", 0),
)

DeviceStates = tuple[tuple[str, bool], ...]
"""Pairs of (device ID, healthy), as sent to the kubelet."""


def short_name(resource: str) -> str:
    """Returns a resource's name in the configuration: without the domain."""
    return resource.rpartition("/")[2]


class AllocateBackend(Protocol):
    """Backend that carries out the kubelet's calls for a DevicePluginServer.

    resource: the full name, as registered ("usbip.dev/storage").

    Errors are PluginErrors; their message reaches the pod's event. Implementations limit the time of each coroutine
    themselves, because the kubelet sets no deadline on Allocate and admits no other pod meanwhile. The coroutines are
    cancelled when the kubelet goes away.
    """

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        """Allocates the devices of all requests or of none. Returns one response per request, in order.

        requests: the device IDs of one container each.
        """

    def preferred(self, resource: str, available: tuple[str, ...], must: tuple[str, ...], size: int) -> tuple[str, ...]:
        """Returns size IDs out of available, including all of must, best first; fewer if there are not enough.

        Raises UnknownDevice if must does not fit into available or size.
        """

    async def pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        """Prepares devices before each start of a container, if the options require it. The kubelet waits 30 s."""


@dataclass(slots=True, eq=False)
class _Stream:
    sent: int = 0
    ending: bool = False


def device_list(devices: DeviceStates) -> pb.ListAndWatchResponse:
    """Returns a ListAndWatch message for these devices, without TopologyInfo: vhci_hcd belongs to no NUMA node."""
    return pb.ListAndWatchResponse(
        devices=[pb.Device(ID=id_, health=HEALTHY if healthy else UNHEALTHY) for id_, healthy in devices]
    )


class DeviceList:
    """Builds the ListAndWatch messages of one stream, and changes only the devices that differ from the last message.

    All calls return the same message object: each message is valid until the next call of message_for().
    """

    def __init__(self) -> None:
        self._last_state: DeviceStates = ()
        self._message = device_list(())

    def message_for(self, state: DeviceStates) -> pb.ListAndWatchResponse:
        if len(state) != len(self._last_state):
            self._message = device_list(state)
        else:
            # few of hundreds of devices change at a time, and building all anew would be most of the cost of an event
            for place in changed_indexes(self._last_state, state):
                device, (device_id, healthy) = self._message.devices[place], state[place]
                device.ID, device.health = device_id, HEALTHY if healthy else UNHEALTHY
        self._last_state = state
        return self._message


def _states(before: tuple[Advertised, ...], states: DeviceStates, now: tuple[Advertised, ...]) -> DeviceStates:
    """Returns the states of the devices now, given those before. A state that has not changed stays the same object."""
    if len(before) != len(now):
        return tuple((device.id, device.health.healthy) for device in now)
    result = [*states]
    for place in changed_indexes(before, now):
        result[place] = now[place].id, now[place].health.healthy
    return tuple(result)


def _container_response(response: ContainerResponse) -> pb.ContainerAllocateResponse:
    return pb.ContainerAllocateResponse(
        envs=dict(response.envs),
        devices=[
            pb.DeviceSpec(host_path=d.host_path, container_path=d.container_path, permissions=d.permissions)
            for d in response.devices
        ],
        cdi_devices=[pb.CDIDevice(name=name) for name in response.cdi_devices],
    )


def check_ids(groups: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Returns the device IDs of each container. Raises UnknownDevice if a container has none or too many."""
    result = tuple(tuple(ids) for ids in groups)
    if len(result) > MAX_CONTAINERS or any(not 0 < len(ids) <= MAX_DEVICES_PER_CONTAINER for ids in result):
        raise UnknownDevice(
            f"expected up to {MAX_CONTAINERS} containers with 1 to {MAX_DEVICES_PER_CONTAINER} devices, "
            f"got {len(result)} containers with {min(map(len, result))} to {max(map(len, result))} devices"
        )
    return result


class DevicePluginServer:
    """Device-plugin gRPC server of one resource: sends the device list to the kubelet and answers its calls.

    Outlives kubelet restarts: serving() may be entered again, and the published state stays. Before the first
    publish(), an open ListAndWatch sends no list, so a restarted plugin sends no empty list while pods use its devices.
    """

    def __init__(self, resource: str, backend: AllocateBackend, *, pre_start_required: bool = False) -> None:
        self.resource = resource
        self.backend = backend
        self.options = pb.DevicePluginOptions(
            pre_start_required=pre_start_required, get_preferred_allocation_available=True
        )
        self.changed = Broadcast()
        self.healthy = 0
        """Number of devices that the kubelet will count as allocatable: the published healthy ones, in use or not."""
        self.on_announced: Callable[[], None] = lambda: None
        """Called when the first list of a ListAndWatch stream has been sent."""
        self._state: DeviceStates = ()
        self._version = 0
        self._published: tuple[Advertised, ...] | None = None
        self._streams: set[_Stream] = set()
        self.streams_opened = 0
        """Number of ListAndWatch streams opened so far, including ended ones. `changed` fires when it changes."""

    def publish(self, devices: tuple[Advertised, ...]) -> None:
        """Sets the list that every open ListAndWatch sends next, and every new one sends first.

        Wakes the open streams at once. A slow stream may skip a list, but always sends the latest one. A list equal to
        the last one is not sent again.
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
        """Returns the number of ListAndWatch streams that are open now. `changed` fires when it changes."""
        return sum(not stream.ending for stream in self._streams)

    @property
    def announced(self) -> bool:
        """Returns whether a ListAndWatch that is open now has sent at least one list."""
        return any(stream.sent and not stream.ending for stream in self._streams)

    async def wait_sent(self) -> None:
        """Waits without a limit until the last list is written to every open stream, if there is one. Cancel-safe."""
        version = self._version
        await self.changed.until(lambda: all(s.sent >= version or s.ending for s in self._streams))

    @contextlib.asynccontextmanager
    async def serving(self, path: Path) -> AsyncIterator[None]:
        """Serves on the unix socket `path` until the block ends, then removes the socket.

        When the block ends, streams end at once. An Allocate in flight has STOP_GRACE_S before it is cancelled.
        Raises RegistrationFailed if the socket cannot be created.
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
        """Runs one ListAndWatch: awaits send with the published state, if there is one, and with each later state.

        Returns when the server stops serving. Otherwise runs until cancelled or until send raises.
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
    """Adapter that adds a servicer to a gRPC server with generic handlers only, which find a method by its name.

    Registered methods are faster, but each keeps a call waiting from the start: 19 KiB for the five.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler[Any, Any], ...]) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Registers no method."""


_Context = grpc.aio.ServicerContext[Any, Any]


class _Servicer:
    """RPCs of the DevicePlugin service, under their names in the kubelet API."""

    def __init__(self, owner: DevicePluginServer) -> None:
        self._owner = owner
        self._list = DeviceList()

    async def GetDevicePluginOptions(self, _request: pb.Empty, _context: _Context) -> pb.DevicePluginOptions:  # noqa: N802
        return self._owner.options

    async def ListAndWatch(self, _request: pb.Empty, context: _Context) -> None:  # noqa: N802
        await self._owner.follow(lambda state: context.write(self._list.message_for(state)))

    async def GetPreferredAllocation(  # noqa: N802
        self, request: pb.PreferredAllocationRequest, context: _Context
    ) -> pb.PreferredAllocationResponse:
        response = pb.PreferredAllocationResponse()
        taken: set[str] = set()
        try:
            for container in request.container_requests:
                ids = self._preferred(container, taken)
                taken.update(ids)
                response.container_responses.add(deviceIDs=ids)
        except PluginError as error:
            await _refuse(context, error)
        return response

    def _preferred(self, request: pb.ContainerPreferredAllocationRequest, taken: set[str]) -> tuple[str, ...]:
        """Returns the preferred devices of one container. Leaves out those in `taken` if enough others are available.

        The kubelet asks for one container at a time (1.37), although the API allows several in one call.
        """
        available, must = request.available_deviceIDs, tuple(request.must_include_deviceIDs)
        elsewhere = taken.difference(must)
        others = [device_id for device_id in available if device_id not in elsewhere]
        size = request.allocation_size
        enough = len(set(others)) >= size
        return self._owner.backend.preferred(self._owner.resource, tuple(others if enough else available), must, size)

    async def Allocate(self, request: pb.AllocateRequest, context: _Context) -> pb.AllocateResponse:  # noqa: N802
        owner = self._owner
        try:
            requests = check_ids(r.devices_ids for r in request.container_requests)
            responses = await owner.backend.allocate_all(owner.resource, requests)
        except PluginError as error:
            await _refuse(context, error)
        return pb.AllocateResponse(container_responses=[_container_response(r) for r in responses])

    async def PreStartContainer(  # noqa: N802
        self, request: pb.PreStartContainerRequest, context: _Context
    ) -> pb.PreStartContainerResponse:
        owner = self._owner
        try:
            ((*ids,),) = check_ids([request.devices_ids])
            await owner.backend.pre_start(owner.resource, tuple(ids))
        except PluginError as error:
            await _refuse(context, error)
        return pb.PreStartContainerResponse()


async def _refuse(context: _Context, error: PluginError) -> NoReturn:
    await context.abort(status_code(error), status_details(error))
