"""The parser from YAML text to Config, which reports all problems of a file at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from usbip_plugin.config import scalars, schema
from usbip_plugin.config.document import Node, Problems, Unknown, read_document, read_fields, shown
from usbip_plugin.config.schema import (
    Config,
    DeviceSelector,
    FileSettings,
    LockConfig,
    NodePermissions,
    OnLoss,
    ResourceConfig,
    template_problem,
)
from usbip_plugin.config.selectors import read_device, report_overlaps
from usbip_plugin.errors import ConfigError

KEYS = ("children", "childrenTimeout", "containerPath", "byId", "permissions", "readOnly")
PERMISSION_KEYS = ("mode", "user", "group")
MAX_TEMPLATES = 8  # path templates of one resource
MAX_ID = (1 << 32) - 2  # highest user and group id; 32 bits of ones mean "no id" (-1) to the kernel

PERMISSIONS_NEED_CDI = (
    "needs cdi: true in the same resource: without it the kubelet is told of device nodes by their paths only, and the "
    "container has them with the mode, user and group of the node's own. Without cdi, give the pod the group of the "
    "node's device by securityContext.supplementalGroups"
)

_MODE = re.compile(r"0o?([0-7]{1,4})")
_KINDS = ", ".join(schema.CHILD_KINDS)


def children(node: Node | None, problems: Problems) -> tuple[str, ...] | None:
    """Returns the kinds listed in `children`, each once and in the file's order, or None if the key is missing."""
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
    """Returns the value of `childrenTimeout` in seconds.

    Must be shorter than allocateTimeout (seconds), in which the device must also be attached.
    """
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
    """Returns the valid path templates of `containerPath`, which is one template or a list of them."""
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
    """Returns the `permissions` of a resource, or None if the key is missing or not a mapping."""
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


MAX_DEVICES = 1024
"""Device entries over all resources; an entry with several bus ids counts once for each.

The time to check for overlaps grows with the square of this number.
"""

RESTART_NEEDS_CDI = (
    "restart needs cdi: true in the same resource: without it the kubelet starts a container again with the device "
    "paths of its first start"
)

_FLAGS = ("domain", "plugin-directory", "pod-resources-socket", "log-level", "listen")
TOP_KEYS = ("resources", "lock", "allocateTimeout", "publishNodeStatus", *_FLAGS)
RESOURCE_KEYS = ("devices", *KEYS, "onLoss", "cdi")
LOCK_KEYS = ("duration",)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Parsed:
    """A valid configuration and the warnings about its file, one line each with its place in the file."""

    config: Config
    warnings: tuple[str, ...] = ()


def parse_config(text: str, source: str = "config.yaml") -> Parsed:
    """Returns the configuration in YAML text. Raises ConfigError with all problems found.

    source: the file's name for messages.
    """
    root = read_document(text, source)
    if root is None or root.empty:
        raise ConfigError(source, [f"{source}: empty; resources: is missing, resources: {{}} for none"])
    problems = Problems(source)
    top = read_fields(root, problems, TOP_KEYS, Unknown.WARN, "the configuration") or {}
    allocate_timeout = _optional(
        top,
        "allocateTimeout",
        schema.DEFAULT_ALLOCATE_TIMEOUT_S,
        lambda node: scalars.seconds(
            node, problems, least=schema.MIN_ALLOCATE_TIMEOUT_S, most=schema.MAX_ALLOCATE_TIMEOUT_S
        ),
    )
    if "resources" in top:
        resources = _resources(top["resources"], allocate_timeout, problems)
    else:
        resources = ()
        if root.is_mapping:
            problems.error(root, "resources: missing; give at least one, or resources: {} for none")
    config = Config(
        resources=resources,
        lock=_lock(top.get("lock"), problems),
        allocate_timeout=allocate_timeout,
        publish_node_status=_optional(top, "publishNodeStatus", True, lambda node: scalars.boolean(node, problems)),
        settings=_settings(top, problems),
    )
    problems.raise_if_any()
    return Parsed(config, problems.warnings)


def _optional(fields: Mapping[str, Node], key: str, default: _T, read: Callable[[Node], _T | None]) -> _T:
    value = read(fields[key]) if key in fields else None
    return default if value is None else value


def _lock(node: Node | None, problems: Problems) -> LockConfig:
    if node is None:
        return LockConfig()
    fields = read_fields(node, problems, LOCK_KEYS, Unknown.ERROR, "the lock's settings") or {}
    duration = _optional(
        fields,
        "duration",
        schema.DEFAULT_LOCK_DURATION_S,
        lambda value: scalars.seconds(
            value, problems, least=schema.MIN_LOCK_DURATION_S, most=schema.MAX_LOCK_DURATION_S
        ),
    )
    if duration != int(duration):
        problems.error(fields["duration"], "the Lease API has whole seconds; leave the fraction out")
    return LockConfig(duration)


def _settings(fields: Mapping[str, Node], problems: Problems) -> FileSettings:
    values = {}
    for flag in _FLAGS:
        if flag in fields:
            values[flag.replace("-", "_")] = scalars.text(fields[flag], problems, longest=scalars.MAX_PATH_CHARACTERS)
    level = values.get("log_level")
    if level is not None and level not in schema.LOG_LEVELS:
        problems.error(fields["log-level"], f"{shown(level)} is none of {', '.join(schema.LOG_LEVELS)}")
    return FileSettings(**values)


def _resources(node: Node, allocate_timeout: float, problems: Problems) -> tuple[ResourceConfig, ...]:
    if not node.is_mapping:
        problems.error(node, f"{node.describe()} where a mapping from resource names to devices is wanted")
        return ()
    resources: list[ResourceConfig] = []
    places: list[tuple[str, DeviceSelector, Node]] = []
    for written, value in node.pairs(problems, same=str.lower):
        name = scalars.resource_name(written, value, problems)
        entries, resource = _resource(name or written, value, allocate_timeout, problems)
        places.extend((resource.name, device, place) for device, place in entries)
        resources.append(resource)
    if not resources:
        problems.warn(node, "no resource: the kubelet is offered nothing")
    # count each bus id of a list, because the overlap check compares them with one another like entries
    count = sum(max(1, len(schema.several(device.selector.bus_id))) for _, device, _ in places)
    if count > MAX_DEVICES:
        problems.error(node, f"{count} devices; at most {MAX_DEVICES} are allowed")
    else:
        report_overlaps(places, problems)
    return tuple(resources)


def _resource(
    name: str, node: Node, allocate_timeout: float, problems: Problems
) -> tuple[list[tuple[DeviceSelector, Node]], ResourceConfig]:
    """Returns the valid device entries of a resource with their nodes, and the resource.

    Accepts both forms: the list of the Go program, and the mapping with `devices` and further keys.
    """
    fields: Mapping[str, Node] = {"devices": node}
    if node.is_mapping:
        fields = read_fields(node, problems, RESOURCE_KEYS, Unknown.ERROR, "a resource") or {}
    entries: list[tuple[DeviceSelector, Node]] = []
    devices = fields.get("devices")
    if devices is None or not devices.is_sequence:
        what = devices.describe() if devices is not None and not node.is_mapping else "no list of devices"
        problems.error(node, f"{what} where a list of devices is wanted, each with target and selector")
    else:
        for item in devices.items():
            before = problems.errors
            device = read_device(item, problems)
            # keep only entries without errors: an entry read in part could look equal to another one
            if device is not None and problems.errors == before:
                entries.append((device, item))
        if not devices.yaml.value:
            problems.warn(devices, "an empty list: the resource is offered with no device")
    resource = ResourceConfig(
        name=name,
        devices=tuple(device for device, _ in entries),
        on_loss=_optional(fields, "onLoss", OnLoss.KEEP, lambda value: scalars.choice(value, problems, OnLoss)),
        cdi=_optional(fields, "cdi", False, lambda value: scalars.boolean(value, problems)),
        children=children(fields.get("children"), problems),
        children_timeout=children_timeout(fields, allocate_timeout, problems),
        container_paths=container_paths(fields.get("containerPath"), problems),
        by_id=_optional(fields, "byId", False, lambda value: scalars.boolean(value, problems)),
        permissions=permissions(fields.get("permissions"), problems),
        read_only=_optional(fields, "readOnly", False, lambda value: scalars.boolean(value, problems)),
    )
    if resource.permissions is not None and not resource.cdi:
        problems.error(fields["permissions"], PERMISSIONS_NEED_CDI)
    if resource.on_loss is OnLoss.RESTART and not resource.cdi:
        problems.error(fields["onLoss"], RESTART_NEEDS_CDI)
    return entries, resource
