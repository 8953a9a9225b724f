"""Endpoints of connections, as locks and port records have them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.model import Endpoint

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
