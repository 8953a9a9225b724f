"""The devices that a selector matches, and selectors that may match the same device."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.vocabulary import HID, STORAGE, descriptor
from usbip_plugin.config.schema import DeviceSelector, ResourceConfig, Selector
from usbip_plugin.config.selectors import Match, allowed_interfaces, expected_serial, matches, may_overlap
from usbip_plugin.model import Descriptor, DeviceKey, Identity, InterfaceClass, InterfaceRules, ServerKey, UsbId

DEVICE = descriptor("1-1.4", interfaces=STORAGE)
UNCONFIGURED = dataclasses.replace(DEVICE, configuration=0, num_interfaces=0, interfaces=())


@pytest.mark.parametrize(
    ("selector", "answer"),
    [
        (Selector(), Match.YES),
        (Selector(vendor=0x0951), Match.YES),
        (Selector(vendor=0x0951, product=0x1667), Match.NO),
        (Selector(vendor=0x0952), Match.NO),
        (Selector(bus_id="1-1.4"), Match.YES),
        (Selector(bus_id="1-1"), Match.NO),
        (Selector(bus_id="1-*"), Match.YES),
        (Selector(bus_id="1-1.[!4]"), Match.NO),
        (Selector(vendor=(0x0951, 0x1050)), Match.YES),
        (Selector(vendor=(0x0952, 0x1050)), Match.NO),
        (Selector(vendor=(0x0951, 0x1050), product=(0x0407, 0x1667)), Match.NO),
        (Selector(usb_ids=(UsbId(0x0951, 0x1666), UsbId(0x1050, 0x0407))), Match.YES),
        (Selector(usb_ids=(UsbId(0x0951, 0x0407), UsbId(0x1050, 0x1666))), Match.NO),
        (Selector(vendor=0x1050, usb_ids=(UsbId(0x0951, 0x1666),)), Match.NO),
        (Selector(bus_id=("2-1", "1-1.*")), Match.YES),
        (Selector(bus_id=("2-1", "1-2")), Match.NO),
        (Selector(class_=8), Match.YES),
        (Selector(class_=3), Match.NO),
        (Selector(class_=0), Match.YES),
    ],
)
def test_every_key_of_a_selector_must_match(selector: Selector, answer: Match) -> None:
    assert matches(selector, DEVICE) is answer


@pytest.mark.parametrize(
    ("serial", "answer"), [(None, Match.NEEDS_PROBE), ("A1", Match.YES), ("A2", Match.NO), ("", Match.NO)]
)
def test_a_serial_number_is_needed_only_if_the_other_keys_match(serial: str | None, answer: Match) -> None:
    identity = Identity(serial=serial)
    assert matches(Selector(vendor=0x0951, serial="A1"), DEVICE, identity) is answer
    assert matches(Selector(vendor=1, serial="A1"), DEVICE, identity) is Match.NO
    assert matches(Selector(class_=3, serial="A1"), DEVICE, identity) is Match.NO


@pytest.mark.parametrize(
    ("device", "interfaces", "answer"),
    [
        (UNCONFIGURED, None, Match.NEEDS_PROBE),
        (UNCONFIGURED, STORAGE, Match.YES),
        (UNCONFIGURED, HID, Match.NO),
        (UNCONFIGURED, (), Match.NO),
        (dataclasses.replace(UNCONFIGURED, device_class=8), None, Match.YES),
        (DEVICE, None, Match.YES),
        (DEVICE, HID, Match.YES),
        (dataclasses.replace(DEVICE, interfaces=HID), STORAGE, Match.NO),
    ],
)
def test_interfaces_are_needed_only_if_the_server_does_not_list_them(
    device: Descriptor, interfaces: tuple[InterfaceClass, ...] | None, answer: Match
) -> None:
    assert matches(Selector(class_=8), device, Identity(interfaces=interfaces)) is answer
    assert matches(Selector(class_=8, vendor=1), device, Identity(interfaces=interfaces)) is Match.NO


@pytest.mark.parametrize("selector", [Selector(), Selector(bus_id="1-*"), Selector(class_=8), Selector(class_=9)])
def test_no_selector_matches_a_hub(selector: Selector) -> None:
    assert matches(selector, dataclasses.replace(DEVICE, device_class=9)) is Match.NO


def test_a_known_mismatch_needs_no_probe() -> None:
    assert matches(Selector(class_=8, serial="A1"), UNCONFIGURED, Identity(serial="B2")) is Match.NO
    assert matches(Selector(class_=8, serial="A1"), UNCONFIGURED, Identity(interfaces=HID)) is Match.NO


@given(
    *(
        st.builds(
            Selector,
            vendor=st.sampled_from([None, 1, 2, (1, 2), (2, 3)]),
            product=st.sampled_from([None, 1, (1, 2)]),
            usb_ids=st.sampled_from([(), (UsbId(1, 1),), (UsbId(1, 2), UsbId(2, 1))]),
            bus_id=st.sampled_from([None, "1-1", "1-2", "1-*", "?-1", ("1-1", "1-2"), ("2-1", "1-*")]),
            serial=st.sampled_from([None, "x", "y"]),
        )
        for _ in range(2)
    ),
    st.sampled_from([1, 2]),
    st.sampled_from(["1-1", "1-2", "2-1"]),
    st.sampled_from(["x", "y", ""]).map(lambda serial: Identity(serial=serial)),
)
def test_selectors_that_match_one_device_may_overlap(
    one: Selector, other: Selector, vendor: int, busid: str, identity: Identity
) -> None:
    device = dataclasses.replace(DEVICE, usb_id=UsbId(vendor, 1), busid=busid)
    if matches(one, device, identity) is matches(other, device, identity) is Match.YES:
        assert may_overlap(one, other)
        assert may_overlap(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Selector(vendor=1), Selector(vendor=2)),
        (Selector(vendor=(1, 2)), Selector(vendor=(3, 4))),
        (Selector(usb_ids=(UsbId(1, 1),)), Selector(usb_ids=(UsbId(1, 2), UsbId(2, 1)))),
        (Selector(usb_ids=(UsbId(1, 1),)), Selector(vendor=1, product=(2, 3))),
        (Selector(vendor=2), Selector(usb_ids=(UsbId(1, 1),))),
        (Selector(bus_id=("1-1", "1-3")), Selector(bus_id=("1-2", "2-*"))),
        (Selector(bus_id="1-1"), Selector(bus_id="1-2")),
        (Selector(bus_id="2-*"), Selector(bus_id="1-2")),
        (Selector(class_=3), Selector(class_=8)),
    ],
)
def test_disjoint_selectors_do_not_overlap(one: Selector, other: Selector) -> None:
    assert not may_overlap(one, other)


@pytest.mark.parametrize(
    ("selectors", "keys", "rules"),
    [
        ([Selector(vendor=0x0951)], {}, InterfaceRules()),
        ([Selector(class_=8)], {}, InterfaceRules(selected=(8,), asked=(8,))),
        ([Selector(class_=8), Selector(class_=3)], {}, InterfaceRules(selected=(3, 8), asked=(3, 8))),
        ([Selector(class_=8), Selector(vendor=0x0951)], {}, InterfaceRules(asked=(8,))),
        ([Selector(class_=8), Selector(vendor=0x1050)], {}, InterfaceRules(selected=(8,), asked=(8,))),
        ([Selector(class_=8), Selector(serial="other")], {}, InterfaceRules(selected=(8,), asked=(8,))),
        ([Selector(vendor=0x1050, class_=8)], {}, InterfaceRules()),
        ([Selector()], {"children": ("tty", "input")}, InterfaceRules(asked=(3,))),
        ([Selector()], {"children": ("hidraw",)}, InterfaceRules(asked=(3,))),
        ([Selector()], {"allow_classes": (3, 8)}, InterfaceRules(allowed=(3, 8))),
    ],
)
def test_a_resource_allows_what_its_selectors_and_children_ask_for(
    selectors: list[Selector], keys: dict[str, tuple[int, ...]], rules: InterfaceRules
) -> None:
    server = ServerKey("lab")
    entries = tuple(DeviceSelector(server, selector) for selector in selectors)
    resource = ResourceConfig("a", entries, **keys)  # type: ignore[arg-type]
    assert allowed_interfaces(resource, DeviceKey(server, "1-1.4"), UNCONFIGURED, Identity(serial="A1")) == rules


@pytest.mark.parametrize(
    ("selector", "rules"),
    [
        (Selector(class_=8), InterfaceRules(selected=(8,), asked=(3, 8))),
        (Selector(serial="other"), InterfaceRules(exactly=(InterfaceClass(3, 1, 1),))),
    ],
)
def test_a_device_that_no_selector_matches_any_more_keeps_the_interfaces_that_it_had(
    selector: Selector, rules: InterfaceRules
) -> None:
    server, had = ServerKey("lab"), (InterfaceClass(3, 1, 1),)
    resource = ResourceConfig("a", (DeviceSelector(server, selector),), children=("input",))
    assert allowed_interfaces(resource, DeviceKey(server, "1-1.4"), UNCONFIGURED, Identity(serial="A1"), had) == rules


RED, BLUE, ANY = Selector(serial="RED"), Selector(serial="BLUE"), Selector(vendor=0x0951)
BLUE_ELSEWHERE, ANY_ELSEWHERE = Selector(serial="BLUE", bus_id="2-*"), Selector(bus_id=("2-1", "2-2"))


@pytest.mark.parametrize(
    ("selectors", "recorded", "expected"),
    [
        ([RED], "RED", "RED"),
        ([RED], "GREEN", "RED"),
        ([RED], None, "RED"),
        ([BLUE, RED], "RED", "RED"),
        ([BLUE, RED], "GREEN", "BLUE"),
        ([RED, ANY], "GREEN", "GREEN"),
        ([RED, ANY], None, None),
        ([BLUE_ELSEWHERE, RED], "BLUE", "RED"),
        ([ANY_ELSEWHERE, RED], "GREEN", "RED"),
        ([BLUE_ELSEWHERE], "GREEN", "GREEN"),
        ([], "GREEN", "GREEN"),
    ],
)
def test_a_recorded_serial_number_counts_if_a_selector_for_the_bus_id_may_have_it(
    selectors: list[Selector], recorded: str | None, expected: str | None
) -> None:
    server = ServerKey("lab")
    entries = [DeviceSelector(ServerKey("other"), Selector()), *(DeviceSelector(server, one) for one in selectors)]
    resource = ResourceConfig("a", tuple(entries))
    assert expected_serial(resource, DeviceKey(server, "1-1"), recorded) == expected
