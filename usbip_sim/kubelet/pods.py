"""What an API server would say of the pods of a simulated kubelet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from usbip_plugin.kube.pods import of_domain
from usbip_plugin.model import PodRef
from usbip_sim.kubelet.admission import Admission
from usbip_sim.kubelet.device_manager import ContainerSpec


class AdmittedPods:
    """A PodView: what the kubelet has admitted and has not ended. A pod without a uid gets one made of its name."""

    def __init__(self, kubelet: Admission) -> None:
        self._kubelet = kubelet
        self._kept: dict[PodRef, Mapping[str, int]] | None = None
        self.synced = True

    def hold(self, *, synced: bool) -> None:
        """From now on nothing new is told. synced: and nobody has noticed that yet."""
        self.synced = synced
        if self._kept is None:
            self._kept = self._now()

    def resume(self) -> None:
        self.synced = True
        self._kept = None

    def find(self, namespace: str, name: str) -> PodRef | None:
        """See PodView.find."""
        return next((pod for pod in self._view() if (pod.namespace, pod.name) == (namespace, name)), None)

    def ended(self, namespace: str, name: str) -> bool:  # noqa: ARG002 (PodView's interface)
        """See PodView.ended. A pod that ended is not known any more."""
        return False

    def wanting(self, domain: str) -> Mapping[PodRef, Mapping[str, int]]:
        """See PodView.wanting."""
        found = {pod: of_domain(resources, domain) for pod, resources in self._view().items()}
        return {pod: counts for pod, counts in found.items() if counts}

    def _view(self) -> dict[PodRef, Mapping[str, int]]:
        return self._now() if self._kept is None else self._kept

    def _now(self) -> dict[PodRef, Mapping[str, int]]:
        return {
            replace(pod, uid=pod.uid or f"uid-of-{pod.name}"): _allocated(containers)
            for pod, containers in self._kubelet.active().items()
        }


def _allocated(containers: Sequence[ContainerSpec]) -> Mapping[str, int]:
    """See PodState.resources."""
    total, most = Counter[str](), Counter[str]()
    for container in sorted(containers, key=lambda c: not c.init):
        if container.passes_on:
            most |= total + Counter(container.limits)
        else:
            total.update(container.limits)
    return most | total
