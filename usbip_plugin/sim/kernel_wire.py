"""How the simulated kernel and its drivers write model objects as JSON. Both ends are of one version."""

from __future__ import annotations

import dataclasses
from typing import Any

from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    DetachFailed,
    DriverMissing,
    PortsExhausted,
    VhciError,
    WrongDevice,
)
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, DeviceNode, InterfaceClass, ServerKey, UsbId
from usbip_plugin.vhci.driver import DriverReport, PortState
from usbip_plugin.vhci.sysfs import PortStatus

VERSION = 2

_PLAIN = {error.__name__: error for error in (AttachRefused, AttachStuck, DetachFailed)}


def key_out(key: DeviceKey) -> list[Any]:
    return [key.server.host, key.server.port, key.busid]


def key_in(value: list[Any]) -> DeviceKey:
    return DeviceKey(ServerKey(value[0], value[1]), value[2])


def descriptor_out(descriptor: Descriptor) -> dict[str, Any]:
    return dataclasses.asdict(descriptor)


def descriptor_in(value: dict[str, Any]) -> Descriptor:
    usb_id = UsbId(**value["usb_id"])
    interfaces = tuple(InterfaceClass(**one) for one in value["interfaces"])
    return Descriptor(**{**value, "usb_id": usb_id, "interfaces": interfaces})


def port_out(port: PortState) -> list[Any]:
    record = None if port.record is None else key_out(port.record)
    return [port.number, port.hub, port.status.value, port.speed, port.devid, port.local_busid, record]


def port_in(value: list[Any]) -> PortState:
    number, hub, status, speed, devid, busid, record = value
    key = None if record is None else key_in(record)
    return PortState(number, hub, PortStatus(status), speed, devid, busid, key)


def attachment_out(attachment: Attachment | None) -> dict[str, Any] | None:
    return None if attachment is None else dataclasses.asdict(attachment) | {"key": key_out(attachment.key)}


def attachment_in(value: dict[str, Any]) -> Attachment:
    nodes = tuple(DeviceNode(**node) for node in value["nodes"])
    return Attachment(**{**value, "key": key_in(value["key"]), "usb_id": UsbId(**value["usb_id"]), "nodes": nodes})


def report_out(report: DriverReport) -> dict[str, Any]:
    return dataclasses.asdict(report)


def report_in(value: dict[str, Any]) -> DriverReport:
    return DriverReport(**{**value, "problems": tuple(value["problems"])})


def error_out(error: VhciError | WrongDevice) -> dict[str, Any]:
    name = type(error).__name__
    match error:
        case PortsExhausted():
            return {"name": name, "hub": error.hub, "total": error.total}
        case WrongDevice():
            ids = [dataclasses.astuple(error.promised), dataclasses.astuple(error.found)]
            return {"name": name, "key": key_out(error.key), "ids": ids}
        case _:
            return {"name": name, "text": str(error)}


def error_in(value: dict[str, Any]) -> VhciError | WrongDevice:
    """The same error again; what this end does not know becomes AttachRefused with its text."""
    match value["name"]:
        case "PortsExhausted":
            return PortsExhausted(value["hub"], value["total"])
        case "WrongDevice":
            promised, found = (UsbId(*one) for one in value["ids"])
            return WrongDevice(key_in(value["key"]), promised, found)
        case "DriverMissing":
            return DriverMissing("/sys/devices/platform/vhci_hcd.0")
        case name:
            return _PLAIN.get(name, AttachRefused)(value["text"])
