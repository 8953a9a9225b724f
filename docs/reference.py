"""The reference of the configuration file: each key with its type, bounds and default from the code.

Used by docs/generate.py and by the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from usbip_plugin.config import export, parse, scalars, schema, selectors
from usbip_plugin.config.export import ExportConfig
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


def export_keys() -> tuple[Key, ...]:
    """Returns all keys of the exporter's file."""
    return (
        Key(
            "export",
            f"list of up to {export.MAX_SELECTORS} selectors",
            "required",
            "the devices of this host that are exported; selectors as `selector` [above](#which-devices)",
        ),
        Key(
            "allow",
            f"list of up to {export.MAX_NETWORKS} addresses or CIDRs",
            "everybody",
            "the clients that are served; others get an error",
        ),
        Key(
            "fence",
            "true or false",
            _default(ExportConfig, "fence"),
            "exports a device only to the holder of its lock. Read at start only",
        ),
        Key(
            "whenApiIsAway",
            f"one of {_one_of(tuple(choice.value for choice in export.WhenApiIsAway))}",
            f"`{ExportConfig(()).when_api_is_away.value}`",
            "the fence's answer to imports without API server. Read at start only",
        ),
        Key(
            "names",
            f"list of up to {export.MAX_NAMES} host names or addresses",
            "its host names and addresses",
            "how `target.host` of the plugins names this host, for the fence. Read at start only",
        ),
    )


def keys() -> tuple[Key, ...]:
    """Returns all keys, in the order in which users meet them."""
    entry = "resources.NAME.devices[]"
    return (
        Key(
            "resources", "mapping", "required", "the resources by name; pods ask for `DOMAIN/NAME`; `{}` offers nothing"
        ),
        Key("resources.NAME", "list, or mapping", "required", "a list, as in the Go program, stands for `devices`"),
        Key("resources.NAME.devices", "list", "required", "the devices of the resource"),
        Key(f"{entry}.target", "mapping", "required", "the USB/IP server"),
        Key(
            f"{entry}.target.host",
            f"host name or address, up to {scalars.MAX_HOST_CHARACTERS} characters",
            "required",
            "part of the device's identity; a name with a dot is absolute",
        ),
        Key(f"{entry}.target.port", "TCP port, 1 to 65535", f"`{DEFAULT_USBIP_PORT}`", "port of `usbipd`"),
        Key(f"{entry}.selector", "mapping", "required", "the devices of the server that satisfy every given key"),
        Key(f"{entry}.selector.vendor", _several("4 hexadecimal digits, in quotes"), "any", "USB vendor id"),
        Key(f"{entry}.selector.product", _several("4 hexadecimal digits, in quotes"), "any", "USB product id"),
        Key(
            f"{entry}.selector.usb_ids",
            _several("`VENDOR:PRODUCT`, 4 hexadecimal digits each"),
            "any",
            'pairs of vendor and product: `["0951:1666", "1050:0407"]`',
        ),
        Key(
            f"{entry}.selector.bus_id",
            _several(f"text, up to {scalars.MAX_BUS_ID_GLOB} characters"),
            "any",
            'a bus ID as `usbip list` shows it, or a glob: `"1-1.*"`, `"[12]-1"`',
        ),
        Key(
            f"{entry}.selector.serial",
            f"text, up to {scalars.MAX_SERIAL_CHARACTERS} characters",
            "any",
            "the exact serial number, see [below](#by-serial-number)",
        ),
        Key(
            f"{entry}.selector.class",
            "2 hexadecimal digits, or a name",
            "any",
            "USB class: " + _one_of(tuple(sorted(scalars.CLASS_NAMES))),
        ),
        Key(f"{entry}.selector.all", "true or false", "`false`", "true, as the only key, selects every device"),
        Key(f"{entry}.extras", "list", "none", "device nodes of the host that accompany each of the devices"),
        Key(
            f"{entry}.extras[].hostPath",
            "absolute path",
            "required",
            "path on the node, also as `host_path`; `--allow-extras` must permit it",
        ),
        Key(f"{entry}.extras[].containerPath", "absolute path", "as `hostPath`", "path in the container"),
        Key(
            f"{entry}.extras[].permissions",
            "some of r, w, m",
            _default(Extra, "permissions"),
            "read, write, make nodes",
        ),
        Key(
            "resources.NAME.children",
            f"list of {_one_of(schema.CHILD_KINDS)} or other kernel subsystems",
            "all kinds",
            "kinds of device nodes besides the USB node, see [below](#device-nodes)",
        ),
        Key(
            "resources.NAME.childrenTimeout",
            _duration(0, schema.MAX_CHILDREN_TIMEOUT_S) + ", shorter than `allocateTimeout`",
            _default(ResourceConfig, "children_timeout"),
            "longest time that an Allocate waits for the kinds in `children`",
        ),
        Key(
            "resources.NAME.containerPath",
            f"path with fields in braces, or a list of up to {parse.MAX_TEMPLATES}",
            "the path on the host",
            "paths of the nodes in the container, see [below](#paths)",
        ),
        Key(
            "resources.NAME.byId",
            "true or false",
            _default(ResourceConfig, "by_id"),
            "adds the names of udev, such as `/dev/serial/by-id/usb-...`, see [below](#paths)",
        ),
        Key(
            "resources.NAME.permissions",
            "mapping",
            "as the runtime sets them",
            "mode and owner of the nodes; needs `cdi: true`, see [non-root pods](../howto/non-root-pods.md)",
        ),
        Key("resources.NAME.permissions.mode", '`"0660"`, octal with a leading 0', "as on the host", "mode"),
        Key("resources.NAME.permissions.user", "numeric user id", "the container's", "owner"),
        Key(
            "resources.NAME.permissions.group", "numeric group id", "the container's", "group; 20 is dialout in Debian"
        ),
        Key(
            "resources.NAME.readOnly",
            "true or false",
            _default(ResourceConfig, "read_only"),
            "forbids opening the nodes for writing, to root as well",
        ),
        Key(
            "resources.NAME.allowClasses",
            "list of classes, as in `selector.class`",
            "see [below](#which-interfaces)",
            "classes of the interfaces that are allowed",
        ),
        Key(
            "resources.NAME.onLoss",
            f"one of {_one_of(tuple(choice.value for choice in OnLoss))}",
            _default(ResourceConfig, "on_loss"),
            "acts on a pod whose device nodes have changed, see [reconnects](../howto/reconnects.md)",
        ),
        Key(
            "resources.NAME.evictAfter",
            _duration(schema.MIN_EVICT_AFTER_S, schema.MAX_EVICT_AFTER_S),
            "never",
            "evicts a pod whose lost device is not back by then; needs `onLoss: evict`",
        ),
        Key(
            "resources.NAME.cdi",
            "true or false",
            _default(ResourceConfig, "cdi"),
            "hands the device out by name, so that a restarted container has its nodes, see [below](#cdi)",
        ),
        Key(
            "resources.NAME.nodeNames",
            "name of a node, glob, or list",
            "every node",
            'the nodes that offer it, such as `["lab-*"]`',
        ),
        Key("lock", "mapping", "none", "settings of the locks"),
        Key(
            "lock.duration",
            _duration(schema.MIN_LOCK_DURATION_S, schema.MAX_LOCK_DURATION_S) + ", whole seconds",
            _default(LockConfig, "duration"),
            "silence of a node after which others may take its locks. Read at start only",
        ),
        Key(
            "allocateTimeout",
            _duration(schema.MIN_ALLOCATE_TIMEOUT_S, schema.MAX_ALLOCATE_TIMEOUT_S),
            _default(Config, "allocate_timeout"),
            "longest time of an Allocate, during which the node admits no other pod. Raise it for slow devices",
        ),
        Key(
            "publishNodeStatus",
            "true or false",
            _default(Config, "publish_node_status"),
            "reports taken devices to the scheduler at once, by the node's status. Read at start only",
        ),
        *(Key(flag, "text", "as the flag", f"as `--{flag}`, which wins. Read at start only") for flag in _flags()),
    )


FIELDS: Mapping[str, str] = {
    "resource": "name of the resource",
    "index": "number of the device among the container's of this resource, from 0",
    "kind": "kind of the node, or `usb`",
    "name": "last part of the path on the host: `ttyUSB0`",
    "number": "number of the node among the device's of its kind, from 0",
    "interface": "number of its USB interface, two hexadecimal digits",
    "busid": "bus ID",
    "serial": "serial number",
    "vendor": "USB vendor id, four hexadecimal digits",
    "product": "USB product id, four hexadecimal digits",
    "manufacturer": "name that the device reports",
    "model": "name that the device reports",
}
"""The values of the fields of a containerPath."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device nodes. All fields are text for people.

    nodes: examples. driver: the kernel modules that make such nodes.
    expected: the interface class for which an Allocate without `children` waits for such a node.
    """

    nodes: str
    driver: str
    expected: str


KINDS: Mapping[str, Kind] = {
    "tty": Kind(
        "`/dev/ttyACM0`, `/dev/ttyUSB0`",
        "cdc-acm; ftdi_sio, cp210x, ch341, pl2303, option",
        "communications, abstract control (ttyACM)",
    ),
    "video4linux": Kind("`/dev/video0`", "uvcvideo", "video"),
    "block": Kind("`/dev/sda` and its partitions", "usb-storage or uas, with sd_mod", "mass storage"),
    "printer": Kind("`/dev/usb/lp0`", "usblp", "printer"),
    "hidraw": Kind("`/dev/hidraw0`", "usbhid", "human interface"),
    "input": Kind("`/dev/input/event1`", "usbhid and evdev", "human interface"),
    "sound": Kind("`/dev/snd/controlC1`, `/dev/snd/pcmC1D0p`", "snd-usb-audio", "audio"),
    "usbmisc": Kind("`/dev/cdc-wdm0`, and printers", "many", "none"),
}
"""The kinds of device nodes."""


def _flags() -> tuple[str, ...]:
    named = {key.partition(".")[0] for key in ("resources", "lock", "allocateTimeout", "publishNodeStatus")}
    return tuple(key for key in parse.TOP_KEYS if key not in named)
