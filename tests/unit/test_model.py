"""Endpoints of connections, as locks and port records have them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.model import Endpoint, InterfaceClass, InterfaceRules

endpoints = st.builds(
    Endpoint,
    st.ip_addresses().filter(lambda a: getattr(a, "ipv4_mapped", None) is None).map(str),
    st.integers(1, 65535),
)


@given(endpoints)
def test_an_endpoint_is_read_back_from_its_text(endpoint: Endpoint) -> None:
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        *("", "10.0.0.5", "10.0.0.5:", "10.0.0.5:0", "10.0.0.5:65536", "10.0.0.5:-1", "10.0.0.5:1 ", "lab:1"),
        *("10.0.5:1", "fd00::1:1", "[fd00::1]", "[fd00::1]:x", "[fe80::1%eth0]:1", "[10.0.0.5]:1"),
        *("10.0.0.5:\u0661", "1" * 70),
    ],
)
def test_any_other_text_is_not_an_endpoint(text: str) -> None:
    assert Endpoint.parse(text) is None


def test_an_endpoint_is_what_the_other_side_sees() -> None:
    assert Endpoint.of(("10.0.0.5", 40123)) == Endpoint("10.0.0.5", 40123)
    assert Endpoint.of(("::ffff:10.0.0.5", 40123, 0, 0)) == Endpoint("10.0.0.5", 40123), "a dual-stack listener"
    assert Endpoint.of(("fe80::1%eth0", 40123, 0, 2)) == Endpoint("fe80::1", 40123)
    assert str(Endpoint.parse("[FD00:0::5]:7")) == "[fd00::5]:7", "one text for each endpoint"


SERIAL, KEYBOARD, MOUSE = InterfaceClass(0xFF, 0, 0), InterfaceClass(3, 1, 1), InterfaceClass(3, 1, 2)
SENSOR, ETHERNET, MODEM, RNDIS = (InterfaceClass(*codes) for codes in ((3, 0, 0), (2, 6, 0), (2, 2, 1), (0xE0, 1, 3)))
DEFAULT, HID_ASKED, HID_ALLOWED = InterfaceRules(), InterfaceRules(asked=(3,)), InterfaceRules(allowed=(3,))


@pytest.mark.parametrize(
    ("rules", "interfaces", "problem"),
    [
        (DEFAULT, [], None),
        (DEFAULT, [SERIAL, SENSOR, MODEM], None),
        (DEFAULT, [KEYBOARD], "has a keyboard (03/01/01) that its resource does not allow"),
        (DEFAULT, [SERIAL, KEYBOARD], None),
        (DEFAULT, [MOUSE], "has a mouse (03/01/02)"),
        (DEFAULT, [ETHERNET], "has a network interface (02/06/00)"),
        (DEFAULT, [RNDIS], "has a network interface (e0/01/03)"),
        (DEFAULT, [InterfaceClass(2, 2, 0xFF)], "has a network interface (02/02/ff)"),
        (DEFAULT, [InterfaceClass(0xEF, 4, 1)], "has a network interface (ef/04/01)"),
        (HID_ASKED, [SERIAL, KEYBOARD, MOUSE], None),
        (HID_ASKED, [KEYBOARD, ETHERNET], None),
        (HID_ASKED, [ETHERNET], "has a network interface"),
        (HID_ALLOWED, [KEYBOARD, SENSOR], None),
        (HID_ALLOWED, [SERIAL], "has an interface (ff/00/00)"),
        (InterfaceRules(allowed=(0xFF,), asked=(3,)), [KEYBOARD], "has a keyboard"),
        (InterfaceRules(exactly=(SENSOR,)), [SENSOR, KEYBOARD], None),
        (InterfaceRules(exactly=(SENSOR,)), [KEYBOARD, SERIAL], "has a keyboard"),
        (InterfaceRules(allowed=(8,)), [KEYBOARD, SERIAL], "has a keyboard"),
        (InterfaceRules(selected=(3, 8), asked=(3, 8)), [KEYBOARD], None),
        (InterfaceRules(selected=(0xEF,)), [SERIAL], None),
        (InterfaceRules(selected=(8,)), [SERIAL], "has no interface of class 08, as its selector names"),
        (InterfaceRules(selected=(3,)), [SERIAL, KEYBOARD], "has a keyboard"),
        (InterfaceRules(selected=(3,)), [SERIAL, KEYBOARD, SENSOR], None),
        (InterfaceRules(selected=(0xFF,)), [SERIAL, KEYBOARD], None),
    ],
)
def test_a_device_is_refused_if_nothing_that_it_was_selected_for_is_allowed(
    rules: InterfaceRules, interfaces: list[InterfaceClass], problem: str | None
) -> None:
    found = rules.problem(0xEF, [(one,) for one in interfaces])
    assert found is None if problem is None else found is not None and found.startswith(problem)


@pytest.mark.parametrize(
    ("rules", "settings", "allowed"),
    [
        (DEFAULT, [SERIAL], True),
        (DEFAULT, [SENSOR, KEYBOARD], False),
        (DEFAULT, [MODEM, ETHERNET], False),
        (DEFAULT, [], False),
        (HID_ASKED, [SENSOR, KEYBOARD], True),
        (InterfaceRules(asked=(3,), exactly=(SENSOR,)), [SENSOR, KEYBOARD], False),
        (InterfaceRules(allowed=(8,), exactly=(KEYBOARD,)), [KEYBOARD], True),
    ],
)
def test_an_interface_is_allowed_with_all_its_alternate_settings(
    rules: InterfaceRules, settings: list[InterfaceClass], allowed: bool
) -> None:
    assert rules.allows(settings) is allowed
