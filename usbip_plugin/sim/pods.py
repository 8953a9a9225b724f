"""What an API server would say of the pods of a simulated kubelet."""

from __future__ import annotations

from dataclasses import replace

from usbip_plugin.model import PodRef
from usbip_plugin.sim.admission import Admission


class AdmittedPods:
    """A PodView: what the kubelet has admitted and has not ended. A pod without a uid gets one made of its name."""

    def __init__(self, kubelet: Admission) -> None:
        self._kubelet = kubelet
        self._kept: dict[PodRef, frozenset[str]] | None = None
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

    def wanting(self, domain: str) -> frozenset[PodRef]:
        """See PodView.wanting."""
        prefix = domain + "/"
        return frozenset(
            pod for pod, resources in self._view().items() if any(name.startswith(prefix) for name in resources)
        )

    def _view(self) -> dict[PodRef, frozenset[str]]:
        return self._now() if self._kept is None else self._kept

    def _now(self) -> dict[PodRef, frozenset[str]]:
        return {
            replace(pod, uid=pod.uid or f"uid-of-{pod.name}"): frozenset(
                name for container in containers for name in container.limits
            )
            for pod, containers in self._kubelet.active().items()
        }
