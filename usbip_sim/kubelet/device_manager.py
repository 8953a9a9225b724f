"""What a kubelet remembers of devices: the bookkeeping of its device manager, without I/O.

Follows pkg/kubelet/cm/devicemanager/manager.go of Kubernetes 1.37, without NUMA topology.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from usbip_plugin.attach.containers import DeviceSpec
from usbip_plugin.model import PodRef

PRE_START_TIMEOUT_S = 30.0
"""The only deadline a kubelet sets a plugin."""


class AdmissionError(Exception):
    """The pod fails with UnexpectedAdmissionError and this message; it is not tried again."""


class EndpointError(Exception):
    """A plugin answered an RPC with an error, or went away during it. code: the gRPC status, such as "NOT_FOUND"."""

    def __init__(self, code: str, details: str) -> None:
        self.code, self.details = code, details
        super().__init__(f"rpc error: code = {code} desc = {details}")


class KubeletPanic(Exception):
    """A plugin has answered an Allocate of a device that its last list has not: a real kubelet ends there and then.

    It looks up the topology of what was allocated (1.37, allocateContainerResources), and finds nothing.
    """


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """A container as far as devices go. limits: full resource name -> count. restartable: an init container that
    stays, as a sidecar."""

    name: str
    limits: Mapping[str, int]
    init: bool = False
    restartable: bool = False

    @property
    def passes_on(self) -> bool:
        """Whether it has ended before the next containers start, which are given its devices."""
        return self.init and not self.restartable


@dataclass(frozen=True, slots=True)
class Allocation:
    """The checkpoint's entry for one container and resource, with what the plugin answered."""

    device_ids: frozenset[str]
    envs: Mapping[str, str]
    devices: tuple[DeviceSpec, ...] = ()
    cdi_devices: tuple[str, ...] = ()


AllocationKey = tuple[PodRef, str, str]
"""(pod, container, resource)"""


class Endpoint(Protocol):
    """A connected plugin of one resource. The calls raise EndpointError and set no deadline but pre_start's."""

    preferred_available: bool
    pre_start_required: bool

    async def preferred(self, available: Sequence[str], must: Sequence[str], size: int) -> Sequence[str]: ...

    async def allocate(self, ids: Sequence[str]) -> Allocation: ...

    async def pre_start(self, ids: Sequence[str]) -> None: ...


@dataclass(slots=True)
class DeviceManager:
    """healthy/unhealthy: by resource, as last listed. checkpoint: survives restart()."""

    healthy: dict[str, set[str]] = field(default_factory=dict)
    unhealthy: dict[str, set[str]] = field(default_factory=dict)
    checkpoint: dict[AllocationKey, Allocation] = field(default_factory=dict)
    _taken: dict[str, set[str]] = field(default_factory=dict)

    def listed(self, resource: str, devices: Iterable[tuple[str, bool]]) -> None:
        """A ListAndWatch message: (ID, healthy). Replaces all that was known of the resource."""
        known = dict(devices)
        self.healthy[resource] = {id_ for id_, healthy in known.items() if healthy}
        self.unhealthy[resource] = {id_ for id_, healthy in known.items() if not healthy}

    def disconnected(self, resource: str) -> None:
        """The plugin's stream ended: every device of the resource counts as unhealthy."""
        self.unhealthy[resource] = self.unhealthy.get(resource, set()) | self.healthy.get(resource, set())
        self.healthy[resource] = set()

    def restart(self) -> None:
        """The kubelet starts anew: devices are forgotten until plugins register, allocations are not."""
        for resource in self.healthy.keys() | {key[2] for key in self.checkpoint}:
            self.healthy[resource] = set()
            self.unhealthy[resource] = set()
        self.recount()

    def knows(self, resource: str) -> bool:
        """False: admission ignores the resource, as for one no plugin ever registered."""
        return resource in self.healthy

    def allocatable(self, resource: str) -> int:
        """What the node status says."""
        return len(self.healthy.get(resource, ()))

    def taken(self, resource: str) -> frozenset[str]:
        """Allocated, or in an Allocate now."""
        return frozenset(self._taken.get(resource, ()))

    def start(
        self, key: AllocationKey, needed: int, reusable: frozenset[str]
    ) -> tuple[frozenset[str], frozenset[str], int]:
        """First half of choosing devices: (chosen out of reusable, available for the rest, how many are missing).

        Nothing chosen and nothing missing: the container has its devices already. AdmissionError when it cannot work.
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
        """Second half, after GetPreferredAllocation: preferred ones that are available first, then any. Takes them."""
        wish = [id_ for id_ in dict.fromkeys(preferred) if id_ in available]
        rest = sorted(available.difference(wish))
        result = chosen.union([*wish, *rest][:missing])
        self._taken.setdefault(key[2], set()).update(result)
        return result

    def insert(self, key: AllocationKey, allocation: Allocation) -> None:
        """Allocate succeeded: into the checkpoint. KubeletPanic if the list does not have the device any more."""
        listed = self.healthy.get(key[2], set()) | self.unhealthy.get(key[2], set())
        if not allocation.device_ids <= listed:
            raise KubeletPanic(f"nil pointer dereference: {key[2]} {sorted(allocation.device_ids - listed)}")
        self.checkpoint[key] = allocation
        self.recount()

    def release_except(self, pods: Iterable[PodRef]) -> None:
        """Frees what pods hold that are no longer active."""
        active = set(pods)
        for key in [key for key in self.checkpoint if key[0] not in active]:
            del self.checkpoint[key]
        self.recount()

    def recount(self) -> None:
        """What is taken is what the checkpoint says: after an Allocate, whatever became of it."""
        self._taken.clear()
        for (_, _, resource), allocation in self.checkpoint.items():
            self._taken.setdefault(resource, set()).update(allocation.device_ids)
