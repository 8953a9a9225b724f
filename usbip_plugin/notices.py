"""What happens to a device that people should hear of, and how it reads as a Kubernetes Event."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from usbip_plugin.model import DeviceKey, PodRef
from usbip_plugin.observe.events import NORMAL, WARNING, EventText


class What(enum.Enum):
    """(type, reason, action) of the Event."""

    LOST = (WARNING, "DeviceLost", "Reattach")
    REATTACHED = (NORMAL, "DeviceReattached", "Reattach")
    MOVED = (NORMAL, "DeviceMoved", "Reattach")
    NOT_REATTACHED = (WARNING, "DeviceNotReattached", "Reattach")
    RESTART_NEEDED = (WARNING, "DeviceNodesChanged", "Restart")
    LOCK_LOST = (WARNING, "DeviceLockLost", "Withdraw")


@dataclass(frozen=True, slots=True)
class Notice:
    """One happening. pod is None while nobody knows whose it is; text is one sentence."""

    what: What
    key: DeviceKey
    text: str
    pod: PodRef | None = None


def event_of(notice: Notice) -> EventText:
    """The Event's own words."""
    kind, reason, action = notice.what.value
    return EventText(type=kind, reason=reason, action=action, note=f"{notice.key}: {notice.text}")
