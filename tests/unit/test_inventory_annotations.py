"""A device as its lock tells of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from inventory_facts import KEY, lock

from usbip_plugin.locks.record import key_of, parse_usb_id
from usbip_plugin.model import DeviceKey, Lock, ServerKey


@pytest.mark.parametrize("text", ["lab", "lab:", "lab:x", ":3240", None])
def test_a_lock_that_does_not_name_its_device_is_no_device(text: str | None) -> None:
    assert key_of(replace(lock("node-b"), server=text)) is None


def test_a_lock_whose_device_does_not_hash_to_its_name_is_no_device() -> None:
    assert key_of(replace(lock("node-b"), busid="9-9")) is None
    assert key_of(lock("node-b")) == KEY


def test_an_ipv6_server_comes_back_from_the_lock_as_it_was_configured() -> None:
    six = DeviceKey(ServerKey("fd00::1", 3240), "1-1")
    assert key_of(Lock(six.id, "", 1, 40.0, "1", server=str(six.server), busid="1-1")) == six


@pytest.mark.parametrize("text", [None, "", "0951", "951:1666", "0951:166g", "0951:1666:1"])
def test_a_usb_id_that_is_none(text: str | None) -> None:
    assert parse_usb_id(text) is None
