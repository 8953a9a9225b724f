"""Reads from the kubelet's pod-resources API which pod uses which device, and ends claims that no pod uses.

The plugin needs both pod-resources and the API server. The API server forgets a pod before its containers have ended. A
kubelet that has just started answers with a list without pods while they run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import grpc
import grpc.aio

from usbip_plugin.attach.adopt import Adopter
from usbip_plugin.attach.usage import Unlisted, UsageTracker, not_in_list
from usbip_plugin.claims import IN_USE, ClaimBook, DeviceUser
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import PodResourcesUnavailable
from usbip_plugin.kube.pods import PodView
from usbip_plugin.kubelet import podresources_pb2 as pb
from usbip_plugin.kubelet.device_plugin import short_name
from usbip_plugin.kubelet.podresources_pb2_grpc import PodResourcesListerStub
from usbip_plugin.locks.manager import LockManager
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import PodRef
from usbip_plugin.sync import done_within

log = logging.getLogger(__name__)

LIST_TIMEOUT_S = 5.0
"""Maximum duration of one List call, in seconds."""
MAX_RESPONSE_BYTES = 16 << 20
"""Maximum size of one List response in bytes: enough for the largest nodes, as a pod takes less than 1 KiB."""
RECONNECT_MAX_MS = 1000
"""Maximum wait in milliseconds before gRPC connects again to the kubelet's socket."""


@dataclass(frozen=True, slots=True)
class ContainerDevices:
    """The devices of one resource that one container has. pod: without a uid. resource: the full name."""

    pod: PodRef
    container: str
    resource: str
    device_ids: tuple[str, ...]


class PodResources(Protocol):
    """Source of which containers on this node have which devices."""

    async def list(self) -> tuple[ContainerDevices, ...]:
        """Returns the devices of our resources that admitted, unfinished pods have.

        Raises PodResourcesUnavailable if they cannot be listed. The list lacks an Allocate in flight, and devices that
        only an ordinary (not restartable) init container has. Before Kubernetes 1.34, it includes pods that have ended
        and are not deleted yet.
        """


def of_domain(response: pb.ListPodResourcesResponse, domain: str) -> tuple[ContainerDevices, ...]:
    """Returns the entries for resources named <domain>/..., in the order of the response.

    One container and resource may have several entries, because the kubelet makes one per NUMA node.
    """
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
    """PodResources over the kubelet's unix socket. Connects when first used, and again after a kubelet restart."""

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

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close(None)

    async def list(self) -> tuple[ContainerDevices, ...]:
        """Ends within LIST_TIMEOUT_S. Cancel-safe."""
        try:
            response: pb.ListPodResourcesResponse | None = await self._stub.List(
                pb.ListPodResourcesRequest(), timeout=LIST_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise PodResourcesUnavailable(
                f"pod-resources at {self._socket}: {error.code().name}: {error.details()}"
            ) from error
        if response is None:  # gRPC returns None if it cannot decode the answer
            raise PodResourcesUnavailable(f"pod-resources at {self._socket}: the answer cannot be decoded")
        return of_domain(response, self._domain)


POLL_INTERVAL = 2.0
"""Seconds between polls of pod-resources while this node has claims."""
HINTED_INTERVAL = 0.25
"""Seconds between polls after a hint that a pod has ended, or while a claim has no pod yet.

Between two of them, the next pod is bound if one waits for the device: a scheduler needs 0.05 s, if busy up to 0.2 s.
"""
HINT_LASTS = 5.0
"""Seconds for which a hint counts. The kubelet frees a pod's devices a moment after the pod's status is final."""


class PodResourcesWatcher:
    """Polls pod-resources, records the pods of this node's claims, and ends claims that no pod uses.

    Polls only while this node has claims, or locks without a claim, or until a previous process's claims are adopted.
    """

    def __init__(
        self,
        context: NodeContext,
        *,
        pod_resources: PodResources,
        pods: PodView | None,
        locks: LockManager,
        claims: ClaimBook,
        usage: UsageTracker,
        adopter: Adopter,
        domain: str,
    ) -> None:
        """Subscribes to the claims. pods: as the API server has them; None where there is no such source."""
        self._clock = context.clock
        self._pod_resources = pod_resources
        self._pods = pods
        self._locks = locks
        self._book = claims
        self._usage = usage
        self._adopter = adopter
        self._domain = domain
        self._wake = asyncio.Event()
        self._hinted_until = 0.0
        self._warned = False
        self.polls = 0
        """Number of lists of the kubelet that claims have been compared with."""
        self.turned_at: float | None = None
        """When run() last began a poll (monotonic seconds); None while there is nothing to poll for."""
        self._begun = False
        """Whether all locks and a list of all pods have been seen, so that what an earlier process left is known."""
        self._book.subscribe(self._claim_changed)

    def pod_may_have_ended(self) -> None:
        """Polls now, and every HINTED_INTERVAL for HINT_LASTS seconds. To be called when a pod ends or is about to."""
        self._hinted_until = self._clock.monotonic() + HINT_LASTS
        self._wake.set()

    def _claim_changed(self, _device_id: str) -> None:
        """Wakes run(): there may be claims now where there were none, or a claim whose pod is unknown."""
        if not self._wake.is_set() and self._book.view:
            self._wake.set()

    def _lock_changed(self, change: LockChange) -> None:
        if change.new is not None and self._unclaimed():
            self._wake.set()

    def _unclaimed(self) -> bool:
        return any(not self._book.in_use(lock.device_id) for lock in self._locks.mine())

    async def users(self) -> dict[str, DeviceUser] | None:
        """Returns which pod, not ended, has each device, by device ID; None if the kubelet cannot list them."""
        try:
            listed = await self._pod_resources.list()
        except PodResourcesUnavailable as error:
            if not self._warned:
                log.warning("pod-resources unavailable, releases paused", extra={"cause": str(error)})
            self._warned = True
            return None
        self._warned = False
        users: dict[str, DeviceUser] = {}
        for entry in listed:
            pod = entry.pod
            if self._pods is not None:
                if self._pods.ended(pod.namespace, pod.name):
                    continue  # kubelets before 1.34 list pods that have ended, too
                pod = self._pods.find(pod.namespace, pod.name) or pod  # with its uid
            users |= dict.fromkeys(entry.device_ids, DeviceUser(pod, short_name(entry.resource)))
        return users

    def _unlisted(self, users: Mapping[str, DeviceUser]) -> Unlisted:
        if self._pods is None:
            return Unlisted()
        pods = {claim.pod for claim in self._book.view.values() if claim.pod is not None}
        completed = frozenset(filter(self._pods.completed, pods))
        return not_in_list(users, self._pods.wanting(self._domain), completed, certain=self._pods.synced)

    async def _adopt(self, users: Mapping[str, DeviceUser] | None) -> None:
        """Adopts the locks that name this node, given the users that the kubelet lists (None if unknown).

        A device missing from the list counts as unused only if the API server knows of no pod that may use it.
        """
        complete = False
        if users is not None:
            unlisted = self._unlisted(users)
            complete = unlisted.certain and not unlisted.resources
        also_lost = not self._begun
        all_known = complete or (users is not None and self._pods is None)
        self._begun = self._begun or (all_known and self._locks.ready.is_set())
        await self._adopter.adopt(users or {}, complete=complete, also_lost=also_lost)

    async def adopt(self) -> None:
        """Adopts what a previous process left. Call it once the locks are known. Idempotent."""
        await self._adopt(await self.users())

    async def refresh_users(self, limit: float) -> None:
        """Records for up to limit seconds which pods have which devices. Unlike run(), counts none as missing."""
        if not self._book.view:
            return
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(limit):
                listed_at = self._clock.monotonic()
                users = await self.users()
                if users is not None:
                    self._usage.record_users(users, listed_at)

    async def run(self) -> None:
        """Polls pod-resources, and makes claims of this node's locks that have none. Runs until cancelled."""
        unsubscribe = self._locks.subscribe(self._lock_changed)
        try:
            while True:
                if self._begun and not self._book.view and not self._unclaimed():
                    self.turned_at = None
                    await self._wake.wait()
                self._wake.clear()
                self.turned_at = listed_at = self._clock.monotonic()
                users = await self.users()
                if not self._begun or self._unclaimed():
                    await self._adopt(users)
                if users is not None:
                    self._usage.apply_poll(users, listed_at, self._unlisted(users))
                    self.polls += 1
                closely = self._closely()
                await done_within(
                    self._clock, HINTED_INTERVAL if closely else POLL_INTERVAL, self._until_hinted(closely=closely)
                )
        finally:
            unsubscribe()

    def _closely(self) -> bool:
        return self._clock.monotonic() < self._hinted_until or any(
            claim.missed_polls or claim.pod is None for claim in self._book.view.values() if claim.state in IN_USE
        )

    async def _until_hinted(self, *, closely: bool) -> None:
        """Waits for a hint or, if closely is False, also for a claim that needs polls at HINTED_INTERVAL."""
        before = self._hinted_until
        while self._hinted_until == before and (closely or not self._closely()):
            self._wake.clear()
            await self._wake.wait()
