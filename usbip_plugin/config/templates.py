"""containerPath templates: where a device node appears in the container."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping

from usbip_plugin.config.document import shown

FIELDS = (
    *("resource", "index", "kind", "name", "number", "interface"),
    *("busid", "serial", "vendor", "product", "manufacturer", "model"),
)
MAX_VALUE = 128
"""Characters of a field's value; a string descriptor has 126."""
_EVERY = frozenset({"kind", "name"})
_CHILDREN = frozenset({"number", "interface"})
_TELLS_DEVICES_APART = frozenset({"index", "name", "busid", "serial"})
_FIELD = re.compile(r"\{([^{}]*)\}")
_UNSAFE = re.compile(r"[^0-9A-Za-z._-]")


class Names(enum.Enum):
    """Which of a device's nodes a template gives a path."""

    EVERY = "every node"
    CHILDREN = "every child"
    MAIN = "the node people mean by the device"


def names(template: str) -> Names:
    """By the fields that tell nodes apart."""
    fields = set(_FIELD.findall(template))
    if fields & _EVERY:
        return Names.EVERY
    return Names.CHILDREN if fields & _CHILDREN else Names.MAIN


def tells_devices_apart(template: str) -> bool:
    """False if two devices of one container are certain to have the same path by it."""
    return bool(set(_FIELD.findall(template)) & _TELLS_DEVICES_APART)


def template_problem(template: str) -> str | None:
    """What is wrong with a template, or None. A template is an absolute path with {fields} of FIELDS in it."""
    if not template.startswith("/") or not template.isprintable():
        return f"'{shown(template)}' is no absolute path"
    if ".." in template.split("/"):
        return f"{shown(template)} must not contain .."
    for name in _FIELD.findall(template):
        if name not in FIELDS:
            return f"{{{shown(name)}}} is unknown; known are {', '.join(f'{{{known}}}' for known in FIELDS)}"
    if set(_FIELD.sub("", template)) & set("{}"):
        return f"{shown(template)} has a lone brace"
    return None


def render(template: str, values: Mapping[str, str]) -> str:
    """The path for one node. Characters of a value that do not belong in a file name become "-": a serial number
    comes from the device and must not choose the directory. A field without value becomes "-".
    """
    return _FIELD.sub(lambda match: _safe(values.get(match[1], "")), template)


def _safe(value: str) -> str:
    return _UNSAFE.sub("-", value[:MAX_VALUE]).lstrip(".") or "-"
