"""A simulated kubelet on real unix sockets: the other side of the device-plugin and pod-resources APIs.

Behaves as Kubernetes 1.37 does: admits one pod at a time, sets no deadline on Allocate, keeps allocations over a
restart, and removes the sockets in its directory at start.
"""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from usbip_plugin.attach.containers import DeviceSpec
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet import podresources_pb2 as podpb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub, add_RegistrationServicer_to_server
from usbip_plugin.kubelet.pod_resources import ContainerDevices
from usbip_plugin.kubelet.podresources_pb2_grpc import (
    PodResourcesListerServicer,
    add_PodResourcesListerServicer_to_server,
)
from usbip_sim.kubelet.admission import Admission
from usbip_sim.kubelet.device_manager import PRE_START_TIMEOUT_S, Allocation, EndpointError

KUBELET_SOCKET = "kubelet.sock"
DIAL_TIMEOUT_S = 10.0
"""Limit of GetDevicePluginOptions within a Register call, in seconds."""
SUPPORTED_VERSION = "v1beta1"


class FakeKubelet(Admission):
    """Kubelet on real unix sockets. An async context manager that one task enters and leaves.

    directory: the device-plugins directory, which must exist.
    pod_resources: path of the pod-resources socket; None for no such socket.
    """

    def __init__(self, directory: Path, pod_resources: Path | None = None) -> None:
        super().__init__()
        self.directory = directory
        self._pod_resources = pod_resources
        self._servers: list[grpc.aio.Server] = []
        self._listeners: set[asyncio.Task[None]] = set()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        await self._tasks.__aexit__(None, None, None)

    async def start(self) -> None:
        """Removes every socket from the directory, then serves kubelet.sock and pod-resources."""
        for path in self.directory.iterdir():
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        await self._serve(add_RegistrationServicer_to_server, _Registration(self), self.directory / KUBELET_SOCKET)
        if self._pod_resources is not None:
            await self._serve(add_PodResourcesListerServicer_to_server, _PodResources(self), self._pod_resources)

    async def _serve(self, add: Callable[[Any, grpc.aio.Server], None], servicer: object, path: Path) -> None:
        server = grpc.aio.server()
        add(servicer, server)
        server.add_insecure_port(f"unix:{path}")
        self._servers.append(server)
        await server.start()

    async def stop(self) -> None:
        """Stops the kubelet: its connections break, and the plugins' sockets stay in the directory."""
        # Refuse registrations first: a plugin whose stream ends registers again at once.
        for server in self._servers:
            await server.stop(None)
        self._servers.clear()
        listeners = tuple(self._listeners)
        self.disconnect_all()
        for task in listeners:
            task.cancel()
        if listeners:
            await asyncio.wait(listeners)

    async def restart(self) -> None:
        """Stops and starts the kubelet, which forgets the devices until plugins register again."""
        await self.stop()
        await self.start()

    async def dial(self, resource: str, path: Path) -> None:
        """Connects to a plugin within Register. Raises ValueError or EndpointError if the kubelet refuses it."""
        endpoint = _GrpcEndpoint(path)
        try:
            await endpoint.ask_options()
            self.connect(resource, path, endpoint)
        except (ValueError, EndpointError, asyncio.CancelledError):
            await endpoint.channel.close(None)
            raise
        task = self._tasks.create_task(self._listen(resource, path, endpoint))
        self._listeners.add(task)
        task.add_done_callback(self._listeners.discard)

    async def _listen(self, resource: str, path: Path, endpoint: _GrpcEndpoint) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(endpoint.channel.close, None)
            stack.callback(self.disconnect, resource, path)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for message in endpoint.stub.ListAndWatch(pb.Empty()):
                    self.listed(resource, {device.ID: device.health == "Healthy" for device in message.devices})


class _GrpcEndpoint:
    def __init__(self, path: Path) -> None:
        # A pool of its own: each dial of a kubelet makes a new connection.
        options = (("grpc.use_local_subchannel_pool", 1),)
        self.channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)
        self.stub = DevicePluginStub(self.channel)
        self.preferred_available = False
        self.pre_start_required = False

    async def ask_options(self) -> None:
        options = await _call(self.stub.GetDevicePluginOptions(pb.Empty(), timeout=DIAL_TIMEOUT_S, wait_for_ready=True))
        self.preferred_available = options.get_preferred_allocation_available
        self.pre_start_required = options.pre_start_required

    async def preferred(self, available: Sequence[str], must: Sequence[str], size: int) -> Sequence[str]:
        container = pb.ContainerPreferredAllocationRequest(
            available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
        )
        request = pb.PreferredAllocationRequest(container_requests=[container])
        answer = await _call(self.stub.GetPreferredAllocation(request))
        return tuple(answer.container_responses[0].deviceIDs) if answer.container_responses else ()

    async def allocate(self, ids: Sequence[str]) -> Allocation:
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
        answer = await _call(self.stub.Allocate(request))
        if not answer.container_responses:
            raise EndpointError("INTERNAL", "no containers return in allocation response")
        container = answer.container_responses[0]
        return Allocation(
            frozenset(ids),
            dict(container.envs),
            tuple(DeviceSpec(d.host_path, d.container_path, d.permissions) for d in container.devices),
            tuple(d.name for d in container.cdi_devices),
        )

    async def pre_start(self, ids: Sequence[str]) -> None:
        await _call(
            self.stub.PreStartContainer(pb.PreStartContainerRequest(devices_ids=ids), timeout=PRE_START_TIMEOUT_S)
        )


async def _call(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise EndpointError(error.code().name, error.details() or "") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # The channel was closed during the call; grpc.aio reports that as a cancellation.
        raise EndpointError("CANCELLED", "grpc: the client connection is closing") from None


class _Registration:
    def __init__(self, kubelet: FakeKubelet) -> None:
        self._kubelet = kubelet

    async def Register(  # noqa: N802
        self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext[pb.RegisterRequest, pb.Empty]
    ) -> pb.Empty:
        if request.version != SUPPORTED_VERSION:
            await context.abort(grpc.StatusCode.UNKNOWN, f"unsupported plugin API version {request.version!r}")
        if "/" not in request.resource_name:
            await context.abort(grpc.StatusCode.UNKNOWN, f"invalid resource name {request.resource_name!r}")
        try:
            await self._kubelet.dial(request.resource_name, self._kubelet.directory / request.endpoint)
        except (ValueError, EndpointError) as error:
            await context.abort(grpc.StatusCode.UNKNOWN, str(error))
        return pb.Empty()


class _PodResources(PodResourcesListerServicer):  # type: ignore[misc]  # generated code has no types
    def __init__(self, kubelet: FakeKubelet) -> None:
        self._kubelet = kubelet

    async def List(  # noqa: N802
        self,
        _request: podpb.ListPodResourcesRequest,
        _context: grpc.aio.ServicerContext[podpb.ListPodResourcesRequest, podpb.ListPodResourcesResponse],
    ) -> podpb.ListPodResourcesResponse:
        return _listed(self._kubelet.held())


def _listed(entries: Sequence[ContainerDevices]) -> podpb.ListPodResourcesResponse:
    answer = podpb.ListPodResourcesResponse()
    for pod, of_pod in groupby(sorted(entries, key=lambda e: (e.pod, e.container)), key=lambda e: e.pod):
        listed = answer.pod_resources.add(name=pod.name, namespace=pod.namespace)
        for container, of_container in groupby(of_pod, key=lambda e: e.container):
            devices = [podpb.ContainerDevices(resource_name=e.resource, device_ids=e.device_ids) for e in of_container]
            listed.containers.add(name=container, devices=devices)
    return answer
