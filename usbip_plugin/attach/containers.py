"""Decides what a container gets of an attached device: device nodes, paths and environment. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from usbip_plugin.config.schema import (
    CHILD_KINDS,
    Names,
    NodePermissions,
    ResourceConfig,
    distinguishes_devices,
    names,
    render,
)
from usbip_plugin.errors import PathTaken
from usbip_plugin.model import Attachment, DeviceNode
from usbip_plugin.vhci.children import wants


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device node that a container gets. permissions: any of r, w, m."""

    host_path: str
    container_path: str
    permissions: str = "rw"


@dataclass(frozen=True, slots=True)
class ContainerResponse:
    """What an Allocate gives one container. cdi_devices: fully qualified CDI names."""

    envs: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[DeviceSpec, ...] = ()
    cdi_devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Injected:
    """The device nodes and environment variables that a container gets of one device."""

    nodes: tuple[tuple[DeviceSpec, DeviceNode], ...]
    envs: Mapping[str, str]
    owner: NodePermissions = field(default_factory=NodePermissions)


_NOT_ENV = re.compile(r"[^A-Z0-9]")
_ENV_OF_KIND = {"video4linux": "VIDEO"}


@dataclass(frozen=True, slots=True)
class Placed:
    """A device node with its paths in a container. The environment names the first path."""

    node: DeviceNode
    paths: tuple[str, ...]


def place(resource: ResourceConfig, index: int, attachment: Attachment) -> tuple[Placed, ...]:
    """Returns the USB node and the children that the resource wants, with their paths by containerPath and byId.

    A containerPath template gives paths to the nodes that names() selects for it. Names.MAIN selects the first child by
    the order of `children`, and the partitions of a disk, or the USB node of a device without children. Without
    `children`, Names.MAIN and Names.CHILDREN select among CHILD_KINDS only. A node that no template selects keeps its
    path on the host.

    index: which of a container's devices it is.
    """
    usb, children = attachment.nodes[:1], attachment.nodes[1:]
    wanted = tuple(node for node in children if wants(resource.children, node))
    order = CHILD_KINDS if resource.children is None else resource.children
    main = next((node for kind in order for node in wanted if wants((kind,), node)), usb[0])
    placed: list[Placed] = []
    linked: set[str] = set()
    numbers: Counter[str] = Counter()
    for node in (*usb, *wanted):
        fields = _fields(resource.name, index, attachment, node, numbers[node.kind])
        numbers[node.kind] += 1
        found = (_path(template, fields, node, main, order) for template in resource.container_paths)
        paths = [path for path in dict.fromkeys(found) if path is not None] or [node.path]
        if resource.by_id and node.by_id and node.by_id not in linked:  # udev, too, gives each name to one node only
            linked.add(node.by_id)
            paths += [node.by_id] if node.by_id not in paths else []
        placed.append(Placed(node, tuple(paths)))
    return tuple(placed)


def _path(
    template: str, fields: dict[str, str], node: DeviceNode, main: DeviceNode, kinds: tuple[str, ...]
) -> str | None:
    """Returns the path that the template gives the node, or None if the template does not select the node."""
    match names(template):
        case Names.EVERY:
            named = True
        case Names.CHILDREN:
            named = wants(kinds, node)
        case Names.MAIN:
            named = node == main
            if node.partition and main.block and node.path.startswith(main.path):
                disk = render(template, fields)
                return f"{disk}{'p' if disk[-1].isdecimal() else ''}{node.partition}"
    return render(template, fields) if named else None


def _fields(resource: str, index: int, attachment: Attachment, node: DeviceNode, number: int) -> dict[str, str]:
    return {
        "resource": resource,
        "index": str(index),
        "kind": node.kind,
        "name": node.path.rpartition("/")[2],
        "number": str(number),
        "interface": "" if node.interface is None else f"{node.interface:02x}",
        "busid": attachment.key.busid,
        "serial": attachment.serial or "",
        "vendor": f"{attachment.usb_id.vendor:04x}",
        "product": f"{attachment.usb_id.product:04x}",
        "manufacturer": attachment.manufacturer or "",
        "model": attachment.model or "",
    }


def environment(resource: str, index: int, attachment: Attachment, placed: Sequence[Placed]) -> dict[str, str]:
    """Returns the environment variables for one device, all of which begin with USBIP_<RESOURCE>_<index>.

    These are _DEVICE, _BUSID, _VENDOR and _PRODUCT, _SERIAL if the device has one, and its nodes by their kinds. The
    first node of a kind is _TTY, _HIDRAW and so on, the others are _TTY_1, _TTY_2. Paths are those in the container.
    """
    prefix = f"USBIP_{_NOT_ENV.sub('_', resource.upper())}_{index}_"
    env: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for one in placed[1:]:
        name = _ENV_OF_KIND.get(one.node.kind) or _NOT_ENV.sub("_", one.node.kind.upper())
        number = numbers[name]
        numbers[name] += 1
        env[prefix + name + (f"_{number}" if number else "")] = one.paths[0]
    env |= {
        prefix + "DEVICE": placed[0].paths[0],
        prefix + "BUSID": attachment.key.busid,
        prefix + "VENDOR": f"{attachment.usb_id.vendor:04x}",
        prefix + "PRODUCT": f"{attachment.usb_id.product:04x}",
    }
    if attachment.serial:
        env[prefix + "SERIAL"] = attachment.serial
    return env


def device_specs(resource: ResourceConfig, placed: Sequence[Placed]) -> tuple[tuple[DeviceSpec, DeviceNode], ...]:
    permissions = "r" if resource.read_only else "rw"
    return tuple((DeviceSpec(one.node.path, path, permissions), one.node) for one in placed for path in one.paths)


def injected(resource: ResourceConfig, number: int, attachment: Attachment) -> Injected:
    """Returns what a container gets of its device with this number, for the CDI spec."""
    placed = place(resource, number, attachment)
    envs = environment(resource.name, number, attachment, placed)
    return Injected(device_specs(resource, placed), envs, resource.permissions or NodePermissions())


def refuse_shared_paths(resource: ResourceConfig, devices: int) -> None:
    """Raises PathTaken if so many devices of the resource in one container share a path, whatever they are."""
    template = next((t for t in resource.container_paths if not distinguishes_devices(t)), None)
    if template is not None and devices > 1:
        what = f"{resource.name}: containerPath {template} is the same for {devices} devices of one container"
        raise PathTaken(f"{what}; use {{index}}, {{serial}} or {{busid}} in it to distinguish devices")


def check_paths(resource: ResourceConfig, attachments: Sequence[Attachment]) -> None:
    """Raises PathTaken if a container with these devices, in this order, would have two nodes under one path."""
    taken: dict[str, tuple[int, DeviceNode]] = {}
    for index, attachment in enumerate(attachments):
        for one in place(resource, index, attachment):
            for path in one.paths:
                owner, other = taken.setdefault(path, (index, one.node))
                if other == one.node:
                    continue
                if path == one.node.by_id:
                    cure = "omit byId, because these devices have no unique serial number"
                elif owner == index:
                    cure = "use {kind} and {number} in containerPath to distinguish nodes"
                else:
                    cure = "use {index} in containerPath to distinguish devices"
                what = f"{resource.name}: {other.path} and {one.node.path} would both have the path {path}"
                raise PathTaken(f"{what}; {cure}")
