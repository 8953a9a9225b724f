"""The device that a name selects, and the twins of a device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import cast

import pytest

from tests.rigs.vocabulary import ATTIC, KEY, LAB, STICK, descriptor
from usbip_plugin.cli.lookup import DeviceLookup, NamedDevice, named_key, resolve
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import AmbiguousDevice, NoSuchDevice
from usbip_plugin.kube.client import Api
from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease, LeaseList, LeaseStore
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey
from usbip_plugin.usbip.client import DeviceList, UsbipClient


def candidate(host: str, busid: str, *resources: str, serial: str | None = None) -> NamedDevice:
    key = DeviceKey(ServerKey(host), busid)
    return NamedDevice(key.id, str(key), busid, serial, resources)


NEAR = candidate("lab", "1-1", "usbip.dev/stick", "usbip.dev/storage", serial="A1")
HUB_PORT = candidate("lab", "1-1.2", "usbip.dev/storage")
FAR = candidate("attic", "1-1", "usbip.dev/scanner")
ALL = (NEAR, HUB_PORT, FAR, NamedDevice("usbip-" + "a" * 20))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        (NEAR.id, NEAR),
        (NEAR.id[:12], NEAR),
        ("lab:3240/1-1", NEAR),  # although lab:3240/1-1.2 begins so
        ("lab/1-1", NEAR),
        ("attic/1-1", FAR),
        ("att", FAR),
        ("1-1.2", HUB_PORT),
        ("A1", NEAR),
        ("usbip.dev/stick", NEAR),
        ("stick", NEAR),
        ("scan", FAR),
        ("usbip-aaaa", ALL[3]),
    ],
)
def test_a_name_or_its_beginning_selects_a_device(name: str, meant: NamedDevice) -> None:
    assert resolve(name, ALL) is meant


@pytest.mark.parametrize(
    ("name", "count"), [("1-1", 2), ("storage", 2), ("lab", 2), ("usbip-", 4), ("usbip.dev/st", 2)]
)
def test_an_ambiguous_name_is_refused_with_the_devices_it_may_mean(name: str, count: int) -> None:
    with pytest.raises(AmbiguousDevice) as caught:
        resolve(name, ALL)
    assert len(caught.value.matches) == count
    assert all(match.strip().startswith("usbip-") for match in caught.value.matches)


@pytest.mark.parametrize("name", ["", "x", "1-1.2.3", "lab:3240/1-1/"])
def test_the_error_of_an_unknown_name_has_the_number_of_known_devices(name: str) -> None:
    with pytest.raises(NoSuchDevice, match="4 known devices"):
        resolve(name, ALL)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lab/1-1", DeviceKey(ServerKey("lab", 3240), "1-1")),
        ("lab:99/1-1.2", DeviceKey(ServerKey("lab", 99), "1-1.2")),
        ("[fd00::1]:99/1-1", DeviceKey(ServerKey("fd00::1", 99), "1-1")),
        ("lab.lan.:99/1-1", DeviceKey(ServerKey("lab.lan", 99), "1-1")),
        ("lab:0/1-1", None),
        ("lab:65536/1-1", None),
        ("lab", None),
        ("lab/../1", None),
        ("lab/x y", None),
        ("/1-1", None),
    ],
)
def test_an_unknown_device_can_be_named_by_server_and_busid(name: str, key: DeviceKey | None) -> None:
    assert named_key(name) == key


def lease(key: DeviceKey, serial: str, holder: str = "", **notes: str) -> Lease:
    identity = {record.USB_ID: str(STICK), record.SERIAL: serial, record.READ_FROM: "1:2"}
    more = {record.DOMAIN + name.replace("_", "-"): text for name, text in notes.items()}
    return Lease(
        key.id,
        holder,
        40,
        annotations={**record.device_annotations(key), **identity, **more},
        labels=record.LOCK_LABELS,
    )


class Leases:
    def __init__(self, *leases: Lease) -> None:
        self._leases = leases

    async def list(self, labels: object, keep: Callable[[Lease], bool] = lambda _lease: True) -> LeaseList:
        return LeaseList(tuple(filter(keep, self._leases)) if labels == record.LOCK_LABELS else (), "1")


class Servers:
    def __init__(self, **lists: tuple[Descriptor, ...]) -> None:
        self._lists = lists

    async def devlist(self, server: ServerKey, *, timeout: float) -> DeviceList:
        del timeout
        return DeviceList(self._lists.get(server.host, ()))


FAR_KEY = DeviceKey(ATTIC, "7-2")
BOTH = {LAB: Selector(serial="RED"), ATTIC: Selector(serial="RED")}
HERE = {"lab": (descriptor("1-1"),), "attic": (descriptor("7-2"),)}


@pytest.mark.parametrize(
    ("selectors", "there", "lists", "twins"),
    [
        (BOTH, lease(FAR_KEY, "RED"), HERE, (str(FAR_KEY),)),
        (BOTH, lease(FAR_KEY, "BLUE"), HERE, ()),
        (BOTH, lease(FAR_KEY, "RED"), {**HERE, "attic": (descriptor("7-2", devnum=8),)}, ()),
        (BOTH, lease(FAR_KEY, "RED"), {**HERE, "attic": ()}, ()),
        (BOTH, lease(FAR_KEY, "RED", "node-b"), {**HERE, "attic": ()}, (str(FAR_KEY),)),
        (BOTH, lease(FAR_KEY, "RED", "node-b", in_place_of=KEY.id), {**HERE, "attic": ()}, ()),
        ({LAB: Selector(serial="RED"), ATTIC: Selector(vendor=1)}, lease(FAR_KEY, "RED"), HERE, ()),
        ({LAB: Selector(vendor=STICK.vendor), ATTIC: Selector(serial="RED")}, lease(FAR_KEY, "RED"), HERE, ()),
    ],
    ids=["listed", "other serial", "replaced", "not listed", "held", "moved there", "other selector", "not selected"],
)
def test_a_twin_is_present_and_selected_by_its_serial_number_in_the_same_resource(
    selectors: dict[ServerKey, Selector], there: Lease, lists: dict[str, tuple[Descriptor, ...]], twins: tuple[str, ...]
) -> None:
    assert asyncio.run(lookup(selectors, there, lists).about(KEY.id)).twins == twins


def lookup(
    selectors: dict[ServerKey, Selector], there: Lease, lists: Mapping[str, tuple[Descriptor, ...]]
) -> DeviceLookup:
    config = Config((ResourceConfig("stick", tuple(DeviceSelector(at, which) for at, which in selectors.items())),))
    return DeviceLookup(
        cast("LeaseStore", Leases(lease(KEY, "RED"), there)),
        cast("Api", None),
        cast("UsbipClient", Servers(**lists)),
        SystemClock(),
        "ns",
        "usbip.dev",
        config,
        "config.yaml",
    )


def test_the_details_of_a_device_held_for_another_name_that_device() -> None:
    found = lookup(BOTH, lease(FAR_KEY, "RED", in_place_of=KEY.id), HERE)
    assert asyncio.run(found.about(FAR_KEY.id)).held_for == str(KEY)
    assert asyncio.run(found.about(KEY.id)).held_for == ""
