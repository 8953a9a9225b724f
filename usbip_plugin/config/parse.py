"""YAML text to Config, with every problem of the file reported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from usbip_plugin.config import container, scalars, schema
from usbip_plugin.config.devices import read_device, report_overlaps
from usbip_plugin.config.document import Node, Problems, read_document, shown
from usbip_plugin.config.fields import Unknown, read_fields
from usbip_plugin.config.schema import Config, DeviceSelector, FileSettings, LockConfig, OnLoss, ResourceConfig
from usbip_plugin.errors import ConfigError

MAX_DEVICES = 1024
"""Entries over all resources, one with several bus ids counted for each; checking for overlaps costs their square."""

RESTART_NEEDS_CDI = (
    "restart needs cdi: true in the same resource: without it the kubelet starts a container again with the device "
    "paths of its first start"
)

_FLAGS = ("domain", "plugin-directory", "pod-resources-socket", "log-level", "listen")
TOP_KEYS = ("resources", "lock", "allocateTimeout", "publishNodeStatus", *_FLAGS)
RESOURCE_KEYS = ("devices", *container.KEYS, "onLoss", "cdi")
LOCK_KEYS = ("duration",)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Parsed:
    """A checked configuration, and what is odd about the file, one line each with its place."""

    config: Config
    warnings: tuple[str, ...] = ()


def parse_config(text: str, source: str = "config.yaml") -> Parsed:
    """Config from YAML text. source: the file's name for messages. ConfigError with every problem found."""
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
    # each bus id of a list counts: they are compared with one another like entries
    count = sum(max(1, len(schema.several(device.selector.bus_id))) for _, device, _ in places)
    if count > MAX_DEVICES:
        problems.error(node, f"{count} devices; at most {MAX_DEVICES} are allowed")
    else:
        report_overlaps(places, problems)
    return tuple(resources)


def _resource(
    name: str, node: Node, allocate_timeout: float, problems: Problems
) -> tuple[list[tuple[DeviceSelector, Node]], ResourceConfig]:
    """Both forms: the list of the Go program, and the mapping with `devices` that has more keys."""
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
            if device is not None and problems.errors == before:  # one that could not be read would look like another
                entries.append((device, item))
        if not devices.yaml.value:
            problems.warn(devices, "an empty list: the resource is offered with no device")
    resource = ResourceConfig(
        name=name,
        devices=tuple(device for device, _ in entries),
        on_loss=_optional(fields, "onLoss", OnLoss.KEEP, lambda value: scalars.choice(value, problems, OnLoss)),
        cdi=_optional(fields, "cdi", False, lambda value: scalars.boolean(value, problems)),
        children=container.children(fields.get("children"), problems),
        children_timeout=container.children_timeout(fields, allocate_timeout, problems),
        container_paths=container.container_paths(fields.get("containerPath"), problems),
        by_id=_optional(fields, "byId", False, lambda value: scalars.boolean(value, problems)),
        permissions=container.permissions(fields.get("permissions"), problems),
        read_only=_optional(fields, "readOnly", False, lambda value: scalars.boolean(value, problems)),
    )
    if resource.permissions is not None and not resource.cdi:
        problems.error(fields["permissions"], container.PERMISSIONS_NEED_CDI)
    if resource.on_loss is OnLoss.RESTART and not resource.cdi:
        problems.error(fields["onLoss"], RESTART_NEEDS_CDI)
    return entries, resource
