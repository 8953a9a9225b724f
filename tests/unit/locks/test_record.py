"""What a lock Lease says of its device."""

from __future__ import annotations

import pytest

from tests.unit.inventory.inventory_facts import KEY
from usbip_plugin.locks.record import BUSID, SERVER, USB_ID, Lease, lock_of
from usbip_plugin.model import DeviceKey, ServerKey


def lease(key: DeviceKey = KEY, **notes: str) -> Lease:
    """The lock Lease of a device. notes: annotations other than those that are right."""
    right = {SERVER: str(key.server), BUSID: key.busid, USB_ID: "0951:1666"}
    named = {"server": SERVER, "busid": BUSID, "usb_id": USB_ID}
    return Lease(name=key.id, annotations=right | {named[name]: text for name, text in notes.items()})


@pytest.mark.parametrize("text", ["lab", "lab:", "lab:x", "lab:0", "lab:65536", ":3240", ""])
def test_a_lock_that_does_not_name_its_device_is_no_device(text: str) -> None:
    assert lock_of(lease(server=text)).key is None


def test_a_lock_whose_device_does_not_hash_to_its_name_is_no_device() -> None:
    other = lock_of(lease(busid="9-9"))
    assert (other.key, other.busid) == (None, "9-9"), "people are shown what it says all the same"
    assert lock_of(lease()).key == KEY


def test_an_ipv6_server_comes_back_from_the_lock_as_it_was_configured() -> None:
    six = DeviceKey(ServerKey("fd00::1", 3240), "1-1")
    assert lock_of(lease(six)).key == six


@pytest.mark.parametrize("text", ["", "0951", "951:1666", "0951:166g", "0951:1666:1"])
def test_a_usb_id_that_is_none(text: str) -> None:
    assert lock_of(lease(usb_id=text)).usb_id is None
    assert str(lock_of(lease()).usb_id) == "0951:1666"
