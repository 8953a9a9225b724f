"""Which device a selector names, and what a containerPath template may do."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.config.schema import Selector, render, template_problem
from usbip_plugin.config.selectors import Match, matches, may_overlap
from usbip_plugin.model import Descriptor, Identity, InterfaceClass, UsbId

STICK = Descriptor(
    busid="1-1.4",
    path="/sys/devices/pci/usb1/1-1.4",
    busnum=1,
    devnum=7,
    speed=3,
    usb_id=UsbId(0x0951, 0x1666),
    bcd_device=0x100,
    device_class=0,
    device_subclass=0,
    device_protocol=0,
    configuration=1,
    num_configurations=1,
    num_interfaces=1,
    interfaces=(InterfaceClass(8, 6, 0x50),),
)


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
def test_every_field_given_must_agree(selector: Selector, answer: Match) -> None:
    assert matches(selector, STICK) is answer


@pytest.mark.parametrize(
    ("serial", "answer"), [(None, Match.NEEDS_PROBE), ("A1", Match.YES), ("A2", Match.NO), ("", Match.NO)]
)
def test_a_serial_is_asked_for_only_when_the_rest_agrees(serial: str | None, answer: Match) -> None:
    told = Identity(serial=serial)
    assert matches(Selector(vendor=0x0951, serial="A1"), STICK, told) is answer
    assert matches(Selector(vendor=1, serial="A1"), STICK, told) is Match.NO
    assert matches(Selector(class_=3, serial="A1"), STICK, told) is Match.NO


UNCONFIGURED = dataclasses.replace(STICK, configuration=0, num_interfaces=0, interfaces=())
STORAGE, HID = (InterfaceClass(8, 6, 0x50),), (InterfaceClass(3, 0, 0),)


@pytest.mark.parametrize(
    ("device", "interfaces", "answer"),
    [
        (UNCONFIGURED, None, Match.NEEDS_PROBE),
        (UNCONFIGURED, STORAGE, Match.YES),
        (UNCONFIGURED, HID, Match.NO),
        (UNCONFIGURED, (), Match.NO),
        (dataclasses.replace(UNCONFIGURED, device_class=8), None, Match.YES),
        (STICK, None, Match.YES),
        (STICK, HID, Match.YES),
        (dataclasses.replace(STICK, interfaces=HID), STORAGE, Match.NO),
    ],
)
def test_interfaces_are_asked_for_only_where_the_server_does_not_list_them(
    device: Descriptor, interfaces: tuple[InterfaceClass, ...] | None, answer: Match
) -> None:
    assert matches(Selector(class_=8), device, Identity(interfaces=interfaces)) is answer
    assert matches(Selector(class_=8, vendor=1), device, Identity(interfaces=interfaces)) is Match.NO


def test_what_is_known_to_be_wrong_needs_no_probe() -> None:
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
def test_selectors_that_share_a_device_are_said_to_overlap(
    one: Selector, other: Selector, vendor: int, busid: str, told: Identity
) -> None:
    device = dataclasses.replace(STICK, usb_id=UsbId(vendor, 1), busid=busid)
    if matches(one, device, told) is Match.YES and matches(other, device, told) is Match.YES:
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
def test_selectors_plainly_apart_do_not_overlap(one: Selector, other: Selector) -> None:
    assert not may_overlap(one, other)


@given(st.text(max_size=20))
def test_a_value_in_a_template_never_chooses_the_directory(serial: str) -> None:
    path = render("/dev/usb/{serial}/x", {"serial": serial})
    head, middle, tail = path[len("/dev/usb/") :].rpartition("/")
    assert path.startswith("/dev/usb/")
    assert (middle, tail) == ("/", "x")
    assert "/" not in head
    assert head not in {"", ".", ".."}


def test_templates() -> None:
    assert render("/dev/{resource}-{index}", {"resource": "a.b", "index": "0"}) == "/dev/a.b-0"
    assert template_problem("/dev/{kind}{index}") is None
    for bad in ("dev/x", "/dev/{foo}", "/dev/../x", "/dev/{", "/dev/}x", "/dev/{index", ""):
        assert template_problem(bad) is not None
