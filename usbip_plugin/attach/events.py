"""What happens to a device that people should hear of, and the Kubernetes Events it becomes (docs/events.md)."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.errors import LockHeld, PluginError
from usbip_plugin.kube.events import NORMAL, WARNING, EventText
from usbip_plugin.model import Attachment, DeviceKey, Lock, PodRef


class Regarding(enum.Enum):
    """What an Event is recorded on."""

    POD = "the pod, or this node while the pod is not known"
    NODE = "this node"
    BOTH = "the pod, if it is known, and this node"


class EventKind(enum.Enum):
    """(type, reason, action, object) of the Event."""

    ATTACHED = (NORMAL, "DeviceAttached", "Attach", Regarding.POD)
    LOST = (WARNING, "DeviceLost", "Reattach", Regarding.POD)
    REATTACHED = (NORMAL, "DeviceReattached", "Reattach", Regarding.POD)
    NODES_CHANGED = (WARNING, "DeviceNodesChanged", "Reattach", Regarding.POD)
    NODES_LATE = (WARNING, "DeviceNodesLate", "Attach", Regarding.POD)
    NETWORK = (WARNING, "DeviceNetworkInterface", "Attach", Regarding.POD)
    MOVED = (NORMAL, "DeviceMoved", "Reattach", Regarding.POD)
    NOT_REATTACHED = (WARNING, "DeviceNotReattached", "Reattach", Regarding.POD)
    RESTART_NEEDED = (WARNING, "DeviceNodesChanged", "Restart", Regarding.POD)
    EVICTED = (WARNING, "DevicePodEvicted", "Evict", Regarding.POD)
    DENIED = (WARNING, "DeviceDenied", "Allocate", Regarding.NODE)
    FAILED = (WARNING, "DeviceAllocateFailed", "Allocate", Regarding.NODE)
    TAKEN_OVER = (WARNING, "DeviceTakenOver", "TakeOver", Regarding.BOTH)
    LOCK_LOST = (WARNING, "DeviceLockLost", "Withdraw", Regarding.BOTH)


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """One happening; text is one sentence. pod is None while nobody knows whose it is, key where it may be several."""

    what: EventKind
    key: DeviceKey | None
    text: str
    pod: PodRef | None = None


class EventSink(Protocol):
    """Where the parts of a node report what happens to its devices."""

    def __call__(self, notice: DeviceEvent, /) -> None:
        """Records one happening. Returns at once and never raises."""
        ...


def attached(key: DeviceKey, attachment: Attachment | None, port: int | None, pod: PodRef) -> DeviceEvent:
    """Said when the pod becomes known."""
    node = f" as {attachment.nodes[0].path}" if attachment is not None and attachment.nodes else ""
    return DeviceEvent(EventKind.ATTACHED, key, f"attached on vhci port {port}{node}", pod)


def late_nodes(key: DeviceKey, paths: Sequence[str], pod: PodRef | None, *, by_cdi: bool) -> DeviceEvent:
    """Device nodes that came when the Allocate had been answered."""
    cure = "a container has them when it is started again" if by_cdi else "a pod has them only when it is created anew"
    hint = "name their kinds in children, so that an Allocate waits for them"
    return DeviceEvent(EventKind.NODES_LATE, key, f"{', '.join(paths)} came after the Allocate: {cure}; {hint}", pod)


def network(key: DeviceKey, names: Sequence[str], pod: PodRef) -> DeviceEvent:
    """What a device has that no container gets."""
    text = f"its network interface {', '.join(names)} stays on the node: it is no device node"
    return DeviceEvent(EventKind.NETWORK, key, text, pod)


def refused(resource: str, error: PluginError) -> DeviceEvent:
    """A failed Allocate, with the words that its pod has from the kubelet: who holds the device, or what failed."""
    return DeviceEvent(
        EventKind.DENIED if isinstance(error, LockHeld) else EventKind.FAILED, None, f"{resource}: {error}"
    )


def taken_over(key: DeviceKey, former: Lock, node: str) -> DeviceEvent:
    """pod: the one that had the device on the node that fell silent."""
    text = f"node {node} took it over from node {former.holder}, whose lock had expired"
    return DeviceEvent(EventKind.TAKEN_OVER, key, text, former.pod)


def evicted(pod: PodRef, keys: Iterable[DeviceKey]) -> DeviceEvent:
    """The API server accepted the eviction."""
    devices = ", ".join(map(str, sorted(keys))) or "its device"
    return DeviceEvent(EventKind.EVICTED, None, f"evicted, because {devices} came back under other device nodes", pod)


def events_of(notice: DeviceEvent) -> tuple[tuple[EventText, PodRef | None], ...]:
    """The Events to record: each about the pod, or about this node where that is None. A node's names the pod."""
    kind, reason, action, about = notice.what.value
    note = f"{notice.key}: {notice.text}" if notice.key is not None else notice.text
    found: list[tuple[EventText, PodRef | None]] = []
    if notice.pod is not None and about is not Regarding.NODE:
        found.append((EventText(kind, reason, action, note), notice.pod))
    if about is not Regarding.POD or not found:
        whose = f" (pod {notice.pod})" if notice.pod is not None else ""
        found.append((EventText(kind, reason, action, note + whose), None))
    return tuple(found)
