"""What a configuration is once it has been checked: frozen dataclasses, defaults and bounds. No I/O."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from usbip_plugin.model import ServerKey

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

CHILD_KINDS = ("tty", "hidraw", "input", "video4linux", "sound", "block", "usbmisc")
DEFAULT_EXTRA_PERMISSIONS = "rwm"


class OnLoss(enum.Enum):
    """What happens to a pod whose device came back under other device nodes. RESTART needs cdi."""

    KEEP = "keep"
    RESTART = "restart"
    EVICT = "evict"


@dataclass(frozen=True, slots=True)
class Selector:
    """A set of devices on one server: every field that is given must agree. No field given: every device.

    vendor, product: 16 bits; bus_id: a glob over bus ids; serial: the exact serial number;
    class_: a class code, 8 bits, of the device or of any of its interfaces.
    """

    vendor: int | None = None
    product: int | None = None
    bus_id: str | None = None
    serial: str | None = None
    class_: int | None = None

    def __str__(self) -> str:
        parts = []
        if self.vendor is not None:
            parts.append(f"vendor {self.vendor:04x}")
        if self.product is not None:
            parts.append(f"product {self.product:04x}")
        if self.bus_id is not None:
            parts.append(f"bus_id {self.bus_id}")
        if self.serial is not None:
            parts.append(f"serial {self.serial}")
        if self.class_ is not None:
            parts.append(f"class {self.class_:02x}")
        return ", ".join(parts) or "any device"


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
class ResourceConfig:
    """A resource by its name without the domain. The first entry of devices that matches a device gives its extras.

    children: the kinds of device nodes a pod gets besides the USB node, None for whatever the device has.
    container_path: a template as in templates.py, None for the path on the host. cdi: pods get the nodes by CDI name.
    """

    name: str
    devices: tuple[DeviceSelector, ...]
    on_loss: OnLoss = OnLoss.KEEP
    cdi: bool = False
    children: tuple[str, ...] | None = None
    container_path: str | None = None


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

    def servers(self) -> frozenset[ServerKey]:
        """Every server named anywhere."""
        return frozenset(entry.target for resource in self.resources for entry in resource.devices)
