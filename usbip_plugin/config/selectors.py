"""Device selectors: reading them from the file, matching them with devices, and finding overlaps."""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from usbip_plugin.config import scalars
from usbip_plugin.config.document import Node, Problems, Unknown, normal_key, read_fields
from usbip_plugin.config.schema import (
    DEFAULT_EXTRA_PERMISSIONS,
    MAX_SELECTOR_VALUES,
    DeviceSelector,
    Extra,
    ResourceConfig,
    Selector,
    several,
)
from usbip_plugin.model import (
    DEFAULT_USBIP_PORT,
    HID_CLASS,
    UNKNOWN_IDENTITY,
    Descriptor,
    DeviceKey,
    Identity,
    InterfaceClass,
    InterfaceRules,
    ServerKey,
    UsbId,
)

_GLOB_CHARACTERS = frozenset("*?[")


class Match(enum.Enum):
    """The result of matching a device with a selector.

    NO: the device does not match.
    YES: the device matches.
    NEEDS_PROBE: all known values match, but a probe must read the device's serial number or interfaces.
    """

    NO = "no"
    YES = "yes"
    NEEDS_PROBE = "needs probe"


def matches(selector: Selector, descriptor: Descriptor, identity: Identity = UNKNOWN_IDENTITY) -> Match:
    """Returns whether the selector matches this device. No selector matches a hub.

    A class matches the class of the device or of any of its interfaces. A DEVLIST entry has no interfaces for a device
    that has not been configured yet, and an IMPORT reply never has any.
    identity: what is known of the device beyond its descriptor, such as the serial number read by a probe.
    """
    serial = selector.serial
    # compare the serial number first: hundreds of devices may be compared with hundreds of selectors by serial number
    if serial is not None and identity.serial != serial and identity.serial is not None:
        return Match.NO
    if descriptor.is_hub or not _has(selector, descriptor.usb_id):
        return Match.NO
    if not _is_at(selector, descriptor.busid):
        return Match.NO
    known = serial is None or identity.serial is not None
    if selector.class_ is not None and selector.class_ != descriptor.device_class:
        interfaces = descriptor.interfaces or identity.interfaces
        if interfaces is None:
            return Match.NEEDS_PROBE
        if selector.class_ not in {interface.class_ for interface in interfaces}:
            return Match.NO
    return Match.YES if known else Match.NEEDS_PROBE


def selector_for(
    resource: ResourceConfig, key: DeviceKey, descriptor: Descriptor, identity: Identity
) -> DeviceSelector | None:
    """Returns the first selector of the resource that matches this device, or None."""
    for entry in resource.devices:
        if entry.target == key.server and matches(entry.selector, descriptor, identity) is Match.YES:
            return entry
    return None


def may_select(resource: ResourceConfig, key: DeviceKey, descriptor: Descriptor, identity: Identity) -> bool:
    """Returns whether a selector of the resource matches this device, or may match once its identity is known."""
    return any(
        entry.target == key.server and matches(entry.selector, descriptor, identity) is not Match.NO
        for entry in resource.devices
    )


def expected_serial(resource: ResourceConfig, key: DeviceKey, recorded: str | None) -> str | None:
    """Returns the serial number of the device that was allocated as key, None if any device there may be it.

    recorded: what a lock says, which may be about another device. It counts if a selector for this bus ID names it or
    names none. Otherwise the first one that a selector names is returned.
    """
    named = [
        entry.selector.serial
        for entry in resource.devices
        if entry.target == key.server and _is_at(entry.selector, key.busid)
    ]
    return recorded if not named or None in named or recorded in named else named[0]


_CLASS_OF_KIND = {"hidraw": HID_CLASS, "input": HID_CLASS}


def class_name(code: int) -> str:
    """Returns how a configuration file writes a USB class: its first name in CLASS_NAMES, else two hex digits."""
    return next((name for name, known in scalars.CLASS_NAMES.items() if known == code), f'"{code:02x}"')


def allowed_interfaces(
    resource: ResourceConfig,
    key: DeviceKey,
    descriptor: Descriptor,
    identity: Identity,
    had: tuple[InterfaceClass, ...] = (),
) -> InterfaceRules:
    """Returns which interfaces the device may have, by the classes that the resource selects, allows and asks for.

    A class is required if each selector that matches all else of the device names one.
    had: those that a pod has; the device keeps them, and gets no other, if no selector matches it any more.
    """
    classes = [
        entry.selector.class_
        for entry in resource.devices
        if entry.target == key.server
        and matches(replace(entry.selector, class_=None), descriptor, identity) is Match.YES
    ]
    if had and not classes:
        return InterfaceRules(exactly=had)
    named = {class_ for class_ in classes if class_ is not None}
    by_kind = {_CLASS_OF_KIND[kind] for kind in resource.children or () if kind in _CLASS_OF_KIND}
    selected = () if None in classes else tuple(sorted(named))
    return InterfaceRules(selected, resource.allow_classes, tuple(sorted(named | by_kind)))


def may_overlap(one: Selector, other: Selector) -> bool:
    """Returns whether one device could match both selectors. Ignores that a composite device may have two classes."""
    for mine, theirs in ((one.serial, other.serial), (one.class_, other.class_)):
        if mine is not None and theirs is not None and mine != theirs:
            return False
    ours, others = several(one.bus_id), several(other.bus_id)
    return _ids_may_overlap(one, other) and (
        not ours or not others or any(_bus_id_may_overlap(bus_id, pattern) for bus_id in ours for pattern in others)
    )


def _ids_may_overlap(one: Selector, other: Selector) -> bool:
    if _apart(several(one.vendor), several(other.vendor)) or _apart(several(one.product), several(other.product)):
        return False
    if not one.usb_ids and not other.usb_ids:
        return True
    return any(_has(one, usb_id) and _has(other, usb_id) for usb_id in one.usb_ids or other.usb_ids)


def _apart(ones: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return bool(ones) and bool(others) and set(ones).isdisjoint(others)


def _is_at(selector: Selector, busid: str) -> bool:
    patterns = several(selector.bus_id)
    return not patterns or any(fnmatch.fnmatchcase(busid, pattern) for pattern in patterns)


def _has(selector: Selector, usb_id: UsbId) -> bool:
    return (
        _agrees(selector.vendor, usb_id.vendor)
        and _agrees(selector.product, usb_id.product)
        and (not selector.usb_ids or usb_id in selector.usb_ids)
    )


def _agrees(allowed: int | tuple[int, ...] | None, value: int) -> bool:
    return allowed is None or allowed == value or (isinstance(allowed, tuple) and value in allowed)


def _bus_id_may_overlap(one: str, other: str) -> bool:
    if one == other or (_GLOB_CHARACTERS & set(one) and _GLOB_CHARACTERS & set(other)):
        return True
    return fnmatch.fnmatchcase(one, other) or fnmatch.fnmatchcase(other, one)


MAX_OVERLAP_WARNINGS = 20
"""Warnings about overlapping entries of one file; any more are left out."""

DEVICE_KEYS = ("target", "selector", "extras")
TARGET_KEYS = ("host", "port")
CONDITION_KEYS = ("vendor", "product", "usb_ids", "bus_id", "serial", "class")
SELECTOR_KEYS = (*CONDITION_KEYS, "all")
KEYS_ELSEWHERE = {
    **dict.fromkeys(("vid", "idvendor", "vendorid", "idvendorid"), "vendor"),
    **dict.fromkeys(("pid", "idproduct", "productid", "model", "modelid", "idmodelid", "device"), "product"),
    **dict.fromkeys(("id", "vidpid", "hardwareid", "deviceid"), "usb_ids"),
    **dict.fromkeys(("deviceorbusid", "devpath", "port"), "bus_id"),
    **dict.fromkeys(("serialnumber", "serialno", "idserial", "idserialshort"), "serial"),
    **dict.fromkeys(("deviceclass", "bdeviceclass", "interfaceclass", "binterfaceclass"), "class"),
}
"""Names of a selector's keys in udev, lsusb, usbipd-win, ha-usbip-client, node-feature-discovery and pyserial."""
_CONDITION_OUTSIDE = {normal_key(key): "selector" for key in CONDITION_KEYS}
NO_CONDITION = (
    f"needs a condition ({', '.join(CONDITION_KEYS)}); to select every device of this server, write {{all: true}}"
)
EXTRA_KEYS = ("hostPath", "containerPath", "permissions")

_T = TypeVar("_T", int, str, UsbId)


def read_device(node: Node, problems: Problems) -> DeviceSelector | None:
    """Reads a device entry of a resource. Returns None and adds errors to problems if it has no valid target."""
    fields = read_fields(node, problems, DEVICE_KEYS, Unknown.WARN, _CONDITION_OUTSIDE)
    if fields is None:
        return None
    if "target" not in fields:
        problems.error(node, "target is missing; write target: {host: ..., port: 3240}")
    if "selector" not in fields:
        problems.error(node, f"selector is missing; it {NO_CONDITION}")
    target = fields.read("target", problems, _target, None)
    selector = fields.read("selector", problems, read_selector, Selector())
    extras = fields.read("extras", problems, _extras, ())
    return DeviceSelector(target, selector, extras) if target is not None else None


def report_overlaps(entries: Sequence[tuple[str, DeviceSelector, Node]], problems: Problems) -> None:
    """Adds an error for each duplicate entry of a resource, and a warning for each two entries that may share a device.

    entries: resource name, entry and its node in the file.
    """
    by_server: dict[ServerKey, list[tuple[str, DeviceSelector, Node]]] = {}
    places: dict[tuple[str, ServerKey, Selector], Node] = {}
    overlaps = 0
    for resource, device, place in entries:
        first = places.setdefault((resource, device.target, device.selector), place)
        if first is not place:
            problems.error(place, f"same target and selector as {first.path} (line {first.line}); remove one")
            continue
        for other_resource, other, other_place in by_server.get(device.target, []):
            if not may_overlap(device.selector, other.selector):
                continue
            overlaps += 1
            effect = "the resource offers such a device once"
            if other_resource != resource:
                effect = "both resources offer such a device, and only one pod can use it at a time"
            if overlaps <= MAX_OVERLAP_WARNINGS:
                problems.warn(place, f"may select the same device as {other_place.path}; {effect}")
        by_server.setdefault(device.target, []).append((resource, device, place))


def _target(node: Node, problems: Problems) -> ServerKey | None:
    fields = read_fields(node, problems, TARGET_KEYS, Unknown.WARN)
    if fields is None:
        return None
    if "host" not in fields:
        problems.error(node, "host is missing; write the server's name or address")
    host = fields.read("host", problems, scalars.host, None)
    port = fields.read("port", problems, scalars.port, DEFAULT_USBIP_PORT)
    return ServerKey(host, port) if host is not None else None


def read_selector(node: Node, problems: Problems) -> Selector:
    """Reads a selector. Adds an error to problems, and returns what it could read, if it is not valid."""
    before = problems.errors
    fields = read_fields(node, problems, SELECTOR_KEYS, Unknown.FAIL_CLOSED, KEYS_ELSEWHERE)
    if fields is None:
        return Selector()
    if "bus_id" in fields and fields["bus_id"].scalar == "":
        problems.warn(fields.pop("bus_id"), "empty text matches any bus ID, as in usbip-device-plugin; remove the key")
    selector = Selector(
        vendor=_bare(fields.read("vendor", problems, _usb_numbers, ())),
        product=_bare(fields.read("product", problems, _usb_numbers, ())),
        usb_ids=fields.read("usb_ids", problems, _values, (), scalars.usb_id),
        bus_id=_bare(fields.read("bus_id", problems, _values, (), scalars.bus_id)),
        serial=fields.read("serial", problems, scalars.text, None, longest=scalars.MAX_SERIAL_CHARACTERS),
        class_=fields.read("class", problems, scalars.class_code, None),
    )
    every = fields.read("all", problems, scalars.boolean, False)
    if problems.errors != before:
        return selector
    if selector == Selector() and not every:
        problems.error(node, f"the selector {NO_CONDITION}")
    elif selector != Selector() and every:
        problems.error(fields["all"], "selects every device of this server; remove it, or the other keys")
    return selector


def _bare(values: tuple[_T, ...]) -> _T | tuple[_T, ...] | None:
    return values if len(values) > 1 else next(iter(values), None)


def _values(node: Node, problems: Problems, read: Callable[[Node, Problems], _T | None]) -> tuple[_T, ...]:
    """Reads one value, or a list of values, which it returns sorted.

    A list that is empty, too long, or contains a value twice or a 0 is an error.
    """
    if not node.is_sequence:
        value = read(node, problems)
        return () if value is None else (value,)
    found: dict[_T, Node] = {}
    items = list(node.items())
    if not items:
        problems.error(node, "an empty list matches no device; add a value, or remove the key to match any")
    elif len(items) > MAX_SELECTOR_VALUES:
        problems.error(
            node,
            f"expected at most {MAX_SELECTOR_VALUES} values, got {len(items)}; split them over two entries of devices",
        )
        return ()
    for item in items:
        value = read(item, problems)
        if value is None:
            continue
        if value in found:
            problems.error(item, f"duplicate value {item.describe()} (first on line {found[value].line}); remove one")
        elif value == 0:
            problems.error(item, "0 matches any ID and is not valid in a list; remove the 0, or the key to match any")
        found.setdefault(value, item)
    return tuple(sorted(found))


def _usb_numbers(node: Node, problems: Problems) -> tuple[int, ...]:
    values = _values(node, problems, partial(scalars.usb_number, digits=4))
    if values == (0,) and not node.is_sequence:
        problems.warn(node, "0 matches any ID, as in usbip-device-plugin; remove the key")
        return ()
    return values


def _extras(node: Node, problems: Problems) -> tuple[Extra, ...]:
    if not node.is_sequence:
        problems.error(node, f"expected a list of mappings (keys: {', '.join(EXTRA_KEYS)}), got {node.describe()}")
        return ()
    extras = []
    for item in node.items():
        fields = read_fields(item, problems, EXTRA_KEYS, Unknown.WARN)
        if fields is None:
            continue
        if "hostPath" not in fields:
            problems.error(item, "hostPath is missing; write the path of the host's device node")
        host_path = fields.read("hostPath", problems, scalars.absolute_path, None)
        container_path = fields.read("containerPath", problems, scalars.absolute_path, host_path)
        permissions = fields.read("permissions", problems, scalars.permissions, DEFAULT_EXTRA_PERMISSIONS)
        if host_path is not None and container_path is not None:
            extras.append(Extra(host_path, container_path, permissions))
    return tuple(extras)
