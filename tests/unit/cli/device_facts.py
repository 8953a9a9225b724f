"""DeviceFacts of one device, for the tests of explain and release."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from tests.rigs.vocabulary import KEY
from usbip_plugin.cli.explain import DeviceDetails, Listing, Offer, PluginStatus, PodStatus, ServerAnswer
from usbip_plugin.locks.locked_devices import LockedDevice
from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS, Lease, lock_of

TAKEN = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
NOW = TAKEN + timedelta(hours=3)
NOTES = {"usbip.dev/server": "lab:3240", "usbip.dev/busid": "1-1", "usbip.dev/usb-id": "0951:1666"}
HELD_NOTES = NOTES | {"usbip.dev/pod": "ns/reader/uid-1", "usbip.dev/vhci-port": "3", "usbip.dev/boot-id": "b"}
LISTED = ServerAnswer(Listing.LISTED, usb_id="0951:1666")
UNLISTED = ServerAnswer(Listing.UNLISTED)
UNREACHABLE = ServerAnswer(Listing.UNREACHABLE, error="USB/IP server lab:3240: connection refused")


def known(
    holder: str = "", *, heard: float | None = 3, written: float = 3600, notes: dict[str, str] | None = None
) -> LockedDevice:
    """Returns the device with its lock and the session of its holder.

    heard: seconds since the session was renewed, None for no session. written: seconds since the lock was written.
    """
    annotations = notes if notes is not None else HELD_NOTES if holder else NOTES
    renewed = NOW - timedelta(seconds=written)
    lease = Lease(KEY.id, holder, 40, TAKEN, renewed, 5, annotations, LOCK_LABELS, resource_version="7")
    session = None
    if holder and heard is not None:
        beat = NOW - timedelta(seconds=heard)
        session = Lease(f"usbip-node-{holder}", holder, 40, TAKEN, beat, labels=SESSION_LABELS)
    return LockedDevice(lease, lock_of(lease), session)


FREE = DeviceDetails(
    device_id=KEY.id,
    key=KEY,
    known=known(),
    offers=(Offer("usbip.dev/stick", "vendor 0951"),),
    config_source="ConfigMap usbip-system/usbip-plugin",
    server=LISTED,
    pod=PodStatus.UNKNOWN,
    plugin=PluginStatus.UNKNOWN,
    namespace="usbip-system",
    now=NOW,
)
HELD = replace(FREE, known=known("node-a"), server=UNLISTED, pod=PodStatus.LIVES, plugin=PluginStatus.READY)
