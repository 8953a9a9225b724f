"""What is known of one stick on one server, and whatever else a test says."""

from __future__ import annotations

from dataclasses import replace

from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.inventory.snapshot import OfferedDevices, Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, Lock, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerState, ServerView

LAB = ServerKey("lab", 3240)


KEY = DeviceKey(LAB, "1-1")


STICK, OTHER = UsbId(0x0951, 0x1666), UsbId(0x1050, 0x0407)


CONFIG = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(vendor=0x0951, product=0x1666)),)),))


HIGH, SUPER = 3, 5


BY_SERIAL = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(serial="RED")),)),))


def listed(busid: str = "1-1", usb_id: UsbId = STICK, speed: int = HIGH) -> Descriptor:
    return Descriptor(busid, "/sys/x", 1, 2, speed, usb_id, 0x100, 0, 0, 0, 1, 1, 1)


DEVID = listed().devid


def view(*devices: Descriptor, state: ServerState = ServerState.REACHABLE, error: str | None = None) -> ServerView:
    return ServerView(LAB, state, devices, error, 0 if state is ServerState.REACHABLE else 1)


def lock(holder: str, **more: object) -> Lock:
    return Lock(KEY.id, holder, 3, 40.0, "9", key=KEY, usb_id=STICK, **more)  # type: ignore[arg-type]


def facts(**more: object) -> Snapshot:
    base = Snapshot("node-a", CONFIG, {LAB: view(listed())}, {}, {}, {})
    return replace(base, **more)  # type: ignore[arg-type]


def held(by: str, standing: LockStatus = LockStatus.HELD) -> dict[str, object]:
    return {"locks": {KEY.id: lock(by)}, "lock_statuses": {KEY.id: standing}}


def claim(state: ClaimState) -> dict[str, object]:
    return {
        "claims": {KEY.id: Claim(KEY, STICK, state=state, resource="stick", port=0)},
        **held("node-a", LockStatus.MINE),
    }


def red(**more: object) -> Snapshot:
    """The resource promises RED, and that is what 1-1 was when it was read."""
    return facts(**{"config": BY_SERIAL, "locks": {KEY.id: lock("", serial="RED", read_from=DEVID)}, **more})


KNOWN: OfferedDevices = update_offered({}, facts())
