"""Bookkeeping of a kubelet's device manager, without I/O.

Follows pkg/kubelet/cm/devicemanager/manager.go of Kubernetes 1.37, without NUMA topology.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from usbip_plugin.attach.containers import DeviceSpec
from usbip_plugin.model import PodRef

PRE_START_TIMEOUT_S = 30.0
"""Seconds that a kubelet waits for PreStartContainer. It sets a plugin's device calls no other deadline."""


class AdmissionError(Exception):
    """Failure of a pod with UnexpectedAdmissionError and this message. The kubelet does not try the pod again."""


class EndpointError(Exception):
    """Failure of an RPC to a plugin, which answered with an error or went away.

    code: the gRPC status, such as "NOT_FOUND".
    """

    def __init__(self, code: str, details: str) -> None:
        self.code, self.details = code, details
        super().__init__(f"rpc error: code = {code} desc = {details}")


class KubeletPanic(Exception):
    """Panic of a kubelet that allocated a device missing from the plugin's last list.

    A real kubelet looks up the topology of that device (1.37, allocateContainerResources), finds nothing, and ends.
    """


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """Container of a pod, reduced to its devices.

    limits: count by full resource name.
    init: an init container.
    restartable: an init container that keeps running, as a sidecar.
    """

    name: str
    limits: Mapping[str, int]
    init: bool = False
    restartable: bool = False

    @property
    def passes_on(self) -> bool:
        """Whether the container ends before the next containers start, which then get its devices."""
        return self.init and not self.restartable


@dataclass(frozen=True, slots=True)
class Allocation:
    """Checkpoint entry for one container and resource, with the plugin's Allocate answer."""

    device_ids: frozenset[str]
    envs: Mapping[str, str]
    devices: tuple[DeviceSpec, ...] = ()
    cdi_devices: tuple[str, ...] = ()


AllocationKey = tuple[PodRef, str, str]
"""Key of an allocation in the checkpoint: (pod, container, resource)."""


class Endpoint(Protocol):
    """Connected plugin of one resource. The calls raise EndpointError; only pre_start sets a deadline."""

    preferred_available: bool
    pre_start_required: bool

    async def preferred(self, available: Sequence[str], must: Sequence[str], size: int) -> Sequence[str]: ...

    async def allocate(self, ids: Sequence[str]) -> Allocation: ...

    async def pre_start(self, ids: Sequence[str]) -> None: ...


@dataclass(slots=True)
class DeviceManager:
    """Devices and allocations that a kubelet knows.

    healthy, unhealthy: IDs of devices by resource, as last listed.
    checkpoint: allocations; survives restart().
    """

    healthy: dict[str, set[str]] = field(default_factory=dict)
    unhealthy: dict[str, set[str]] = field(default_factory=dict)
    checkpoint: dict[AllocationKey, Allocation] = field(default_factory=dict)
    _taken: dict[str, set[str]] = field(default_factory=dict)

    def listed(self, resource: str, devices: Iterable[tuple[str, bool]]) -> None:
        """Handles a ListAndWatch message of (ID, healthy), which replaces the resource's earlier devices."""
        known = dict(devices)
        self.healthy[resource] = {id_ for id_, healthy in known.items() if healthy}
        self.unhealthy[resource] = {id_ for id_, healthy in known.items() if not healthy}

    def disconnected(self, resource: str) -> None:
        """Marks every device of the resource as unhealthy, after its plugin's stream has ended."""
        self.unhealthy[resource] = self.unhealthy.get(resource, set()) | self.healthy.get(resource, set())
        self.healthy[resource] = set()

    def restart(self) -> None:
        """Forgets the devices until plugins register again. Keeps the allocations."""
        for resource in self.healthy.keys() | {key[2] for key in self.checkpoint}:
            self.healthy[resource] = set()
            self.unhealthy[resource] = set()
        self.recount()

    def knows(self, resource: str) -> bool:
        """Returns whether a plugin ever registered the resource. Admission ignores any other resource."""
        return resource in self.healthy

    def allocatable(self, resource: str) -> int:
        """Returns the resource's count in the Node's status.allocatable: the number of healthy devices."""
        return len(self.healthy.get(resource, ()))

    def taken(self, resource: str) -> frozenset[str]:
        """Returns the IDs of the resource's devices that are allocated or in an Allocate."""
        return frozenset(self._taken.get(resource, ()))

    def start(
        self, key: AllocationKey, needed: int, reusable: frozenset[str]
    ) -> tuple[frozenset[str], frozenset[str], int]:
        """Starts the choice of devices. Returns (chosen out of reusable, available for the rest, number missing).

        Nothing chosen and nothing missing: the container has its devices already. Raises AdmissionError.
        """
        resource = key[2]
        held = self.checkpoint.get(key)
        if held is not None:
            if len(held.device_ids) != needed:
                raise AdmissionError(
                    f"container {key[1]!r} changed request for {resource} from {len(held.device_ids)} to {needed}"
                )
            needed = 0
        healthy = self.healthy[resource]
        if not healthy:
            raise AdmissionError(f"no healthy devices present; cannot allocate unhealthy devices {resource}")
        if held is not None and not held.device_ids <= healthy:
            raise AdmissionError(
                f"previously allocated devices are no longer healthy; cannot allocate unhealthy devices {resource}"
            )
        chosen = frozenset(sorted(reusable)[:needed])
        available = frozenset(healthy - self._taken.get(resource, set()))
        missing = needed - len(chosen)
        if len(available) < missing:
            raise AdmissionError(
                f"requested number of devices unavailable for {resource}."
                f" Requested: {missing}, Available: {len(available)}"
            )
        return chosen, available, missing

    def finish(
        self,
        key: AllocationKey,
        chosen: frozenset[str],
        available: frozenset[str],
        missing: int,
        preferred: Iterable[str],
    ) -> frozenset[str]:
        """Adds the missing devices, preferred ones first, and marks the result as taken."""
        first = [id_ for id_ in dict.fromkeys(preferred) if id_ in available]
        rest = sorted(available.difference(first))
        result = chosen.union([*first, *rest][:missing])
        self._taken.setdefault(key[2], set()).update(result)
        return result

    def insert(self, key: AllocationKey, allocation: Allocation) -> None:
        """Writes a successful Allocate into the checkpoint. Raises KubeletPanic if a device is not listed any more."""
        listed = self.healthy.get(key[2], set()) | self.unhealthy.get(key[2], set())
        if not allocation.device_ids <= listed:
            raise KubeletPanic(f"nil pointer dereference: {key[2]} {sorted(allocation.device_ids - listed)}")
        self.checkpoint[key] = allocation
        self.recount()

    def release_except(self, pods: Iterable[PodRef]) -> None:
        """Frees the devices of all pods but the given active ones."""
        active = set(pods)
        for key in [key for key in self.checkpoint if key[0] not in active]:
            del self.checkpoint[key]
        self.recount()

    def recount(self) -> None:
        """Marks exactly the checkpoint's devices as taken. Needed after each Allocate, whether or not it succeeded."""
        self._taken.clear()
        for (_, _, resource), allocation in self.checkpoint.items():
            self._taken.setdefault(resource, set()).update(allocation.device_ids)
