"""Device events that people should know of, and the Kubernetes Events that they become (docs/reference/events.md)."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.errors import LockHeld, PluginError
from usbip_plugin.kube.events import NORMAL, WARNING, EventText
from usbip_plugin.model import Attachment, DeviceKey, Lock, PodRef


class Regarding(enum.Enum):
    """The object on which a Kubernetes Event is recorded."""

    POD = "the pod, or this node while the pod is not known"
    NODE = "this node"
    BOTH = "the pod, if it is known, and this node"


class EventKind(enum.Enum):
    """The kinds of device events, each with the (type, reason, action, object) of its Kubernetes Event."""

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
    """Something that has happened to a device.

    key: the device; None if there may be several.
    text: one sentence.
    pod: the pod that has the device; None while it is not known.
    """

    what: EventKind
    key: DeviceKey | None
    text: str
    pod: PodRef | None = None


class Reattach(enum.Enum):
    """The result of one try to re-attach a lost device."""

    SAME_NODES = "same_nodes"
    OTHER_NODES = "other_nodes"
    FAILED = "failed"


class EventSink(Protocol):
    """The function to which the parts of a node's agent report what happens to its devices."""

    def __call__(self, notice: DeviceEvent, /) -> None:
        """Records one device event. Returns at once and never raises."""
        ...


def attached(key: DeviceKey, attachment: Attachment | None, port: int | None, pod: PodRef) -> DeviceEvent:
    """Returns the event that a device is attached. To be recorded when its pod becomes known."""
    node = f" as {attachment.nodes[0].path}" if attachment is not None and attachment.nodes else ""
    return DeviceEvent(EventKind.ATTACHED, key, f"attached on vhci port {port}{node}", pod)


def late_nodes(key: DeviceKey, paths: Sequence[str], pod: PodRef | None, *, by_cdi: bool) -> DeviceEvent:
    """Returns the event that device nodes came after the Allocate was answered."""
    cure = "restart the container to use them" if by_cdi else "recreate the pod to use them"
    hint = "list their kinds under children to make Allocate wait for them"
    return DeviceEvent(
        EventKind.NODES_LATE, key, f"{', '.join(paths)} appeared after the Allocate; {cure}; {hint}", pod
    )


def network(key: DeviceKey, names: Sequence[str], pod: PodRef) -> DeviceEvent:
    """Returns the event that a device has network interfaces, which no container gets."""
    text = f"network interface {', '.join(names)} stays on the node, because it is not a device node"
    return DeviceEvent(EventKind.NETWORK, key, text, pod)


def refused(resource: str, error: PluginError) -> DeviceEvent:
    """Returns the event of a failed Allocate, with the text that the pod also gets from the kubelet.

    The text names the holder of the device, or what failed.
    """
    return DeviceEvent(
        EventKind.DENIED if isinstance(error, LockHeld) else EventKind.FAILED, None, f"{resource}: {error}"
    )


def taken_over(key: DeviceKey, former: Lock, node: str) -> DeviceEvent:
    """Returns the event of a takeover. Its pod is the one that had the device on the former holder, now silent."""
    text = f"node {node} took over the device from node {former.holder}, whose lock had expired"
    return DeviceEvent(EventKind.TAKEN_OVER, key, text, former.pod)


def evicted(pod: PodRef, keys: Iterable[DeviceKey]) -> DeviceEvent:
    """Returns the event that the API server has accepted the eviction of a pod."""
    devices = ", ".join(map(str, sorted(keys))) or "its device"
    return DeviceEvent(
        EventKind.EVICTED, None, f"evicted because {devices} was re-attached with other device nodes", pod
    )


def events_of(notice: DeviceEvent) -> tuple[tuple[EventText, PodRef | None], ...]:
    """Returns the Kubernetes Events to record, each with its pod, or with None if it is about this node.

    The text of an Event about the node names the pod.
    """
    kind, reason, action, about = notice.what.value
    note = f"{notice.key}: {notice.text}" if notice.key is not None else notice.text
    found: list[tuple[EventText, PodRef | None]] = []
    if notice.pod is not None and about is not Regarding.NODE:
        found.append((EventText(kind, reason, action, note), notice.pod))
    if about is not Regarding.POD or not found:
        whose = f" (pod {notice.pod})" if notice.pod is not None else ""
        found.append((EventText(kind, reason, action, note + whose), None))
    return tuple(found)
