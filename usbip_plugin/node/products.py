"""What devices call themselves, kept beyond their attachment."""

from __future__ import annotations

from collections import OrderedDict

from usbip_plugin.claims import ClaimBook
from usbip_plugin.model import Attachment, UsbId

MAX_PRODUCTS = 512
"""Devices whose product is remembered, those attached last: 100 KiB."""
MAX_CHARACTERS = 80
"""Characters of one product. A USB string has 126."""


def product_of(attachment: Attachment) -> str | None:
    """Returns manufacturer and product as the device states them, None without any.

    A product that begins with its manufacturer is not preceded by it.
    """
    maker, model = ((text or "").strip() for text in (attachment.manufacturer, attachment.model))
    text = model if model.casefold().startswith(maker.casefold()) else f"{maker} {model}".strip()
    return text[:MAX_CHARACTERS] or None


class Products:
    """The products of the devices that were attached on this node since the process began."""

    def __init__(self, claims: ClaimBook) -> None:
        self._claims = claims
        self._known: OrderedDict[str, tuple[UsbId, str]] = OrderedDict()
        claims.subscribe(self._changed)

    def of(self, device_id: str, usb_id: UsbId | None) -> str | None:
        """Returns a device's product, None if it is not known, or if another device has its bus ID by now."""
        known = self._known.get(device_id)
        return known[1] if known is not None and known[0] == usb_id else None

    def _changed(self, device_id: str) -> None:
        claim = self._claims.get(device_id)
        if claim is None or claim.attachment is None or (product := product_of(claim.attachment)) is None:
            return
        self._known[device_id] = (claim.attachment.usb_id, product)
        self._known.move_to_end(device_id)
        if len(self._known) > MAX_PRODUCTS:
            self._known.popitem(last=False)
