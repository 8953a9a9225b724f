"""The keys of a resource that say what its containers get: which device nodes, where, and for whom."""

from __future__ import annotations

import re
from collections.abc import Mapping

from usbip_plugin.config import scalars, schema
from usbip_plugin.config.document import Node, Problems
from usbip_plugin.config.fields import Unknown, read_fields
from usbip_plugin.config.schema import NodePermissions
from usbip_plugin.config.templates import template_problem

KEYS = ("children", "childrenTimeout", "containerPath", "byId", "permissions", "readOnly")
PERMISSION_KEYS = ("mode", "user", "group")
MAX_TEMPLATES = 8
MAX_ID = (1 << 32) - 2  # -1 is no id

PERMISSIONS_NEED_CDI = (
    "needs cdi: true in the same resource: without it the kubelet is told of device nodes by their paths only, and the "
    "container has them with the mode, user and group of the node's own. Without cdi, give the pod the group of the "
    "node's device by securityContext.supplementalGroups"
)

_MODE = re.compile(r"0o?([0-7]{1,4})")
_KINDS = ", ".join(schema.CHILD_KINDS)


def children(node: Node | None, problems: Problems) -> tuple[str, ...] | None:
    """The kinds, each once, in their order; None if the key is not there."""
    if node is None:
        return None
    if not node.is_sequence:
        problems.error(node, f"{node.describe()} where a list is wanted, of {_KINDS}")
        return None
    kinds: list[str] = []
    for item in node.items():
        kind = item.scalar
        if kind == "net":
            problems.error(item, "a network interface is no device node: no container gets it by a device plugin")
        elif kind not in schema.CHILD_KINDS:
            problems.error(item, f"{item.describe()} is none of {_KINDS}")
        elif kind not in kinds:
            kinds.append(kind)
    return tuple(kinds)


def children_timeout(fields: Mapping[str, Node], allocate_timeout: float, problems: Problems) -> float:
    """Seconds; within an Allocate's, in which the device must also be attached."""
    node = fields.get("childrenTimeout")
    if node is None:
        return schema.DEFAULT_CHILDREN_TIMEOUT_S
    if "children" not in fields:
        problems.warn(node, "without children nothing is waited for so long; name the kinds in children")
    value = scalars.seconds(node, problems, least=0.0, most=schema.MAX_CHILDREN_TIMEOUT_S)
    if value is not None and value >= allocate_timeout:
        problems.error(node, f"must be shorter than allocateTimeout, which is {allocate_timeout:g}s: set that higher")
    return schema.DEFAULT_CHILDREN_TIMEOUT_S if value is None else value


def container_paths(node: Node | None, problems: Problems) -> tuple[str, ...]:
    """One template, or a list of them; each is checked."""
    if node is None:
        return ()
    items = tuple(node.items()) if node.is_sequence else (node,)
    if len(items) > MAX_TEMPLATES:
        problems.error(node, f"{len(items)} paths; at most {MAX_TEMPLATES} are allowed")
        return ()
    templates: list[str] = []
    for item in items:
        template = item.scalar
        if template is None or len(template) > scalars.MAX_PATH_CHARACTERS:
            problems.error(item, f"{item.describe()} is no path")
        elif (problem := template_problem(template)) is not None:
            problems.error(item, problem)
        elif template in templates:
            problems.error(item, "is there already; remove one of them")
        else:
            templates.append(template)
    return tuple(templates)


def permissions(node: Node | None, problems: Problems) -> NodePermissions | None:
    """None if the key is not there, or has errors."""
    if node is None:
        return None
    before = problems.errors
    fields = read_fields(node, problems, PERMISSION_KEYS, Unknown.ERROR, "permissions")
    if fields is None:
        return None
    if not fields and problems.errors == before:
        problems.error(node, f"nothing is set; give some of {', '.join(PERMISSION_KEYS)}")
    return NodePermissions(
        mode=_mode(fields.get("mode"), problems),
        user=_id(fields.get("user"), problems, "user"),
        group=_id(fields.get("group"), problems, "group"),
    )


def _mode(node: Node | None, problems: Problems) -> int | None:
    if node is None:
        return None
    match = _MODE.fullmatch(node.scalar or "")
    if match is not None and (value := int(match[1], 8)) <= 0o777:
        return value
    problems.error(node, f'{node.describe()} is no mode; write it in octal with a 0 in front, in quotes, as "0660"')
    return None


def _id(node: Node | None, problems: Problems, what: str) -> int | None:
    if node is None:
        return None
    text = node.scalar or ""
    if re.fullmatch(r"0|[1-9][0-9]{0,9}", text) and int(text) <= MAX_ID:
        return int(text)
    problems.error(
        node,
        f"{node.describe()} is no number; write the {what}'s numeric id: names are each image's own"
        + (" (dialout is 20 in Debian and Ubuntu)" if what == "group" else ""),
    )
    return None
