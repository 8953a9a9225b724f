"""What a container gets of an attached device: paths, environment, and how they reach it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from usbip_plugin.config import DeviceSelector, ResourceConfig
from usbip_plugin.config.templates import render
from usbip_plugin.kubelet.cdi import Injected, device_name
from usbip_plugin.kubelet.device_plugin import ContainerResponse, DeviceSpec
from usbip_plugin.model import Attachment, DeviceNode

_NOT_ENV = re.compile(r"[^A-Z0-9]")
_PER_NODE_FIELDS = ("{kind}", "{name}")


def environment(resource: str, index: int, attachment: Attachment, specs: Sequence[DeviceSpec]) -> dict[str, str]:
    """USBIP_<RESOURCE>_<index>_{DEVICE,BUSID} and, where the device has them, _TTY and _SERIAL.

    Paths are those in the container, as specs (of this attachment) put them; a node the container does not get is
    left out.
    """
    prefix = f"USBIP_{_NOT_ENV.sub('_', resource.upper())}_{index}_"
    inside = {spec.host_path: spec.container_path for spec in specs}
    env = {prefix + "DEVICE": inside[attachment.nodes[0].path], prefix + "BUSID": attachment.key.busid}
    tty = next((inside[n.path] for n in attachment.nodes if n.kind == "tty" and n.path in inside), None)
    if tty is not None:
        env[prefix + "TTY"] = tty
    if attachment.serial:
        env[prefix + "SERIAL"] = attachment.serial
    return env


def node_specs(resource: ResourceConfig, index: int, attachment: Attachment) -> tuple[DeviceSpec, ...]:
    """The USB node and the children the resource wants, under the paths its containerPath gives.

    A template that tells nodes apart ({kind}, {name}) names them all; any other names the one node people mean: the
    first child, or the USB node of a device without children.
    """
    kinds = resource.children
    usb, children = attachment.nodes[:1], attachment.nodes[1:]
    wanted = usb + tuple(node for node in children if kinds is None or node.kind in kinds)
    template = resource.container_path
    if template is None:
        return tuple(DeviceSpec(node.path, node.path) for node in wanted)
    names_all = any(text in template for text in _PER_NODE_FIELDS)
    main = wanted[1] if len(wanted) > 1 else wanted[0]
    return tuple(
        DeviceSpec(
            node.path,
            render(template, _fields(resource.name, index, attachment, node))
            if names_all or node is main
            else node.path,
        )
        for node in wanted
    )


def _fields(resource: str, index: int, attachment: Attachment, node: DeviceNode) -> dict[str, str]:
    return {
        "resource": resource,
        "index": str(index),
        "kind": node.kind,
        "name": node.path.rpartition("/")[2],
        "busid": attachment.key.busid,
        "serial": attachment.serial or "",
    }


def injected(resource: ResourceConfig, number: int, attachment: Attachment) -> Injected:
    """For the CDI spec: what a container gets of its device of this number."""
    specs = node_specs(resource, number, attachment)
    by_path = {node.path: node for node in attachment.nodes}
    return Injected(
        tuple((spec, by_path[spec.host_path]) for spec in specs), environment(resource.name, number, attachment, specs)
    )


def container_response(
    resource: ResourceConfig, domain: str, devices: Sequence[tuple[DeviceSelector, Attachment]]
) -> ContainerResponse:
    """What one container gets for its devices, in the order asked; extras of several devices only once.

    With CDI only the extras, and the names under which the spec has the rest: nothing in the answer, which the kubelet
    keeps and uses again, depends on device nodes then.
    """
    envs: dict[str, str] = {}
    specs: dict[str, DeviceSpec] = {}
    names: list[str] = []
    for index, (selector, attachment) in enumerate(devices):
        nodes: tuple[DeviceSpec, ...] = ()
        if resource.cdi:
            names.append(device_name(domain, resource.name, attachment.key.id, index))
        else:
            nodes = node_specs(resource, index, attachment)
            envs.update(environment(resource.name, index, attachment, nodes))
        extras = (DeviceSpec(e.host_path, e.container_path, e.permissions) for e in selector.extras)
        for spec in chain(nodes, extras):
            specs.setdefault(spec.container_path, spec)
    return ContainerResponse(envs=envs, devices=tuple(specs.values()), cdi_devices=tuple(names))
