"""Where a lost device may be."""

from __future__ import annotations

from tests.unit.inventory.inventory_facts import KEY, LAB, STICK, listed
from usbip_plugin.attach.locate import may_be_lost_device, possible_servers
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.model import DeviceKey, ServerKey


def test_a_lost_device_is_looked_for_only_where_the_configuration_names_it() -> None:
    attic = ServerKey("attic", 3240)
    red = Selector(bus_id="1-*", serial="RED", class_=8)
    any_stick = DeviceSelector(ServerKey("cellar", 3240), Selector(vendor=STICK.vendor))
    config = Config(
        (
            ResourceConfig(
                "stick", (DeviceSelector(LAB, red), DeviceSelector(attic, Selector(serial="RED")), any_stick)
            ),
            ResourceConfig("other", (DeviceSelector(ServerKey("barn", 3240), Selector(serial="RED")),)),
        )
    )

    def allowed(host: str, busid: str, serial: str | None, resource: str | None = "stick") -> bool:
        lost = Claim(KEY, STICK, state=ClaimState.REATTACHING, resource=resource, serial=serial)
        return may_be_lost_device(config, lost, DeviceKey(ServerKey(host, 3240), busid), listed(busid))

    assert allowed("lab", "1-9", "RED"), "its class may not be listed yet"
    assert not allowed("lab", "2-1", "RED")
    assert not allowed("lab", "1-9", "BLUE")
    assert not allowed("lab", "1-9", None)
    assert allowed("attic", "7-1", "RED"), "its own number is named there"
    assert not allowed("cellar", "1-1", "RED"), "any stick will do there: nobody says that it is this one"
    assert not allowed("barn", "1-1", "RED"), "another resource's"
    assert allowed("barn", "1-1", "RED", None), "after a restart nobody knows whose it is"
    assert not allowed("nowhere", "1-1", "RED")


def test_a_lost_device_may_be_at_its_server_and_with_a_serial_number_wherever_its_resource_looks() -> None:
    den = ServerKey("den", 3240)
    both = tuple(DeviceSelector(server, Selector(vendor=0x0951)) for server in (LAB, den))
    config = Config(
        (ResourceConfig("stick", both), ResourceConfig("other", (DeviceSelector(ServerKey("x", 1), Selector()),)))
    )
    for serial, resource, found in (("", "stick", {LAB}), ("S", "stick", {LAB, den}), ("S", None, config.servers())):
        lost = Claim(KEY, STICK, state=ClaimState.REATTACHING, resource=resource, serial=serial)
        assert possible_servers(config, [lost]) == found
    assert possible_servers(config, []) == frozenset()
