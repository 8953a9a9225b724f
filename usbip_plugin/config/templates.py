"""containerPath templates: where a device node appears in the container."""

from __future__ import annotations

import re
from collections.abc import Mapping

from usbip_plugin.config.document import shown

FIELDS = ("resource", "index", "kind", "name", "busid", "serial")
_FIELD = re.compile(r"\{([^{}]*)\}")
_UNSAFE = re.compile(r"[^0-9A-Za-z._-]")


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
    return _FIELD.sub(lambda match: _UNSAFE.sub("-", values.get(match[1], "")).lstrip(".") or "-", template)
