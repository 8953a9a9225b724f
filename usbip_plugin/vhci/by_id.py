"""The names below /dev/*/by-id that udev gives to USB devices. Pure.

Followed: udev-builtin-usb_id.c, udev-builtin-input_id.c and rules.d/60-serial.rules, 60-persistent-*.rules of systemd.
Otherwise than there, what cannot be printed becomes "_" also where it is not ASCII.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

MAX_PART = 63  # characters of vendor and of model
MAX_NAME = 255  # of the whole, as of any file's name
_SPACE = re.compile(r"\s+")
_BITS = 8 * struct.calcsize("l")  # of each word of a bitmap in sysfs
_FULL_KEYBOARD = range(1, 32)  # Escape, digits and Q to D
_MOUSE_BUTTONS = range(0x110, 0x118)
_JOYSTICK_BUTTONS = range(0x120, 0x140)
_X, _Y = 0, 1


def serial_name(vendor: str, model: str, serial: str, instance: str = "") -> str:
    """udev's ID_SERIAL. vendor, model: their strings, or four digits each; serial: "" for none.

    instance: target:lun of a disk.
    """
    parts = [_part(vendor), _part(model)]
    if serial and all(" " <= c <= "\x7f" and c != "," for c in serial):
        parts.append(_part(serial, MAX_NAME))
    return ("_".join(parts) + (f"-{instance}" if instance else ""))[:MAX_NAME]


def _part(text: str, longest: int = MAX_PART) -> str:
    return "".join(c if _kept(c) else "_" for c in _SPACE.sub("_", text.strip())[:longest])


def _kept(c: str) -> bool:
    if c.isascii():
        return c.isalnum() or c in "#+-.:=@_"
    return c.isprintable()


def serial_link(name: str, interface: int, port: int | None) -> str:
    """Of a ttyUSB or ttyACM. port: of a converter with several, None for a ttyACM."""
    return _link("serial", f"{name}-if{interface:02x}" + ("" if port is None else f"-port{port}"))


def input_link(name: str, interface: int, node: str, what: str) -> str:
    """Of an event, mouse or js node; node: its file's name, what: see input_class. "" if it has none."""
    place = "" if interface == 0 else f"-if{interface:02x}"
    if node.startswith("event"):
        return _link("input", f"{name}{place}-event-{what}" if what else f"{name}-event-if{interface:02x}")
    return _link("input", f"{name}{place}-{what}") if what else ""


def hidraw_link(name: str, interface: int) -> str:
    """Of a hidraw node."""
    return _link("input", name + ("" if interface == 0 else f"-if{interface:02x}") + "-hidraw")


def video_link(name: str, index: int) -> str:
    """Of a videoN. index: which of its device's."""
    return _link("v4l", f"{name}-video-index{index}")


def disk_link(name: str, partition: int) -> str:
    """Of a disk, or of one of its partitions."""
    return _link("disk", name + (f"-part{partition}" if partition else ""))


def sound_link(name: str, interface: int) -> str:
    """Of a controlCN; pcm and midi nodes have none."""
    return _link("snd", f"{name}-{interface:02x}")


def _link(folder: str, name: str) -> str:
    whole = f"usb-{name}"
    return f"/dev/{folder}/by-id/{whole}" if len(whole.encode()) <= MAX_NAME else ""


def input_class(capabilities: Mapping[str, str]) -> str:
    """kbd, mouse, joystick or "", from the bitmaps of an input device: key, rel and abs, as sysfs writes them."""
    key, rel, abs_ = (bits(capabilities.get(name, "")) for name in ("key", "rel", "abs"))
    has_axes = {_X, _Y} <= abs_
    if ({_X, _Y} <= rel or has_axes) and key & set(_MOUSE_BUTTONS):
        return "mouse"
    if has_axes and key & set(_JOYSTICK_BUTTONS):
        return "joystick"
    return "kbd" if key >= set(_FULL_KEYBOARD) else ""


def bits(bitmap: str) -> frozenset[int]:
    """The numbers set in a bitmap: words in hexadecimal, the highest first. Empty if it is none."""
    try:
        words = [int(word, 16) for word in reversed(bitmap.split()[:64])]
    except ValueError:
        return frozenset()
    return frozenset(i * _BITS + bit for i, word in enumerate(words) for bit in range(_BITS) if word >> bit & 1)
