"""Device events that people should know of, and the Kubernetes Events that they become (docs/reference/events.md)."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from usbip_plugin.errors import LockHeld, PluginError
from usbip_plugin.kube.events import NORMAL, WARNING, EventText
from usbip_plugin.model import DeviceKey, Lock, PodRef


class Regarding(enum.Enum):
    """The object on which a Kubernetes Event is recorded."""

    POD = "the pod, or this node while the pod is not known"
    NODE = "this node"
    BOTH = "the pod, if it is known, and this node"


class EventKind(enum.Enum):
    """The kinds of device events, each with the (type, reason, action, object) of its Kubernetes Event.

    meaning: what has happened. advice: what to do. docs/reference/events.md shows both.
    """

    meaning: str
    advice: str

    def __new__(cls, event: tuple[str, str, str, Regarding], meaning: str, advice: str) -> Self:
        kind = object.__new__(cls)
        kind._value_ = event
        kind.meaning = meaning
        kind.advice = advice
        return kind

    ATTACHED = (
        (NORMAL, "DeviceAttached", "Attach", Regarding.POD),
        "The pod has the device, at this vhci port and USB node.",
        "Nothing.",
    )
    LOST = (
        (WARNING, "DeviceLost", "Reattach", Regarding.POD),
        "The connection to the USB/IP server broke, and the plugin tries to re-attach the device.",
        "If no re-attach follows, check the server, and that the device is plugged in and bound there.",
    )
    REATTACHED = (
        (NORMAL, "DeviceReattached", "Reattach", Regarding.POD),
        "The device is back with the same device nodes, or with the same nodes of the kinds in `children`.",
        "Nothing: paths in the pod work again, but open files do not.",
    )
    NODES_CHANGED = (
        (WARNING, "DeviceNodesChanged", "Reattach", Regarding.POD),
        "The device is back with other device nodes, and those in the running container do not work.",
        "Recreate the pod, or set `onLoss`.",
    )
    NODES_LATE = (
        (WARNING, "DeviceNodesLate", "Attach", Regarding.POD),
        "Device nodes appeared after the Allocate was answered, so the container lacks them.",
        "List their kinds in `children`; for this pod, do as the note says.",
    )
    NETWORK = (
        (WARNING, "DeviceNetworkInterface", "Attach", Regarding.POD),
        "The device has a network interface, which stays on the node.",
        "Use it from the node: a device plugin cannot give it to a pod.",
    )
    WITHHELD = (
        (WARNING, "DeviceInterfacesWithheld", "Attach", Regarding.POD),
        "The resource does not allow some of the device's interfaces, so neither the pod nor the node can use them.",
        "Nothing, or list the classes of all interfaces in `allowClasses`.",
    )
    MOVED = (
        (NORMAL, "DeviceMoved", "Reattach", Regarding.POD),
        "The device is at another bus ID or server, and was re-attached from there.",
        "Nothing, unless a selector has the old `bus_id`.",
    )
    NOT_REATTACHED = (
        (WARNING, "DeviceNotReattached", "Reattach", Regarding.POD),
        "The plugin cannot identify the device, or cannot give its device nodes to the pod.",
        "Do as the note says.",
    )
    RESTART_NEEDED = (
        (WARNING, "DeviceNodesChanged", "Restart", Regarding.POD),
        "With `onLoss: restart`, the device is back with other device nodes, and the container must restart.",
        "End the container if it does not end by itself.",
    )
    EVICTED = (
        (WARNING, "DevicePodEvicted", "Evict", Regarding.POD),
        "With `onLoss: evict`, the pod was evicted; the note says what happened to its device.",
        "Nothing: the pod's owner creates a new one.",
    )
    DENIED = (
        (WARNING, "DeviceDenied", "Allocate", Regarding.NODE),
        "An Allocate failed because another node holds the device; the note names the pod.",
        "Nothing, or end that pod.",
    )
    FAILED = (
        (WARNING, "DeviceAllocateFailed", "Allocate", Regarding.NODE),
        "An Allocate failed for another reason: server, kernel or API server.",
        "Do as the note says.",
    )
    TAKEN_OVER = (
        (WARNING, "DeviceTakenOver", "TakeOver", Regarding.BOTH),
        "The holder was silent for the whole lock duration, and this node took its device over.",
        "Look after the silent node: its pod runs on without the device.",
    )
    LOCK_LOST = (
        (WARNING, "DeviceLockLost", "Withdraw", Regarding.BOTH),
        "The lock of an attached device names another node or nobody, so this node detached it.",
        "Find out who wrote the Lease: another node after a takeover, or a person.",
    )


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


EventSink = Callable[[DeviceEvent], None]
"""Records one device event. Returns at once and never raises."""


def refused(resource: str, error: PluginError) -> DeviceEvent:
    """Returns the event of a failed Allocate, with the text that the pod also gets from the kubelet."""
    kind = EventKind.DENIED if isinstance(error, LockHeld) else EventKind.FAILED
    return DeviceEvent(kind, None, f"{resource}: {error}")


def taken_over(key: DeviceKey, former: Lock, node: str) -> DeviceEvent:
    """Returns the event of a takeover, for the pod that had the device on the former holder."""
    text = f"node {node} took over the device from node {former.holder}, whose lock had expired"
    return DeviceEvent(EventKind.TAKEN_OVER, key, text, former.pod)


def evicted(pod: PodRef, cause: str) -> DeviceEvent:
    """Returns the event that the API server has accepted the eviction of a pod."""
    return DeviceEvent(EventKind.EVICTED, None, f"evicted because {cause}", pod)


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
        suffix = f" (pod {notice.pod})" if notice.pod is not None else ""
        found.append((EventText(kind, reason, action, note + suffix), None))
    return tuple(found)
