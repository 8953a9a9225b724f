"""The names by which plugins may name an exporter's host."""

from __future__ import annotations

import pytest

from usbip_plugin.exporter.names import HostNames, find_names, is_own_address


def names(*configured: str) -> HostNames:
    return HostNames(configured, ["pi", "pi.lab.example"], lambda address: address in {"10.0.0.5", "fd00::5"})


@pytest.mark.parametrize("name", ["pi", "PI", "pi.lab.example.", "10.0.0.5", "fd00::5", "FD00:0:0::5"])
def test_the_host_has_its_name_its_full_name_and_its_addresses(name: str) -> None:
    assert names().includes(name)


@pytest.mark.parametrize("name", ["pie", "lab.example", "10.0.0.6", "fd00::6", "", "10.0.0.5:3240"])
def test_the_host_has_no_other_name(name: str) -> None:
    assert not names().includes(name)


def test_configured_names_are_the_only_ones() -> None:
    configured = names("Server.example", "10.9.9.9")
    assert configured.includes("server.example.")
    assert configured.includes("10.9.9.9")
    assert not configured.includes("pi")
    assert not configured.includes("10.0.0.5")


def test_an_address_of_this_machine_is_its_own() -> None:
    assert is_own_address("127.0.0.1")
    assert not is_own_address("192.0.2.1"), "a documentation address (RFC 5737)"
    assert not is_own_address("2001:db8::1")
    assert all(find_names())
