"""Readers of single values. Each reader returns the value, or adds an error to problems and returns None."""

from __future__ import annotations

import math
import re
from enum import Enum
from typing import TypeVar

from usbip_plugin.config.document import Node, Problems
from usbip_plugin.config.problems import shown
from usbip_plugin.config.schema import path_problem
from usbip_plugin.model import HUB_CLASS, UsbId, canonical_host

MAX_BUS_ID_GLOB = 64  # characters of a bus ID or a glob over bus IDs; a bus ID in a USB/IP message has at most 31
MAX_SERIAL_CHARACTERS = 126  # characters of a serial number; a USB string descriptor cannot hold more
MAX_HOST_CHARACTERS = 253  # characters of a host name, the limit of DNS
MAX_NAME_CHARACTERS = 63  # characters of a resource name, the limit of Kubernetes after the domain

CLASS_NAMES = {
    "audio": 0x01,
    "comm": 0x02,
    "cdc": 0x02,
    "hid": 0x03,
    "image": 0x06,
    "printer": 0x07,
    "mass-storage": 0x08,
    "storage": 0x08,
    "smart-card": 0x0B,
    "video": 0x0E,
    "wireless": 0xE0,
    "vendor": 0xFF,
}

_HEX = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,4})")
MAX_NUMBER_CHARACTERS = 64
"""Characters of a number or duration. None needs more, and parsing a number with very many digits takes long."""
_GO_INTEGER = re.compile(
    r"[-+]?(?:0[xX]_*[0-9a-fA-F][0-9a-fA-F_]*|0[oO]?_*[0-7][0-7_]*|0[bB]_*[01][01_]*|[0-9][0-9_]*)"
)
_GO_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
NODE_NAME_GLOB = r"[0-9a-z.*?\[\]!-]{1,253}"
_BUS_ID_GLOB = re.compile(r"[0-9A-Za-z.:*?\[\]!-]+")
_HOST = re.compile(r"[0-9A-Za-z._:%-]+")
SHORT_IPV4 = r"(?!([0-9]{1,3}\.){3}[0-9]{1,3}\.?$)(0[xX][0-9A-Fa-f]*|[0-9]*)(\.(0[xX][0-9A-Fa-f]*|[0-9]*))*"
"""What a resolver may read as an address that nobody has meant: 10.20 as 10.0.0.20."""
_SHORT_IPV4 = re.compile(SHORT_IPV4)
_NAME = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z._-]*[0-9A-Za-z])?")
_E = TypeVar("_E", bound=Enum)


def usb_number(node: Node, problems: Problems, *, digits: int) -> int | None:
    """Reads a hexadecimal USB number of at most `digits` digits, quoted, or unquoted if it has only one meaning.

    The Go program reads an unquoted number as a YAML integer: 0x1050 is hexadecimal, 1666 decimal, 0666 octal. If the
    YAML integer differs from the hexadecimal number, the value is refused with an error that shows both.
    """
    text = node.scalar or ""
    match = _HEX.fullmatch(text)
    as_hex = int(match[1], 16) if match and len(match[1]) <= digits else None
    as_go = None if node.quoted else _go_reading(text)
    if as_go is not None and as_hex is not None and as_go != as_hex:
        cures = " or ".join(f'"{reading:0{digits}x}"' for reading in (as_hex, as_go) if 0 <= reading < 16**digits)
        problems.error(
            node,
            f"{text} without quotes is ambiguous: hexadecimal {as_hex:0{digits}x}, or {as_go} (hexadecimal "
            f"{as_go:0{digits}x}) as YAML and usbip-device-plugin read it; write {cures}",
        )
        return None
    value = as_hex if as_hex is not None else as_go
    if value is None or not 0 <= value < 16**digits:
        what = "USB ID" if digits == 4 else "USB class"
        problems.error(node, f"{node.describe()} is not a valid {what}; expected up to {digits} hex digits in quotes")
        return None
    if value and not node.quoted and not text.lower().startswith("0x"):
        problems.warn(node, f'{text} is read as 0x{value:0{digits}x}; put it in quotes: "{value:0{digits}x}"')
    return value


def _go_reading(text: str) -> int | None:
    """Returns the integer that Go's yaml.v3 and mapstructure read from an unquoted scalar, None if they refuse it."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    if _GO_INTEGER.fullmatch(text):
        plain = text.replace("_", "")
        if octal := re.fullmatch(r"([-+]?)0([0-7]+)", plain):
            return int(f"{octal[1]}0o{octal[2]}", 0)
        # a number that starts with 0 and is not octal (0951) is floating-point to yaml.v3
        return int(plain, 10 if re.fullmatch(r"[-+]?0[0-9]+", plain) else 0)
    if _GO_FLOAT.fullmatch(text):
        number = float(text)
        return int(number) if math.isfinite(number) and number == int(number) else None
    return None


def class_code(node: Node, problems: Problems) -> int | None:
    """Reads a USB class: two hexadecimal digits or one of CLASS_NAMES."""
    text = (node.scalar or "").lower()
    if text in CLASS_NAMES:
        return CLASS_NAMES[text]
    if not _HEX.fullmatch(text):
        names = ", ".join(CLASS_NAMES)
        problems.error(node, f"{node.describe()} is not a valid USB class; expected 2 hex digits or one of {names}")
        return None
    code = usb_number(node, problems, digits=2)
    if code == HUB_CLASS:
        problems.error(node, "class 09 is a USB hub, and USB/IP cannot carry hubs; select the devices behind the hub")
    return code


def seconds(node: Node, problems: Problems, *, least: float, most: float) -> float | None:
    """Reads a number of seconds from least to most, or a duration with units such as "500ms", "40s", "1m30s"."""
    text = node.scalar or ""
    value = None
    parts = _DURATION_PART.findall(text) if len(text) <= MAX_NUMBER_CHARACTERS else []
    if parts and "".join(number + unit for number, unit in parts) == text:
        value = sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
    elif len(text) <= MAX_NUMBER_CHARACTERS and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        value = float(text)
    if value is None:
        problems.error(
            node, f"{node.describe()} is not a valid duration; expected seconds, or a duration such as 1m30s"
        )
    elif not least <= value <= most:
        problems.error(node, f"{text} is out of range; must be {least:g}s to {most:g}s")
        return None
    return value


def boolean(node: Node, problems: Problems) -> bool | None:
    """Reads true or false. Refuses all other words that YAML 1.1 takes for booleans, such as yes and on."""
    if node.scalar in {"true", "false"}:
        return node.scalar == "true"
    problems.error(node, f"expected true or false, got {node.describe()}")
    return None


def choice(node: Node, problems: Problems, options: type[_E]) -> _E | None:
    """Reads one of the values of an enum, ignoring case."""
    try:
        return options((node.scalar or "").lower())
    except ValueError:
        allowed = ", ".join(str(option.value) for option in options)
        problems.error(node, f"{node.describe()} is not valid; expected one of {allowed}")
        return None


def port(node: Node, problems: Problems) -> int | None:
    """Reads a TCP port (1-65535)."""
    text = node.scalar or ""
    if re.fullmatch(r"[0-9]{1,5}", text) and 0 < int(text) < 65536:
        return int(text)
    problems.error(node, f"{node.describe()} is not a valid TCP port (1-65535)")
    return None


def host(node: Node, problems: Problems) -> str | None:
    """Reads a host name or address, without brackets around an IPv6 address, see also canonical_host()."""
    text = node.scalar or ""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if bare and len(bare) <= MAX_HOST_CHARACTERS and _HOST.fullmatch(bare):
        if re.fullmatch(r"[^:]*:[0-9]+", bare):
            problems.error(node, f"{text} contains a port; write the port in target.port")
            return None
        if _SHORT_IPV4.fullmatch(bare):
            problems.error(node, f"{text} is not an IPv4 address; expected four numbers, such as 10.20.30.40")
            return None
        return canonical_host(bare)
    problems.error(node, f"{node.describe()} is not a valid host name or address")
    return None


def text(node: Node, problems: Problems, *, longest: int) -> str | None:
    """Reads printable text of 1 to `longest` characters, without blanks at its ends."""
    value = (node.scalar or "").strip()
    if value and len(value) <= longest and value.isprintable():
        if value != node.scalar:
            problems.warn(node, f"removed blanks at the ends: '{shown(value)}'")
        return value
    problems.error(node, f"expected 1 to {longest} printable characters, got {node.describe()}")
    return None


def usb_id(node: Node, problems: Problems) -> UsbId | None:
    """Reads vendor:product, each with four hexadecimal digits, as `lsusb` and `usbip list` show it."""
    found = UsbId.parse(node.scalar or "")
    if found is None:
        problems.error(
            node,
            f'{node.describe()} is not a valid vendor:product pair; expected 4 hex digits each, such as "0951:1666"',
        )
    return found


def bus_id(node: Node, problems: Problems) -> str | None:
    """Reads a bus ID such as 1-1.4, or a glob over bus IDs such as 1-*."""
    value = node.scalar or ""
    if value and len(value) <= MAX_BUS_ID_GLOB and _BUS_ID_GLOB.fullmatch(value):
        return value
    problems.error(
        node,
        f'{node.describe()} is not a valid bus ID; expected one from `usbip list`, such as "1-1.4", or a glob, "1-*"',
    )
    return None


def node_name(node: Node, problems: Problems) -> str | None:
    """Reads the name of a node, or a glob over such names."""
    value = node.scalar or ""
    if re.fullmatch(NODE_NAME_GLOB, value, re.ASCII):
        return value
    problems.error(node, f'{node.describe()} is not the name of a node; expected one such as lab-1, or a glob, "lab-*"')
    return None


def absolute_path(node: Node, problems: Problems) -> str | None:
    """Reads an absolute path without ".."."""
    path = node.scalar or ""
    if (problem := path_problem(path)) is None:
        return path
    problems.error(node, problem)
    return None


def resource_name(name: str, node: Node, problems: Problems) -> str | None:
    """Returns the part of a resource name after the domain in lower case, as the Go program. node: for problems."""
    if len(name) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(name):
        problems.error(
            node,
            f"'{shown(name)}' is not a valid resource name; expected up to {MAX_NAME_CHARACTERS} letters, digits, '-', "
            "'_' or '.', with a letter or digit at both ends",
        )
        return None
    if name != name.lower():
        problems.warn(node, f"the resource name is converted to lower case: {name.lower()}")
    return name.lower()


def permissions(node: Node, problems: Problems) -> str | None:
    """Reads device permissions: some of r (read), w (write) and m (mknod), each once."""
    value = node.scalar or ""
    if value and len(set(value)) == len(value) and set(value) <= set("rwm"):
        return value
    problems.error(node, f"{node.describe()} is not valid; expected some of r, w and m, such as rw")
    return None
