"""Admission of pods with devices: the part of the simulated kubelet that needs no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from usbip_plugin.kubelet.pod_resources import ContainerDevices
from usbip_plugin.model import PodRef
from usbip_plugin.sync import Broadcast
from usbip_sim.kubelet.device_manager import (
    AdmissionError,
    Allocation,
    AllocationKey,
    ContainerSpec,
    DeviceManager,
    Endpoint,
    EndpointError,
)


@dataclass(slots=True)
class PluginRecord:
    """Record of what plugins sent and received, in order.

    registrations: resource name of each accepted registration.
    lists: (resource, {ID: healthy}) of each ListAndWatch message.
    allocates: (resource, IDs) of each Allocate.
    """

    registrations: list[str] = field(default_factory=list)
    lists: list[tuple[str, dict[str, bool]]] = field(default_factory=list)
    allocates: list[tuple[str, frozenset[str]]] = field(default_factory=list)


class Admission:
    """Kubelet that registers plugins, and admits pods one at a time with healthy and free devices.

    changed: fires after every change.
    active: the pods that are admitted or being admitted, and have not ended.
    blind: true while a kubelet that has just started does not know its pods and lists none.
    """

    def __init__(self) -> None:
        self.manager = DeviceManager()
        self.seen = PluginRecord()
        self.changed = Broadcast()
        self.blind = False
        self._one_at_a_time = asyncio.Lock()
        self.active: dict[PodRef, tuple[ContainerSpec, ...]] = {}
        self._endpoints: dict[str, dict[Hashable, Endpoint]] = {}
        self._primary: dict[str, Endpoint] = {}
        self._stopped: dict[str, Endpoint] = {}

    def connect(self, resource: str, place: Hashable, endpoint: Endpoint) -> None:
        """Registers a plugin. Raises ValueError, with the kubelet's message, if a plugin is connected at place.

        place: identifies the plugin, such as its socket path.
        """
        by_place = self._endpoints.setdefault(resource, {})
        if place in by_place:
            raise ValueError(f"device plugin already connected: {place}")
        by_place[place] = self._primary[resource] = endpoint
        self.seen.registrations.append(resource)

    def listed(self, resource: str, devices: Mapping[str, bool]) -> None:
        """Handles a ListAndWatch message: {ID: healthy}."""
        self.seen.lists.append((resource, dict(devices)))
        self.manager.listed(resource, devices.items())
        self.changed.fire()

    def disconnect(self, resource: str, place: Hashable) -> None:
        """Disconnects a plugin. After the last plugin of a resource, all devices of the resource become unhealthy."""
        by_place = self._endpoints.get(resource, {})
        if by_place.pop(place, None) is None:
            return
        if by_place:
            self._primary[resource] = next(iter(by_place.values()))
        else:
            del self._endpoints[resource]
            self._stopped[resource] = self._primary.pop(resource)
            self.manager.disconnected(resource)
        self.changed.fire()

    def disconnect_all(self) -> None:
        """Forgets all plugins and devices, but no allocations, as the end of the kubelet does."""
        self._endpoints.clear()
        self._primary.clear()
        self._stopped.clear()
        self.manager.restart()
        self.changed.fire()

    def connected(self, resource: str) -> bool:
        return resource in self._primary

    def plugins(self, resource: str) -> int:
        return len(self._endpoints.get(resource, ()))

    def asks_before_start(self, resource: str) -> bool:
        """Returns whether the resource's connected plugin requires PreStartContainer."""
        endpoint = self._primary.get(resource)
        return endpoint is not None and endpoint.pre_start_required

    def health(self, resource: str) -> dict[str, bool]:
        """Returns {ID: healthy} of the resource's devices."""
        healthy, unhealthy = self.manager.healthy.get(resource, ()), self.manager.unhealthy.get(resource, ())
        return dict.fromkeys(unhealthy, False) | dict.fromkeys(healthy, True)

    async def wait_for(self, resource: str, predicate: Callable[[dict[str, bool]], bool]) -> dict[str, bool]:
        """Waits until a plugin is connected and predicate(health(resource)) holds; returns health(resource)."""
        await self.changed.until(lambda: self.connected(resource) and predicate(self.health(resource)))
        return self.health(resource)

    async def admit(
        self, pod: PodRef, requests: Mapping[str, int] | Sequence[ContainerSpec]
    ) -> dict[tuple[str, str], Allocation]:
        """Admits a pod and returns {(container, resource): allocation}. Raises AdmissionError if the pod fails.

        requests: the containers, or the limits of a single container named "app".
        """
        containers = (ContainerSpec("app", requests),) if isinstance(requests, Mapping) else tuple(requests)
        async with self._one_at_a_time:
            self.active[pod] = containers
            try:
                await self._admit(pod, containers)
            except BaseException:
                del self.active[pod]
                raise
        self.changed.fire()
        return {key[1:]: allocation for key, allocation in self.manager.checkpoint.items() if key[0] == pod}

    async def start_container(self, pod: PodRef, container: str) -> dict[str, Allocation]:
        """(Re)starts a container: calls PreStartContainer where required, and returns the allocations by resource.

        Raises EndpointError if PreStartContainer fails or its plugin has gone. A restarted kubelet does not know which
        plugins require PreStartContainer until they register again, and starts the container without the call.
        """
        held = {key[2]: a for key, a in self.manager.checkpoint.items() if key[:2] == (pod, container)}
        for resource, allocation in held.items():
            endpoint = self._primary.get(resource)
            stopped = self._stopped.get(resource)
            if endpoint is None and stopped is not None and stopped.pre_start_required:
                raise EndpointError("UNKNOWN", f"endpoint {resource} has been stopped")
            if endpoint is not None and endpoint.pre_start_required:
                await endpoint.pre_start(sorted(allocation.device_ids))
        return held

    def end(self, pod: PodRef) -> None:
        self.active.pop(pod, None)
        self.manager.release_except(self.active)
        self.changed.fire()

    def held(self) -> tuple[ContainerDevices, ...]:
        """Returns what pod-resources lists: the devices of active pods, also of a pod that is being admitted.

        Omits the devices of init containers that end before the others start, and an Allocate in flight. Returns
        nothing while the kubelet is blind.
        """
        if self.blind:
            return ()
        self.manager.release_except(self.active)
        init = {(pod, c.name) for pod, containers in self.active.items() for c in containers if c.passes_on}
        return tuple(
            ContainerDevices(PodRef(key[0].namespace, key[0].name), key[1], key[2], tuple(sorted(a.device_ids)))
            for key, a in self.manager.checkpoint.items()
            if key[:2] not in init
        )

    def in_use(self) -> frozenset[str]:
        """Returns the IDs of the devices that active pods have, including those of their init containers."""
        self.manager.release_except(self.active)
        return frozenset().union(*(allocation.device_ids for allocation in self.manager.checkpoint.values()))

    async def _admit(self, pod: PodRef, containers: tuple[ContainerSpec, ...]) -> None:
        reusable: dict[str, frozenset[str]] = {}
        for container in sorted(containers, key=lambda c: not c.init):
            for resource, needed in container.limits.items():
                if not self.manager.knows(resource):
                    continue
                self.manager.release_except(self.active)
                kept = reusable.get(resource, frozenset())
                got = await self._allocate((pod, container.name, resource), needed, kept)
                reusable[resource] = kept | got if container.passes_on else kept - got

    async def _allocate(self, key: AllocationKey, needed: int, reusable: frozenset[str]) -> frozenset[str]:
        resource = key[2]
        chosen, available, missing = self.manager.start(key, needed, reusable)
        endpoint = self._primary.get(resource)
        if endpoint is None:
            raise AdmissionError(f"endpoint {resource} has been stopped")
        preferred: Sequence[str] = ()
        try:
            if missing and endpoint.preferred_available:
                preferred = await endpoint.preferred(sorted(available | chosen), sorted(chosen), needed)
        except EndpointError as error:
            cause = f"device plugin GetPreferredAllocation rpc failed with err: {error}"
            raise AdmissionError(f"Allocate failed due to {cause}, which is unexpected") from error
        try:
            ids = self.manager.finish(key, chosen, available, missing, preferred)
            if ids:
                self.seen.allocates.append((resource, ids))
                self.manager.insert(key, await endpoint.allocate(sorted(ids)))
        except EndpointError as error:
            raise AdmissionError(f"Allocate failed due to {error}, which is unexpected") from error
        finally:
            self.manager.recount()
        return ids
