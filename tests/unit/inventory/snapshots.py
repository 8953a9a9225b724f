"""Snapshots of a node that knows one stick on one server, and whatever else a test adds."""

from __future__ import annotations

from dataclasses import replace

from tests.rigs.vocabulary import KEY, LAB, STICK, descriptor
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.inventory.snapshot import OfferedDevices, Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, Lock
from usbip_plugin.usbip.poller import ServerState, ServerView

CONFIG = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(vendor=0x0951, product=0x1666)),)),))
BY_SERIAL = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(serial="RED")),)),))
DEVID = descriptor().devid


def view(*devices: Descriptor, state: ServerState = ServerState.REACHABLE, error: str | None = None) -> ServerView:
    return ServerView(LAB, state, devices, error, 0 if state is ServerState.REACHABLE else 1)


def lock(holder: str = "", **more: object) -> Lock:
    return Lock(KEY.id, holder, 3, 40.0, "9", key=KEY, usb_id=STICK, **more)  # type: ignore[arg-type]


def snapshot(**more: object) -> Snapshot:
    base = Snapshot("node-a", CONFIG, {LAB: view(descriptor())}, {}, {}, {})
    return replace(base, **more)  # type: ignore[arg-type]


def held(by: str, status: LockStatus = LockStatus.HELD) -> dict[str, object]:
    return {"locks": {KEY.id: lock(by)}, "lock_statuses": {KEY.id: status}}


def claim(state: ClaimState) -> dict[str, object]:
    return {
        "claims": {KEY.id: Claim(KEY, STICK, state=state, resource="stick", port=0)},
        **held("node-a", LockStatus.MINE),
    }


def red(**more: object) -> Snapshot:
    """Returns a snapshot whose resource selects RED, the serial number that was read from 1-1."""
    return snapshot(**{"config": BY_SERIAL, "locks": {KEY.id: lock(serial="RED", read_from=DEVID)}, **more})


KNOWN: OfferedDevices = update_offered({}, snapshot())
