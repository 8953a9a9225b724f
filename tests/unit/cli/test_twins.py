"""Which other devices `explain` finds that tell the serial number a resource promises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import cast

import pytest

from usbip_plugin.cli.lookup import DeviceLookup
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.kube.client import Api
from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease, LeaseList, LeaseStore
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.client import UsbipClient

LAB, ATTIC = ServerKey("lab", 3240), ServerKey("attic", 3240)
OWN, THERE = DeviceKey(LAB, "1-1"), DeviceKey(ATTIC, "7-2")
STICK = UsbId(0x0951, 0x1666)


def listed(busid: str, devnum: int = 7) -> Descriptor:
    return Descriptor(busid, "/sys/x", 1, devnum, 3, STICK, 0x100, 0, 0, 0, 1, 1, 1)


def lease(key: DeviceKey, serial: str, holder: str = "", **notes: str) -> Lease:
    said = {record.USB_ID: str(STICK), record.SERIAL: serial, record.READ_FROM: "1:7"}
    more = {record.DOMAIN + name.replace("_", "-"): text for name, text in notes.items()}
    return Lease(
        key.id, holder, 40, annotations={**record.device_annotations(key), **said, **more}, labels=record.LOCK_LABELS
    )


class Leases:
    def __init__(self, *leases: Lease) -> None:
        self._leases = leases

    async def list(self, labels: object) -> LeaseList:
        return LeaseList(self._leases if labels == record.LOCK_LABELS else (), "1")


class Servers:
    def __init__(self, **lists: tuple[Descriptor, ...]) -> None:
        self._lists = lists

    async def devlist(self, server: ServerKey, *, timeout: float) -> tuple[Descriptor, ...]:
        del timeout
        return self._lists.get(server.host, ())


BOTH = {LAB: Selector(serial="RED"), ATTIC: Selector(serial="RED")}
HERE = {"lab": (listed("1-1"),), "attic": (listed("7-2"),)}


@pytest.mark.parametrize(
    ("selectors", "there", "lists", "twins"),
    [
        (BOTH, lease(THERE, "RED"), HERE, (str(THERE),)),
        (BOTH, lease(THERE, "BLUE"), HERE, ()),
        (BOTH, lease(THERE, "RED"), {**HERE, "attic": (listed("7-2", 8),)}, ()),
        (BOTH, lease(THERE, "RED"), {**HERE, "attic": ()}, ()),
        (BOTH, lease(THERE, "RED", "node-b"), {**HERE, "attic": ()}, (str(THERE),)),
        (BOTH, lease(THERE, "RED", "node-b", in_place_of=OWN.id), {**HERE, "attic": ()}, ()),
        ({LAB: Selector(serial="RED"), ATTIC: Selector(vendor=1)}, lease(THERE, "RED"), HERE, ()),
        ({LAB: Selector(vendor=STICK.vendor), ATTIC: Selector(serial="RED")}, lease(THERE, "RED"), HERE, ()),
    ],
    ids=[
        "both listed",
        "another number",
        "another device by now",
        "away",
        "held",
        "followed to",
        "any",
        "not promised",
    ],
)
def test_a_twin_is_there_and_promised_by_the_same_resource(
    selectors: dict[ServerKey, Selector], there: Lease, lists: dict[str, tuple[Descriptor, ...]], twins: tuple[str, ...]
) -> None:
    assert asyncio.run(lookup(selectors, there, lists).about(OWN.id)).twins == twins


def lookup(
    selectors: dict[ServerKey, Selector], there: Lease, lists: Mapping[str, tuple[Descriptor, ...]]
) -> DeviceLookup:
    config = Config((ResourceConfig("stick", tuple(DeviceSelector(at, which) for at, which in selectors.items())),))
    return DeviceLookup(
        cast("LeaseStore", Leases(lease(OWN, "RED"), there)),
        cast("Api", None),
        cast("UsbipClient", Servers(**lists)),
        SystemClock(),
        "ns",
        "usbip.dev",
        config,
        "config.yaml",
    )


def test_a_device_that_is_held_for_another_names_it() -> None:
    there = lease(THERE, "RED", in_place_of=OWN.id)
    found = lookup(BOTH, there, HERE)
    assert asyncio.run(found.about(THERE.id)).held_for == str(OWN)
    assert asyncio.run(found.about(OWN.id)).held_for == ""
