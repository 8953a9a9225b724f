"""The products of devices are known after their attachment has ended."""

from __future__ import annotations

import pytest

from usbip_plugin.claims import Claim, ClaimBook, ClaimEvent
from usbip_plugin.model import Attachment, DeviceKey, ServerKey, UsbId
from usbip_plugin.node.products import MAX_CHARACTERS, MAX_PRODUCTS, Products, product_of

USB_ID = UsbId(0x951, 0x1666)


def attachment(maker: str | None, model: str | None, busid: str = "1-1") -> Attachment:
    key = DeviceKey(ServerKey("lab"), busid)
    return Attachment(key, 0, "3-1", USB_ID, None, (), maker, model)


@pytest.mark.parametrize(
    ("maker", "model", "product"),
    [
        ("Kingston", "DataTraveler", "Kingston DataTraveler"),
        ("Acme", "ACME Stick", "ACME Stick"),
        (None, "Stick", "Stick"),
        ("Acme", None, "Acme"),
        (None, None, None),
        (" ", "", None),
        ("x" * 126, "y" * 126, "x" * MAX_CHARACTERS),
    ],
)
def test_a_product_is_manufacturer_and_model(maker: str | None, model: str | None, product: str | None) -> None:
    assert product_of(attachment(maker, model)) == product


def test_a_product_is_known_after_the_release_and_not_for_another_device_at_the_bus_id() -> None:
    claims = ClaimBook()
    products = Products(claims)
    claim = Claim(DeviceKey(ServerKey("lab"), "1-1"), USB_ID, attachment=attachment("Acme", "Stick"))
    assert products.of(claim.id, USB_ID) is None
    claims.move(claim, ClaimEvent.ADOPTED)
    for event in (ClaimEvent.POD_GONE, ClaimEvent.RELEASED):
        claims.move(claims[claim.id], event)
    assert claims.get(claim.id) is None
    assert products.of(claim.id, USB_ID) == "Acme Stick"
    assert products.of(claim.id, UsbId(1, 2)) is None


def test_the_products_of_the_devices_attached_last_are_kept() -> None:
    claims = ClaimBook()
    products = Products(claims)
    made = [
        Claim(DeviceKey(ServerKey("lab"), f"1-{n}"), USB_ID, attachment=attachment("Acme", str(n), f"1-{n}"))
        for n in range(MAX_PRODUCTS + 1)
    ]
    for claim in made:
        claims.put(claim)
    known = [products.of(claim.id, USB_ID) for claim in made]
    assert known[:2] == [None, "Acme 1"]
    assert known.count(None) == 1
