"""Which pod uses which device, as the kubelet says (kubelet API podresources/v1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import grpc
import grpc.aio

from usbip_plugin.errors import PodResourcesUnavailable
from usbip_plugin.kubelet import podresources_pb2 as pb
from usbip_plugin.kubelet.podresources_pb2_grpc import PodResourcesListerStub
from usbip_plugin.model import PodRef

LIST_TIMEOUT_S = 5.0
# A pod with a few devices is below 1 KiB: room for the largest nodes, and still a bound.
MAX_RESPONSE_BYTES = 16 << 20
RECONNECT_MAX_MS = 1000


@dataclass(frozen=True, slots=True)
class ContainerDevices:
    """The devices of one resource that one container has. resource is the full name; pod carries no uid."""

    pod: PodRef
    container: str
    resource: str
    device_ids: tuple[str, ...]


class PodResources(Protocol):
    """Who uses what on this node."""

    async def list(self) -> tuple[ContainerDevices, ...]:
        """What admitted, unfinished pods hold of our resources; PodResourcesUnavailable if nobody can say.

        Not in it: an Allocate in flight; what only an ordinary (not restartable) init container holds. In it, before
        Kubernetes 1.34: pods that have ended and are not deleted yet.
        """
        ...


def of_domain(response: pb.ListPodResourcesResponse, domain: str) -> tuple[ContainerDevices, ...]:
    """The entries for resources named <domain>/..., in the order of the response. One container and resource may have
    several entries (the kubelet makes one per NUMA node)."""
    prefix = domain + "/"
    return tuple(
        ContainerDevices(
            PodRef(pod.namespace, pod.name), container.name, devices.resource_name, tuple(devices.device_ids)
        )
        for pod in response.pod_resources
        for container in pod.containers
        for devices in container.devices
        if devices.resource_name.startswith(prefix)
    )


class GrpcPodResources:
    """The real one, over the kubelet's unix socket. Connects when first used, and again after a kubelet restart."""

    def __init__(self, socket: Path, domain: str) -> None:
        self._socket = socket
        self._domain = domain
        self._channel = grpc.aio.insecure_channel(
            f"unix:{socket}",
            options=(
                ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
                ("grpc.use_local_subchannel_pool", 1),
            ),
        )
        self._stub = PodResourcesListerStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close(None)

    async def list(self) -> tuple[ContainerDevices, ...]:
        """See PodResources.list. Ends within LIST_TIMEOUT_S; cancel-safe."""
        try:
            response: pb.ListPodResourcesResponse | None = await self._stub.List(
                pb.ListPodResourcesRequest(), timeout=LIST_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise PodResourcesUnavailable(
                f"pod-resources at {self._socket}: {error.code().name}: {error.details()}"
            ) from error
        if response is None:  # gRPC's way to say that it cannot decode the answer
            raise PodResourcesUnavailable(f"pod-resources at {self._socket}: an answer that cannot be read")
        return of_domain(response, self._domain)
