"""The configuration as frozen dataclasses, its defaults and bounds, and path templates."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

from usbip_plugin.config.document import shown
from usbip_plugin.model import ServerKey, UsbId

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


DEFAULT_CONFIG_PATH = "/etc/usbip-device-plugin/config.yaml"
DEFAULT_DOMAIN = "usbip.dev"
DEFAULT_PLUGIN_DIRECTORY = "/var/lib/kubelet/device-plugins"
DEFAULT_POD_RESOURCES_SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"
DEFAULT_CDI_DIRECTORY = "/var/run/cdi"
DEFAULT_LOG_LEVEL = "info"
DEFAULT_LISTEN = ":8080"
LOG_LEVELS = ("all", "debug", "info", "warn", "error", "none")

DEFAULT_LOCK_DURATION_S = 40.0
IMPORT_WINDOW_S = 10.0
"""Longest time between the write on a lock and the end of the import it covers."""
MIN_LOCK_DURATION_S = 2 * IMPORT_WINDOW_S + 1
"""The import window must stay below half the duration; Lease durations are whole seconds."""
MAX_LOCK_DURATION_S = 3600.0
DEFAULT_ALLOCATE_TIMEOUT_S = 10.0
MIN_ALLOCATE_TIMEOUT_S = 1.0
MAX_ALLOCATE_TIMEOUT_S = 120.0

CHILD_KINDS = ("tty", "video4linux", "block", "printer", "hidraw", "input", "sound", "usbmisc")
"""Kinds of device nodes besides the USB node. The first that a device has is the one people mean by it."""
DEFAULT_EXTRA_PERMISSIONS = "rwm"
DEFAULT_CHILDREN_TIMEOUT_S = 5.0
MAX_CHILDREN_TIMEOUT_S = 60.0
MAX_SELECTOR_VALUES = 64
"""Of one key of a selector."""
_SHOWN_VALUES = 4
_T = TypeVar("_T")


def several(value: _T | tuple[_T, ...] | None) -> tuple[_T, ...]:
    """The values of a selector's key, one or a list of them; none for None."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


class OnLoss(enum.Enum):
    """What happens to a pod whose device came back under other device nodes. RESTART needs cdi."""

    KEEP = "keep"
    RESTART = "restart"
    EVICT = "evict"


@dataclass(frozen=True, slots=True)
class Selector:
    """A set of devices on one server: every field that is given must agree. No field given: every device.

    vendor, product: 16 bits; usb_ids: pairs of both; bus_id: a glob over bus ids; serial: the exact serial number;
    class_: a class code, 8 bits, of the device or of any of its interfaces. A field with several values agrees if one
    of them does; several are sorted, and one stands alone.
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
    """A device node of the host that goes along with every device of a selector. permissions: some of r, w, m."""

    host_path: str
    container_path: str
    permissions: str = DEFAULT_EXTRA_PERMISSIONS


@dataclass(frozen=True, slots=True)
class DeviceSelector:
    """One entry of a resource: the server, which of its devices, and what comes along with each."""

    target: ServerKey
    selector: Selector = field(default_factory=Selector)
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True, slots=True)
class NodePermissions:
    """Of the device nodes in a container, None for what the runtime makes of it. user, group: numeric ids."""

    mode: int | None = None
    user: int | None = None
    group: int | None = None


@dataclass(frozen=True, slots=True)
class ResourceConfig:
    """A resource by its name without the domain. The first entry of devices that matches a device gives its extras.

    children: the kinds of device nodes a pod gets besides the USB node, of one of which a node must come within
    children_timeout seconds; None for whatever the device has. container_paths: templates as in templates.py, none for
    the path on the host. by_id: also under the names that udev gives. cdi: pods get the nodes by CDI name; permissions
    need it.
    """

    name: str
    devices: tuple[DeviceSelector, ...]
    on_loss: OnLoss = OnLoss.KEEP
    cdi: bool = False
    children: tuple[str, ...] | None = None
    children_timeout: float = DEFAULT_CHILDREN_TIMEOUT_S
    container_paths: tuple[str, ...] = ()
    by_id: bool = False
    permissions: NodePermissions | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class LockConfig:
    """duration: seconds, whole, within MIN_LOCK_DURATION_S and MAX_LOCK_DURATION_S."""

    duration: float = DEFAULT_LOCK_DURATION_S


@dataclass(frozen=True, slots=True)
class FileSettings:
    """Command-line flags that the file sets, as the Go program allows; None where it does not. A flag given wins."""

    domain: str | None = None
    plugin_directory: str | None = None
    pod_resources_socket: str | None = None
    log_level: str | None = None
    listen: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration. allocate_timeout: seconds."""

    resources: tuple[ResourceConfig, ...]
    lock: LockConfig = field(default_factory=LockConfig)
    allocate_timeout: float = DEFAULT_ALLOCATE_TIMEOUT_S
    publish_node_status: bool = True
    settings: FileSettings = field(default_factory=FileSettings)

    def start_only(self) -> dict[str, object]:
        """What is read at start only, by its name in the file."""
        settings = {field.name.replace("_", "-"): getattr(self.settings, field.name) for field in fields(self.settings)}
        return {"lock.duration": self.lock.duration, "publishNodeStatus": self.publish_node_status, **settings}

    def servers(self) -> frozenset[ServerKey]:
        """Every server named anywhere."""
        return frozenset(entry.target for resource in self.resources for entry in resource.devices)

    def asking(self, server: ServerKey) -> tuple[Selector, ...]:
        """Of a server, the selectors that want to know of a device what only that can tell; see matching.matches."""
        return tuple(
            entry.selector
            for resource in self.resources
            for entry in resource.devices
            if entry.target == server and (entry.selector.serial is not None or entry.selector.class_ is not None)
        )
