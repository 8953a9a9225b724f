"""What sysfs says of one USB device as a whole. What the device chose itself is bounded, or left out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.model import UsbId

MAX_STRING = 126  # characters a USB string descriptor can hold
_USB_ID = re.compile("[0-9a-fA-F]{4}")
_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """An enumerated USB device. devnum tells one enumeration on a bus from the next.

    serial, manufacturer, model: None if it has none, or none that can be printed: the device chose it.
    """

    usb_id: UsbId
    devnum: int
    authorized: bool
    serial: str | None
    manufacturer: str | None = None
    model: str | None = None


def read_facts(device: Path) -> DeviceFacts | None:
    """None while the directory is not complete, or gone."""
    try:
        usb_id = UsbId(_usb_number(device / "idVendor"), _usb_number(device / "idProduct"))
        devnum = number(text(device / "devnum"))
        authorized = text(device / "authorized") != "0"
        text(device / "dev")
    except (OSError, ValueError):
        return None
    serial, manufacturer, model = (_string(device / name) for name in ("serial", "manufacturer", "product"))
    return DeviceFacts(usb_id, devnum, authorized, serial, manufacturer, model)


def text(path: Path) -> str:
    """An attribute, without the white space around it. OSError."""
    return path.read_text(errors="replace").strip()


def number(digits: str) -> int:
    """ValueError for what is no decimal number of at most nine digits."""
    if not _NUMBER.fullmatch(digits):
        raise ValueError(digits[:80])
    return int(digits)


def _string(path: Path) -> str | None:
    try:
        found = text(path)[:MAX_STRING]
    except OSError:
        return None
    return found if found and found.isprintable() else None


def _usb_number(path: Path) -> int:
    found = text(path)
    if not _USB_ID.fullmatch(found):
        raise ValueError(found[:80])
    return int(found, 16)
