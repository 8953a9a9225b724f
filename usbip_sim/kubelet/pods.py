"""The API server's view of the pods of a simulated kubelet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from usbip_plugin.kube.pods import of_domain
from usbip_plugin.model import PodRef
from usbip_sim.kubelet.admission import Admission
from usbip_sim.kubelet.device_manager import ContainerSpec


class AdmittedPods:
    """PodView of the pods that the kubelet has admitted and not ended. A pod without a uid gets one from its name.

    bound: pods that are bound to the node, and that its kubelet has not admitted yet.
    over: pods that have ended by themselves.
    """

    def __init__(self, kubelet: Admission) -> None:
        self._kubelet = kubelet
        self._kept: dict[PodRef, Mapping[str, int]] | None = None
        self.synced = True
        self.bound: dict[PodRef, Sequence[ContainerSpec]] = {}
        self.over: set[PodRef] = set()

    def hold(self, *, synced: bool) -> None:
        """Freezes the view until resume(), as a broken pod watch does. synced: the break is not noticed yet."""
        self.synced = synced
        if self._kept is None:
            self._kept = self._now()

    def resume(self) -> None:
        self.synced = True
        self._kept = None

    def find(self, namespace: str, name: str) -> PodRef | None:
        return next((pod for pod in self._view() if (pod.namespace, pod.name) == (namespace, name)), None)

    def ended(self, namespace: str, name: str) -> bool:  # noqa: ARG002 (PodView's interface)
        """Returns False: this view does not know a pod that has ended. See PodView.ended."""
        return False

    def completed(self, pod: PodRef) -> bool:
        return pod in self.over

    def wanting(self, domain: str) -> Mapping[PodRef, Mapping[str, int]]:
        requested = {pod: of_domain(resources, domain) for pod, resources in self._view().items()}
        return {pod: counts for pod, counts in requested.items() if counts}

    def _view(self) -> dict[PodRef, Mapping[str, int]]:
        return self._now() if self._kept is None else self._kept

    def _now(self) -> dict[PodRef, Mapping[str, int]]:
        return {
            replace(pod, uid=pod.uid or f"uid-of-{pod.name}"): _allocated(containers)
            for pod, containers in {**self.bound, **self._kubelet.active}.items()
        }


def _allocated(containers: Sequence[ContainerSpec]) -> Mapping[str, int]:
    """Returns how many devices of each resource a kubelet allocates for these containers; see PodState.resources."""
    total, most = Counter[str](), Counter[str]()
    for container in sorted(containers, key=lambda c: not c.init):
        if container.passes_on:
            most |= total + Counter(container.limits)
        else:
            total.update(container.limits)
    return most | total
