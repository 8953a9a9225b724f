"""The reference of the configuration file: each key with its type, bounds and default from the code.

Used by docs/generate.py and by the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from usbip_plugin.config import parse, scalars, schema, selectors
from usbip_plugin.config.schema import Config, Extra, LockConfig, OnLoss, ResourceConfig
from usbip_plugin.model import DEFAULT_USBIP_PORT


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the configuration file. All fields are text for people.

    path: the path of the key in the file, with NAME for a resource's name and [] for each element of a list.
    kind: the type and bounds of the value.
    default: the default value, or what happens without the key.
    text: the meaning.
    """

    path: str
    kind: str
    default: str
    text: str


KNOWN: Mapping[str, tuple[str, ...]] = {
    "": parse.TOP_KEYS,
    "lock.": parse.LOCK_KEYS,
    "resources.NAME.": parse.RESOURCE_KEYS,
    "resources.NAME.permissions.": parse.PERMISSION_KEYS,
    "resources.NAME.devices[].": selectors.DEVICE_KEYS,
    "resources.NAME.devices[].target.": selectors.TARGET_KEYS,
    "resources.NAME.devices[].selector.": selectors.SELECTOR_KEYS,
    "resources.NAME.devices[].extras[].": selectors.EXTRA_KEYS,
}
"""The keys that the parser accepts, by the path of the mapping that contains them."""


def seconds(value: float) -> str:
    """Returns a number of seconds in the form of the configuration file, such as "40s" or "1h"."""
    for unit, size in (("h", 3600), ("m", 60)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}s"


def _default(of: type, name: str) -> str:
    """Returns the default of a dataclass field in the form of the configuration file, as Markdown code."""
    (value,) = [field.default for field in dataclasses.fields(of) if field.name == name]
    if isinstance(value, OnLoss):
        return f"`{value.value}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{seconds(value)}`" if isinstance(value, float) else f"`{value}`"


def _duration(least: float, most: float) -> str:
    return f"duration, {seconds(least)} to {seconds(most)}"


def _several(kind: str) -> str:
    return f"{kind}; or a list of up to {schema.MAX_SELECTOR_VALUES}"


def _one_of(values: tuple[str, ...]) -> str:
    return ", ".join(values)


def keys() -> tuple[Key, ...]:
    """Returns all keys, in the order in which users meet them."""
    entry = "resources.NAME.devices[]"
    return (
        Key(
            "resources",
            "mapping",
            "required",
            "the resources, by name; pods ask for `DOMAIN/NAME`. Names are made lower case. `{}` offers nothing",
        ),
        Key(
            "resources.NAME",
            "list, or mapping",
            "required",
            "a list is the same as a mapping that has it as `devices`; the mapping has more to say about the resource",
        ),
        Key(
            "resources.NAME.devices", "list", "required", "which devices the resource has, each by an entry like these"
        ),
        Key(f"{entry}.target", "mapping", "required", "the USB/IP server"),
        Key(
            f"{entry}.target.host",
            f"host name or address, up to {scalars.MAX_HOST_CHARACTERS} characters",
            "required",
            "part of the device's identity: write it the same for all nodes",
        ),
        Key(f"{entry}.target.port", "TCP port, 1 to 65535", f"`{DEFAULT_USBIP_PORT}`", "of `usbipd`"),
        Key(
            f"{entry}.selector",
            "mapping",
            "every device",
            "which devices of the server. Every key given must agree; every device that matches is offered",
        ),
        Key(f"{entry}.selector.vendor", _several("4 hexadecimal digits, in quotes"), "any", "USB vendor id"),
        Key(f"{entry}.selector.product", _several("4 hexadecimal digits, in quotes"), "any", "USB product id"),
        Key(
            f"{entry}.selector.usb_ids",
            _several("`VENDOR:PRODUCT`, 4 hexadecimal digits each"),
            "any",
            'vendor and product as they belong together: `["0951:1666", "1050:0407"]`',
        ),
        Key(
            f"{entry}.selector.bus_id",
            _several(f"text, up to {scalars.MAX_BUS_ID_GLOB} characters"),
            "any",
            'a bus id as `usbip list` shows it, or a glob: `"1-1.*"`, `"[12]-1"`',
        ),
        Key(
            f"{entry}.selector.serial",
            f"text, up to {scalars.MAX_SERIAL_CHARACTERS} characters",
            "any",
            "the exact serial number. It is read from the device once, for the whole cluster, which needs the device "
            "for a moment",
        ),
        Key(
            f"{entry}.selector.class",
            "2 hexadecimal digits, or a name",
            "any",
            "USB class of the device or one of its interfaces. Names: " + _one_of(tuple(sorted(scalars.CLASS_NAMES))),
        ),
        Key(f"{entry}.extras", "list", "none", "device nodes of the host that go along with each of the devices"),
        Key(f"{entry}.extras[].hostPath", "absolute path", "required", "on the node. `host_path` is taken too"),
        Key(f"{entry}.extras[].containerPath", "absolute path", "as `hostPath`", "in the container"),
        Key(
            f"{entry}.extras[].permissions",
            "some of r, w, m",
            _default(Extra, "permissions"),
            "read, write, make nodes",
        ),
        Key(
            "resources.NAME.children",
            f"list, of {_one_of(schema.CHILD_KINDS)}",
            "what the device has",
            "kinds of device nodes besides the USB node, `[]` for none. A node of one of them must come, or the "
            "Allocate fails, see [below](#device-nodes)",
        ),
        Key(
            "resources.NAME.childrenTimeout",
            _duration(0, schema.MAX_CHILDREN_TIMEOUT_S) + ", shorter than `allocateTimeout`",
            _default(ResourceConfig, "children_timeout"),
            "how long what `children` lists is waited for",
        ),
        Key(
            "resources.NAME.containerPath",
            f"path with fields in it ({_one_of(tuple(f'`{{{name}}}`' for name in schema.FIELDS))}), or a list of up "
            f"to {parse.MAX_TEMPLATES}",
            "the path on the host",
            "where the nodes appear, see [below](#paths)",
        ),
        Key(
            "resources.NAME.byId",
            "true or false",
            _default(ResourceConfig, "by_id"),
            "the nodes appear under the names of udev, too, such as `/dev/serial/by-id/usb-...`, see [below](#paths)",
        ),
        Key(
            "resources.NAME.permissions",
            "mapping",
            "what the runtime makes",
            "of the device nodes in the container. Needs `cdi: true`, see [below](#containers-that-do-not-run-as-root)",
        ),
        Key("resources.NAME.permissions.mode", 'octal number with a 0 in front, `"0660"`', "as on the host", ""),
        Key("resources.NAME.permissions.user", "numeric user id", "the container's", "names are each image's own"),
        Key("resources.NAME.permissions.group", "numeric group id", "the container's", "20 is dialout in Debian"),
        Key(
            "resources.NAME.readOnly",
            "true or false",
            _default(ResourceConfig, "read_only"),
            "the device nodes can be opened for reading only, whoever opens them",
        ),
        Key(
            "resources.NAME.onLoss",
            f"one of {_one_of(tuple(choice.value for choice in OnLoss))}",
            _default(ResourceConfig, "on_loss"),
            "what happens to a pod whose device comes back under other device nodes: `keep` it; `restart`, which tells "
            "it by a warning that its container has to end, see [below](#cdi); or `evict` it, so that its successor is "
            "given the device anew. `restart` needs `cdi: true`. `evict` needs a right of its own "
            "(`deploy/components/evict`, or `evict.enabled` in the chart)",
        ),
        Key(
            "resources.NAME.cdi",
            "true or false",
            _default(ResourceConfig, "cdi"),
            "hand the device out by CDI name: a container that is started again finds the device as it is then, see "
            "[below](#cdi)",
        ),
        Key("lock", "mapping", "", "of the locks"),
        Key(
            "lock.duration",
            _duration(schema.MIN_LOCK_DURATION_S, schema.MAX_LOCK_DURATION_S) + ", whole seconds",
            _default(LockConfig, "duration"),
            "how long a node may be silent before others may take its locks. Read at start only",
        ),
        Key(
            "allocateTimeout",
            _duration(schema.MIN_ALLOCATE_TIMEOUT_S, schema.MAX_ALLOCATE_TIMEOUT_S),
            _default(Config, "allocate_timeout"),
            "longest time for an Allocate, during which the node admits no other pod",
        ),
        Key(
            "publishNodeStatus",
            "true or false",
            _default(Config, "publish_node_status"),
            "tell the scheduler at once, through the node's status, that a device is taken. Read at start only",
        ),
        *(Key(flag, "text", "as the flag", f"as `--{flag}`, which wins. Read at start only") for flag in _flags()),
    )


def _flags() -> tuple[str, ...]:
    named = {key.partition(".")[0] for key in ("resources", "lock", "allocateTimeout", "publishNodeStatus")}
    return tuple(key for key in parse.TOP_KEYS if key not in named)
