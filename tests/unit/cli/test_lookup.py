"""Which device a person means."""

from __future__ import annotations

import pytest

from usbip_plugin.cli.lookup import NamedDevice, named_key, resolve
from usbip_plugin.errors import AmbiguousDevice, NoSuchDevice
from usbip_plugin.model import DeviceKey, ServerKey


def candidate(host: str, busid: str, *resources: str, serial: str | None = None) -> NamedDevice:
    key = DeviceKey(ServerKey(host), busid)
    return NamedDevice(key.id, str(key), busid, serial, resources)


STICK = candidate("lab", "1-1", "usbip.dev/stick", "usbip.dev/storage", serial="A1")
OTHER = candidate("lab", "1-1.2", "usbip.dev/storage")
FAR = candidate("attic", "1-1", "usbip.dev/scanner")
ALL = (STICK, OTHER, FAR, NamedDevice("usbip-" + "a" * 20))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        (STICK.id, STICK),
        (STICK.id[:12], STICK),
        ("lab:3240/1-1", STICK),  # although lab:3240/1-1.2 begins so
        ("lab/1-1", STICK),
        ("attic/1-1", FAR),
        ("att", FAR),
        ("1-1.2", OTHER),
        ("A1", STICK),
        ("usbip.dev/stick", STICK),
        ("stick", STICK),
        ("scan", FAR),
        ("usbip-aaaa", ALL[3]),
    ],
)
def test_every_name_of_a_device_and_the_beginning_of_one(name: str, meant: NamedDevice) -> None:
    assert resolve(name, ALL) is meant


@pytest.mark.parametrize(
    ("name", "count"), [("1-1", 2), ("storage", 2), ("lab", 2), ("usbip-", 4), ("usbip.dev/st", 2)]
)
def test_a_name_of_several_devices_is_refused_with_the_list(name: str, count: int) -> None:
    with pytest.raises(AmbiguousDevice) as caught:
        resolve(name, ALL)
    assert len(caught.value.matches) == count
    assert all(match.strip().startswith("usbip-") for match in caught.value.matches)


@pytest.mark.parametrize("name", ["", "x", "1-1.2.3", "lab:3240/1-1/"])
def test_a_name_of_no_device_says_how_many_are_known(name: str) -> None:
    with pytest.raises(NoSuchDevice, match="4 known devices"):
        resolve(name, ALL)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lab/1-1", DeviceKey(ServerKey("lab", 3240), "1-1")),
        ("lab:99/1-1.2", DeviceKey(ServerKey("lab", 99), "1-1.2")),
        ("[fd00::1]:99/1-1", DeviceKey(ServerKey("fd00::1", 99), "1-1")),
        ("lab:0/1-1", None),
        ("lab:65536/1-1", None),
        ("lab", None),
        ("lab/../1", None),
        ("lab/x y", None),
        ("/1-1", None),
    ],
)
def test_a_device_that_nobody_knows_yet_can_be_named_by_server_and_busid(name: str, key: DeviceKey | None) -> None:
    assert named_key(name) == key
