"""The parser from YAML text to Config, which reports all problems of a file at once."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from usbip_plugin.config import scalars, schema
from usbip_plugin.config.document import (
    Fields,
    Node,
    Parsed,
    Problems,
    Unknown,
    read_document,
    read_fields,
)
from usbip_plugin.config.problems import ConfigProblem, shown
from usbip_plugin.config.selectors import read_device, report_overlaps
from usbip_plugin.errors import ConfigError
from usbip_plugin.model import valid_kind
from usbip_plugin.observe.listen import split_addresses

MAX_TEMPLATES = 8  # path templates of one resource
MAX_KINDS = 32  # kinds of device nodes in `children` of one resource; a webcam with a microphone has 4
MAX_ID = (1 << 32) - 2  # highest user and group id; 32 bits of ones mean "no id" (-1) to the kernel
MAX_DEVICES = 1024
"""Device entries over all resources; an entry with several bus IDs counts once for each.

The time to check for overlaps grows with the square of this number.
"""

NO_RESOURCES = "add resources, or write resources: {} for none"
NOT_AN_OBJECT = "this is a Kubernetes object; the configuration is the text in its data"
PERMISSIONS_NEED_CDI = (
    "needs cdi: true in the same resource. Without CDI, device nodes keep the mode, user and group of the host; add "
    "that group to the pod's securityContext.supplementalGroups"
)
RESTART_NEEDS_CDI = (
    "restart needs cdi: true in the same resource, because without CDI a restarted container gets the device paths of "
    "its first start again"
)

EVICT_AFTER_NEEDS_EVICT = "needs onLoss: evict in the same resource, because otherwise no pod is evicted"

_FLAGS = ("domain", "plugin-directory", "pod-resources-socket", "log-level", "listen")
TOP_KEYS = ("resources", "lock", "allocateTimeout", "publishNodeStatus", *_FLAGS)
_CONTAINER_KEYS = ("children", "childrenTimeout", "containerPath", "byId", "permissions", "readOnly", "allowClasses")
RESOURCE_KEYS = ("devices", *_CONTAINER_KEYS, "onLoss", "evictAfter", "cdi", "nodeNames")
PERMISSION_KEYS = ("mode", "user", "group")
LOCK_KEYS = ("duration",)

_MODE = re.compile(r"0o?([0-7]{1,4})")
_KINDS = ", ".join(schema.CHILD_KINDS)
_MISNAMED = {
    name: name
    for name in (
        *schema.CHILD_KINDS,
        *("scsi_generic", "scsi_tape", "scsi_changer", "bsg", "dvb", "media", "lirc", "cec", "drm", "graphics", "gpio"),
        *("i2c-dev", "iio", "nvme", "nvme-generic", "ptp", "rtc", "watchdog", "wwan"),
    )
} | {"sg": "scsi_generic", "video": "video4linux", "disk": "block", "serial": "tty", "audio": "sound", "i2c": "i2c-dev"}
"""Names that people write for well-known kinds, with the right ones."""
_CLOSE = 0.6  # least similarity of two kinds (0 to 1, by difflib) at which one may be a misspelling of the other


def parse_config(
    text: str, source: str = "config.yaml", *, allow_extras: Sequence[str] | None = None, node: str | None = None
) -> Parsed[schema.Config]:
    """Returns the configuration in YAML text. Raises ConfigError with all problems found.

    source: for messages. allow_extras: patterns of fnmatch for the host paths that `extras` may name; None for any.
    node: leaves out the resources that the node of this name does not offer.
    """
    root = read_document(text, source)
    if root is None or root.empty:
        raise ConfigError(source, [ConfigProblem(source, f"empty file; {NO_RESOURCES}")])
    problems = Problems(source)
    top = read_fields(root, problems, TOP_KEYS, Unknown.WARN) or Fields()
    if root.is_mapping and "resources" not in top:
        is_object = any(key == "kind" for key, _ in root.pairs(Problems(source)))
        problems.error(root, f"resources is missing; {NOT_AN_OBJECT if is_object else NO_RESOURCES}")
    allocate_timeout = top.read(
        "allocateTimeout",
        problems,
        scalars.seconds,
        schema.DEFAULT_ALLOCATE_TIMEOUT_S,
        least=schema.MIN_ALLOCATE_TIMEOUT_S,
        most=schema.MAX_ALLOCATE_TIMEOUT_S,
    )
    config = schema.Config(
        resources=top.read("resources", problems, _resources, (), allocate_timeout, allow_extras),
        lock=top.read("lock", problems, _lock, schema.LockConfig()),
        allocate_timeout=allocate_timeout,
        publish_node_status=top.read("publishNodeStatus", problems, scalars.boolean, True),
        settings=_settings(top, problems),
    )
    problems.raise_if_any()
    return Parsed(config if node is None else config.on_node(node), problems.warnings)


def _lock(node: Node, problems: Problems) -> schema.LockConfig:
    fields = read_fields(node, problems, LOCK_KEYS, Unknown.ERROR) or Fields()
    duration = fields.read(
        "duration",
        problems,
        scalars.seconds,
        schema.DEFAULT_LOCK_DURATION_S,
        least=schema.MIN_LOCK_DURATION_S,
        most=schema.MAX_LOCK_DURATION_S,
    )
    if duration != int(duration):
        problems.error(fields["duration"], "must be whole seconds, because the Lease API has no fractions")
    return schema.LockConfig(duration)


def _settings(fields: Fields, problems: Problems) -> schema.FileSettings:
    values = {
        flag.replace("-", "_"): fields.read(flag, problems, scalars.text, None, longest=schema.MAX_PATH_CHARACTERS)
        for flag in _FLAGS
    }
    level = values["log_level"]
    if level is not None and level not in schema.LOG_LEVELS:
        levels = ", ".join(schema.LOG_LEVELS)
        problems.error(fields["log-level"], f"'{shown(level)}' is not a valid log level; expected one of {levels}")
    try:
        if values["listen"] is not None:
            split_addresses(values["listen"])
    except ValueError as error:
        problems.error(fields["listen"], str(error))
    return schema.FileSettings(**values)


def _resources(
    node: Node, problems: Problems, allocate_timeout: float, allow_extras: Sequence[str] | None
) -> tuple[schema.ResourceConfig, ...]:
    if not node.is_mapping:
        problems.error(node, f"expected a mapping from resource names to devices, got {node.describe()}")
        return ()
    resources: list[schema.ResourceConfig] = []
    places: list[tuple[str, schema.DeviceSelector, Node]] = []
    for written, value in node.pairs(problems, same=str.lower):
        name = scalars.resource_name(written, value, problems)
        entries, resource = _resource(name or written, value, allocate_timeout, problems)
        places.extend((resource.name, device, place) for device, place in entries)
        if allow_extras is not None:
            _report_forbidden(entries, allow_extras, problems)
        resources.append(resource)
    if not resources:
        problems.warn(node, "no resources; the plugin offers nothing to the kubelet")
    # count each bus ID of a list, because the overlap check compares them with one another like entries
    count = sum(max(1, len(schema.several(device.selector.bus_id))) for _, device, _ in places)
    if count > MAX_DEVICES:
        problems.error(node, f"expected at most {MAX_DEVICES} devices, got {count}")
    else:
        report_overlaps(places, problems)
    return tuple(resources)


def _report_forbidden(
    entries: Sequence[tuple[schema.DeviceSelector, Node]], allow_extras: Sequence[str], problems: Problems
) -> None:
    """Adds an error for each entry with an extra device node that no pattern of --allow-extras matches."""
    for device, place in entries:
        for extra in device.extras:
            if not any(fnmatch.fnmatchcase(extra.host_path, pattern) for pattern in allow_extras):
                problems.error(
                    place,
                    f"extras: {shown(extra.host_path)} is not allowed ({', '.join(allow_extras) or 'nothing is'}); "
                    "remove it, or have the plugin's administrator add it to --allow-extras",
                )


def _resource(
    name: str, node: Node, allocate_timeout: float, problems: Problems
) -> tuple[list[tuple[schema.DeviceSelector, Node]], schema.ResourceConfig]:
    """Returns the valid device entries of a resource with their nodes, and the resource.

    Accepts both forms: the list of the Go program, and the mapping with `devices` and further keys.
    """
    fields = Fields(devices=node)
    if node.is_mapping:
        fields = read_fields(node, problems, RESOURCE_KEYS, Unknown.ERROR) or Fields()
    if "devices" not in fields:
        problems.error(node, "devices is missing; expected a list of devices, each with target and selector")
    entries = fields.read("devices", problems, _devices, [])
    resource = schema.ResourceConfig(
        name=name,
        devices=tuple(device for device, _ in entries),
        on_loss=fields.read("onLoss", problems, scalars.choice, schema.OnLoss.KEEP, schema.OnLoss),
        evict_after=fields.read(
            "evictAfter",
            problems,
            scalars.seconds,
            None,
            least=schema.MIN_EVICT_AFTER_S,
            most=schema.MAX_EVICT_AFTER_S,
        ),
        cdi=fields.read("cdi", problems, scalars.boolean, False),
        children=fields.read("children", problems, _children, None),
        children_timeout=fields.read(
            "childrenTimeout", problems, _children_timeout, schema.DEFAULT_CHILDREN_TIMEOUT_S, allocate_timeout
        ),
        container_paths=fields.read("containerPath", problems, _container_paths, ()),
        by_id=fields.read("byId", problems, scalars.boolean, False),
        permissions=fields.read("permissions", problems, _permissions, None),
        read_only=fields.read("readOnly", problems, scalars.boolean, False),
        allow_classes=fields.read("allowClasses", problems, _classes, None),
        node_names=fields.read("nodeNames", problems, _node_names, ()),
    )
    if "childrenTimeout" in fields and "children" not in fields:
        problems.warn(
            fields["childrenTimeout"], "has no effect without children; list the kinds to wait for in children"
        )
    if resource.permissions is not None and not resource.cdi:
        problems.error(fields["permissions"], PERMISSIONS_NEED_CDI)
    if resource.on_loss is schema.OnLoss.RESTART and not resource.cdi:
        problems.error(fields["onLoss"], RESTART_NEEDS_CDI)
    if "evictAfter" in fields and resource.on_loss is not schema.OnLoss.EVICT:
        problems.error(fields["evictAfter"], EVICT_AFTER_NEEDS_EVICT)
    return entries, resource


def _devices(node: Node, problems: Problems) -> list[tuple[schema.DeviceSelector, Node]]:
    if not node.is_sequence:
        problems.error(node, f"expected a list of devices, got {node.describe()}")
        return []
    entries: list[tuple[schema.DeviceSelector, Node]] = []
    for item in node.items():
        before = problems.errors
        device = read_device(item, problems)
        # keep only entries without errors: an entry read in part could look equal to another one
        if device is not None and problems.errors == before:
            entries.append((device, item))
    if not node.yaml.value:
        problems.warn(node, "empty list; the resource has no devices")
    return entries


def _children(node: Node, problems: Problems) -> tuple[str, ...] | None:
    """Reads the kinds of device nodes, each once and in the file's order."""
    if not node.is_sequence:
        problems.error(node, f"expected a list of kinds ({_KINDS} and others), got {node.describe()}")
        return None
    kinds: dict[str, None] = {}
    for item in node.items():
        if len(kinds) >= MAX_KINDS:
            problems.error(node, f"expected at most {MAX_KINDS} kinds")
            break
        kind = item.scalar or ""
        if kind == "net":
            problems.error(item, "a network interface is not a device node, so no container can get it; remove net")
        elif kind == "usb":
            problems.error(item, "a container gets the USB node in any case; remove usb")
        elif not valid_kind(kind):
            problems.error(
                item, f"{item.describe()} is not a kernel subsystem; expected {_KINDS} or the name of another"
            )
        else:
            kinds[kind] = None
            if (meant := _meant(kind)) != kind:
                problems.warn(item, f"{kind} is not a well-known kind of device nodes; did you mean {meant}?")
    return tuple(kinds)


def _classes(node: Node, problems: Problems) -> tuple[int, ...] | None:
    """Reads a list of USB classes, and returns them sorted."""
    if not node.is_sequence or not (items := list(node.items())):
        problems.error(node, f"expected a list of USB classes, such as [hid, vendor], got {node.describe()}")
        return None
    if len(items) > schema.MAX_SELECTOR_VALUES:
        problems.error(node, f"expected at most {schema.MAX_SELECTOR_VALUES} classes")
        return None
    codes = (scalars.class_code(item, problems) for item in items)
    return tuple(sorted({code for code in codes if code is not None}))


def _node_names(node: Node, problems: Problems) -> tuple[str, ...]:
    """Reads one glob over names of nodes or a list of them, and returns the valid ones in the file's order."""
    items = tuple(node.items()) if node.is_sequence else (node,)
    if not items or len(items) > schema.MAX_SELECTOR_VALUES:
        problems.error(node, f"expected 1 to {schema.MAX_SELECTOR_VALUES} names of nodes, got {len(items)}")
        return ()
    names: dict[str, None] = {}
    for item in items:
        name = scalars.node_name(item, problems)
        if name in names:
            problems.error(item, "duplicate name; remove one")
        elif name is not None:
            names[name] = None
    return tuple(names)


def _meant(kind: str) -> str:
    """Returns the well-known kind that the author of this one probably meant, or the kind itself."""
    if kind in _MISNAMED:
        return _MISNAMED[kind]
    import difflib  # noqa: PLC0415 - a file without mistakes needs none of it

    close = difflib.get_close_matches(kind, _MISNAMED, n=1, cutoff=_CLOSE)
    return _MISNAMED[close[0]] if close else kind


def _children_timeout(node: Node, problems: Problems, allocate_timeout: float) -> float | None:
    """Reads a duration shorter than allocateTimeout (seconds), in which the device must also be attached."""
    value = scalars.seconds(node, problems, least=0.0, most=schema.MAX_CHILDREN_TIMEOUT_S)
    if value is not None and value >= allocate_timeout:
        problems.error(node, f"must be shorter than allocateTimeout ({allocate_timeout:g}s); change one of them")
    return value


def _container_paths(node: Node, problems: Problems) -> tuple[str, ...]:
    """Reads one path template or a list of them, and returns the valid ones."""
    items = tuple(node.items()) if node.is_sequence else (node,)
    if len(items) > MAX_TEMPLATES:
        problems.error(node, f"expected at most {MAX_TEMPLATES} paths, got {len(items)}")
        return ()
    templates: list[str] = []
    for item in items:
        template = item.scalar or ""
        if (problem := schema.template_problem(template)) is not None:
            problems.error(item, problem)
        elif template in templates:
            problems.error(item, "duplicate path; remove one")
        else:
            templates.append(template)
    return tuple(templates)


def _permissions(node: Node, problems: Problems) -> schema.NodePermissions | None:
    before = problems.errors
    fields = read_fields(node, problems, PERMISSION_KEYS, Unknown.ERROR)
    if fields is None:
        return None
    if not fields and problems.errors == before:
        problems.error(node, f"expected at least one of {', '.join(PERMISSION_KEYS)}, got nothing")
    return schema.NodePermissions(
        mode=fields.read("mode", problems, _mode, None),
        user=fields.read("user", problems, _id, None, "the user's numeric id"),
        group=fields.read("group", problems, _id, None, "the group's numeric id (dialout is 20 in Debian and Ubuntu)"),
    )


def _mode(node: Node, problems: Problems) -> int | None:
    match = _MODE.fullmatch(node.scalar or "")
    if match is not None and (value := int(match[1], 8)) <= 0o777:
        return value
    problems.error(
        node, f'{node.describe()} is not a valid mode; expected octal digits with a leading 0, such as "0660"'
    )
    return None


def _id(node: Node, problems: Problems, expected: str) -> int | None:
    text = node.scalar or ""
    if re.fullmatch(r"0|[1-9][0-9]{0,9}", text) and int(text) <= MAX_ID:
        return int(text)
    problems.error(node, f"{node.describe()} is not valid; expected {expected}, because names differ between images")
    return None
