"""The configuration as frozen dataclasses, its defaults and bounds, and path templates."""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from usbip_plugin.config.problems import shown
from usbip_plugin.model import ServerKey, UsbId

FIELDS = (
    *("resource", "index", "kind", "name", "number", "interface"),
    *("busid", "serial", "vendor", "product", "manufacturer", "model"),
)
"""The fields that a containerPath template can use."""
MAX_PATH_CHARACTERS = 4096
"""Characters of a path; PATH_MAX of Linux."""
MAX_VALUE = 128
"""Characters of a field's value in a rendered path; a USB string descriptor has up to 126."""
_EVERY = frozenset({"kind", "name"})
_CHILDREN = frozenset({"number", "interface"})
_DISTINCT = frozenset({"index", "name", "busid", "serial"})
FIELDS_OF_DEVICE = frozenset({"busid", "serial", "manufacturer", "model"})
"""Fields whose values the device or its server chooses."""
_FIELD = re.compile(r"\{([^{}]*)\}")
_UNSAFE = re.compile(r"[^0-9A-Za-z._-]")


class Names(enum.Enum):
    """The nodes of a device to which a template gives a path."""

    EVERY = "every node"
    CHILDREN = "every child"
    MAIN = "the main node of the device"


def names(template: str) -> Names:
    """Returns which nodes get a path from the template, according to its fields that differ between nodes."""
    fields = set(_FIELD.findall(template))
    if fields & _EVERY:
        return Names.EVERY
    return Names.CHILDREN if fields & _CHILDREN else Names.MAIN


def distinguishes_devices(template: str) -> bool:
    """Returns whether the template gives two devices of a container different paths."""
    return bool(set(_FIELD.findall(template)) & _DISTINCT)


def path_problem(path: str) -> str | None:
    """Returns why this is not an absolute path without "..", or None."""
    if not path.startswith("/") or len(path) > MAX_PATH_CHARACTERS or not path.isprintable():
        return f"'{shown(path)}' is not an absolute path"
    return f"'{shown(path)}' must not contain .." if ".." in path.split("/") else None


def template_problem(template: str) -> str | None:
    """Returns why this is not a valid containerPath template, or None: an absolute path, with FIELDS in braces.

    A part between slashes is never a device's choice alone: as /dev/{serial}, it could become the container's urandom.
    """
    if (problem := path_problem(template)) is not None:
        return problem
    for name in _FIELD.findall(template):
        if name not in FIELDS:
            return f"unknown field {{{shown(name)}}}; expected one of {', '.join(f'{{{known}}}' for known in FIELDS)}"
    if set(_FIELD.sub("", template)) & set("{}"):
        return f"{shown(template)} has an unmatched brace"
    for part in template.split("/"):
        chosen = next((name for name in _FIELD.findall(part) if name in FIELDS_OF_DEVICE), None)
        if chosen is not None and not _FIELD.sub("", part):
            return f"{{{chosen}}} needs text beside it, as in usb-{part}: the device could take another file's name"
    return None


def render(template: str, values: Mapping[str, str]) -> str:
    """Returns the path that the template gives a node with these field values.

    Characters that do not belong in a file name become "-": a device chooses its serial number, but not the directory.
    A field without a value becomes "-".
    """

    def safe(match: re.Match[str]) -> str:
        return _UNSAFE.sub("-", values.get(match[1], "")[:MAX_VALUE]).lstrip(".") or "-"

    return _FIELD.sub(safe, template)


DEFAULT_CONFIG_PATH = "/etc/usbip-device-plugin/config.yaml"
DEFAULT_EXPORT_CONFIG_PATH = "/etc/usbip-plugin/export.yaml"
DEFAULT_EXPORT_LISTEN = ":3240"
DEFAULT_EXPORT_HTTP = "127.0.0.1:3241"
DEFAULT_STATE_DIRECTORY = "/run/usbip-plugin"
DEFAULT_SYSFS = "/sys"
DEFAULT_DOMAIN = "usbip.dev"
DEFAULT_PLUGIN_DIRECTORY = "/var/lib/kubelet/device-plugins"
DEFAULT_POD_RESOURCES_SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"
DEFAULT_CDI_DIRECTORY = "/var/run/cdi"
DEFAULT_LOG_LEVEL = "info"
DEFAULT_LISTEN = "127.0.0.1:8080"
LOG_LEVELS = ("all", "debug", "info", "warn", "error", "none")

DEFAULT_LOCK_DURATION_S = 40.0
"""Seconds for which a node may be silent before other nodes may take over its locks."""
IMPORT_WINDOW_S = 10.0
"""Most seconds from the write of a lock to the end of the USB/IP import that this write allows."""
MIN_LOCK_DURATION_S = 2 * IMPORT_WINDOW_S + 1
"""Least lock duration in whole seconds, as in the Lease API: the import window must be shorter than half of it."""
MAX_LOCK_DURATION_S = 3600.0
"""Greatest lock duration in seconds."""
DEFAULT_ALLOCATE_TIMEOUT_S = 10.0
"""Seconds that an Allocate may take, during which the kubelet admits no other pod."""
MIN_ALLOCATE_TIMEOUT_S = 1.0
"""Least Allocate timeout in seconds."""
MAX_ALLOCATE_TIMEOUT_S = 120.0
"""Greatest Allocate timeout in seconds."""

CHILD_KINDS = ("tty", "video4linux", "block", "printer", "hidraw", "input", "sound", "usbmisc")
"""The usual kinds of device nodes besides the USB node, by rank. Every other kernel subsystem is a kind too.

Without `children`, a device's main node is of its first kind here.
"""
DEFAULT_ALLOW_EXTRAS = ("/dev/fuse", "/dev/snd/timer")
"""Patterns of the host's device nodes that `extras` may name unless --allow-extras says otherwise.

Whoever may edit the configuration could otherwise give any disk or the memory of every node to a pod.
"""
DEFAULT_EXTRA_PERMISSIONS = "rwm"
"""Permissions of an extra device node that sets none: read, write, mknod."""
DEFAULT_CHILDREN_TIMEOUT_S = 5.0
"""Seconds to wait for a node of the kinds in `children`."""
MAX_CHILDREN_TIMEOUT_S = 60.0
"""Greatest value of childrenTimeout in seconds."""
MIN_EVICT_AFTER_S = 1.0
"""Least value of evictAfter in seconds."""
MAX_EVICT_AFTER_S = 24 * 3600.0
"""Greatest value of evictAfter in seconds."""
MAX_SELECTOR_VALUES = 64
"""Values in the list of one key of a selector."""
_SHOWN_VALUES = 4  # values of one key that the text of a selector shows; the rest are counted
_T = TypeVar("_T")


def several(value: _T | tuple[_T, ...] | None) -> tuple[_T, ...]:
    """Returns the values of a selector's field as a tuple, which is empty for None."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


class OnLoss(enum.Enum):
    """The action for a pod whose device was re-attached with other device nodes.

    EVICT also acts when the device has lost its lock, or did not come back within evictAfter.

    KEEP: the pod stays as it is.
    RESTART: a warning Event asks for the end of the pod's container, so that the kubelet starts it again. Needs cdi.
    EVICT: the plugin evicts the pod, so that its successor gets the device.
    """

    KEEP = "keep"
    RESTART = "restart"
    EVICT = "evict"


@dataclass(frozen=True, slots=True)
class Selector:
    """A filter for the devices of one server. A device matches if every given field does; without fields, each does.

    A field with several values matches if one value does. Several values are a sorted tuple, a single value is bare in
    all fields but usb_ids.

    vendor, product: 16 bits each.
    usb_ids: pairs of vendor and product.
    bus_id: a glob over bus IDs.
    serial: the exact serial number.
    class_: a class code (8 bits) of the device or of any of its interfaces.
    """

    vendor: int | tuple[int, ...] | None = None
    product: int | tuple[int, ...] | None = None
    usb_ids: tuple[UsbId, ...] = ()
    bus_id: str | tuple[str, ...] | None = None
    serial: str | None = None
    class_: int | None = None

    def __str__(self) -> str:
        parts = []
        if self.vendor is not None:
            parts.append("vendor " + _listed([f"{vendor:04x}" for vendor in several(self.vendor)]))
        if self.product is not None:
            parts.append("product " + _listed([f"{product:04x}" for product in several(self.product)]))
        if self.usb_ids:
            parts.append("usb_ids " + _listed([str(usb_id) for usb_id in self.usb_ids]))
        if self.bus_id is not None:
            parts.append("bus_id " + _listed(list(several(self.bus_id))))
        if self.serial is not None:
            parts.append(f"serial {self.serial}")
        if self.class_ is not None:
            parts.append(f"class {self.class_:02x}")
        return ", ".join(parts) or "any device"


def _listed(values: list[str]) -> str:
    left = len(values) - _SHOWN_VALUES
    return " or ".join(values[:_SHOWN_VALUES]) + (f" or {left} more" if left > 0 else "")


@dataclass(frozen=True, slots=True)
class Extra:
    """A device node of the host that a container gets with each device. permissions: some of r, w and m."""

    host_path: str
    container_path: str
    permissions: str = DEFAULT_EXTRA_PERMISSIONS


@dataclass(frozen=True, slots=True)
class DeviceSelector:
    """A device entry of a resource. extras: the host's device nodes that a container gets with each device."""

    target: ServerKey
    selector: Selector = field(default_factory=Selector)
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True, slots=True)
class NodePermissions:
    """The mode (up to 0o777) and owner of the device nodes in a container; None leaves a value to the runtime."""

    mode: int | None = None
    user: int | None = None
    group: int | None = None


@dataclass(frozen=True, slots=True)
class ResourceConfig:
    """A resource that the kubelet offers to pods.

    name: without the domain.
    devices: the first entry that matches a device determines its extras.
    evict_after: seconds after which a pod whose lost device is not back is evicted, None for never. Needs OnLoss.EVICT.
    cdi: whether pods get the device nodes by CDI name.
    children: the kinds of device nodes that a pod gets besides the USB node: names of kernel subsystems, or "printer".
    A node of one of them must appear within children_timeout seconds. None gives the pod all nodes of the device.
    container_paths: templates for the paths in the container (see `template_problem`); none for the path on the host.
    by_id: whether the nodes also appear under the names that udev gives them.
    permissions: mode and owner of the nodes. Needs cdi.
    read_only: whether the nodes can be opened for reading only.
    allow_classes: class codes of the interfaces that are allowed; None for the default of InterfaceRules.
    node_names: globs over the names of the nodes that offer it; none for every node.
    """

    name: str
    devices: tuple[DeviceSelector, ...]
    on_loss: OnLoss = OnLoss.KEEP
    evict_after: float | None = None
    cdi: bool = False
    children: tuple[str, ...] | None = None
    children_timeout: float = DEFAULT_CHILDREN_TIMEOUT_S
    container_paths: tuple[str, ...] = ()
    by_id: bool = False
    permissions: NodePermissions | None = None
    read_only: bool = False
    allow_classes: tuple[int, ...] | None = None
    node_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LockConfig:
    """The settings of the locks. duration: whole seconds."""

    duration: float = DEFAULT_LOCK_DURATION_S


@dataclass(frozen=True, slots=True)
class FileSettings:
    """The command-line flags that the file sets, None if it does not. A flag on the command line overrides the file."""

    domain: str | None = None
    plugin_directory: str | None = None
    pod_resources_socket: str | None = None
    log_level: str | None = None
    listen: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A valid configuration. allocate_timeout: seconds."""

    resources: tuple[ResourceConfig, ...]
    lock: LockConfig = field(default_factory=LockConfig)
    allocate_timeout: float = DEFAULT_ALLOCATE_TIMEOUT_S
    publish_node_status: bool = True
    settings: FileSettings = field(default_factory=FileSettings)

    def on_node(self, node: str) -> Config:
        """Returns the configuration without the resources that this node does not offer."""
        offered = (
            resource
            for resource in self.resources
            if not resource.node_names or any(fnmatch.fnmatchcase(node, glob) for glob in resource.node_names)
        )
        return replace(self, resources=tuple(offered))

    def start_only(self) -> dict[str, object]:
        """Returns the settings that the plugin reads only at start, by their names in the file."""
        settings = {field.name.replace("_", "-"): getattr(self.settings, field.name) for field in fields(self.settings)}
        return {"lock.duration": self.lock.duration, "publishNodeStatus": self.publish_node_status, **settings}

    def servers(self) -> frozenset[ServerKey]:
        """Returns every server that any resource names."""
        return frozenset(entry.target for resource in self.resources for entry in resource.devices)

    def asking(self, server: ServerKey) -> tuple[Selector, ...]:
        """Returns a server's selectors that may need a probe of a device: those with a serial number or a class."""
        return tuple(
            entry.selector
            for resource in self.resources
            for entry in resource.devices
            if entry.target == server and (entry.selector.serial is not None or entry.selector.class_ is not None)
        )
