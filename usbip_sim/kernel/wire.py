"""JSON form of the model objects that the simulated kernel and its drivers exchange. Both ends have one version.

Input is not trusted: every ..._in function raises ValueError or KeyError if a value does not have its form.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from usbip_plugin.config.schema import CHILD_KINDS
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
from usbip_plugin.vhci.sysfs import Hub, PortStatus

T = TypeVar("T")


VERSION = 4
"""Version of this form. The simulated kernel refuses the calls of a driver with another version."""
MAX_TEXT = 8192
"""Limit of a received text, in characters."""
MAX_ITEMS = 8192
"""Limit of items in a received list."""
MAX_TIMEOUT_S = 3600.0
"""Limit of a received time to wait, in seconds."""

_PLAIN = {error.__name__: error for error in (AttachRefused, AttachStuck, DetachFailed)}
_HUBS: dict[str, Hub] = {"hs": "hs", "ss": "ss"}


def key_out(key: DeviceKey) -> list[Any]:
    return [key.server.host, key.server.port, key.busid]


def key_in(value: Any) -> DeviceKey:
    host, port, busid = _items(value)
    return DeviceKey(ServerKey(_text(host), number_in(port, most=0xFFFF)), _text(busid))


def descriptor_out(descriptor: Descriptor) -> dict[str, Any]:
    return dataclasses.asdict(descriptor)


def descriptor_in(value: Any) -> Descriptor:
    given = _fields(value)
    texts = {name: _text(given.pop(name)) for name in ("busid", "path")}
    usb_id = _usb_id(given.pop("usb_id"))
    interfaces = tuple(_made(InterfaceClass, **_numbers(one)) for one in _items(given.pop("interfaces")))
    return _made(Descriptor, **texts, **_numbers(given), usb_id=usb_id, interfaces=interfaces)


def port_out(port: PortState) -> list[Any]:
    record = None if port.record is None else key_out(port.record)
    numbers = [port.number, port.hub, port.status.value, port.speed, port.devid]
    return [*numbers, port.local_busid, record, port.by_plugin]


def port_in(value: Any) -> PortState:
    number, hub, status, speed, devid, busid, record, by_plugin = _items(value)
    key = None if record is None else key_in(record)
    local_busid = None if busid is None else _text(busid)
    place, status = number_in(number), PortStatus(number_in(status))
    numbers = number_in(speed), number_in(devid)
    return PortState(place, _HUBS[_text(hub)], status, *numbers, local_busid, key, _flag(by_plugin))


def ports_in(value: Any) -> tuple[PortState, ...]:
    return tuple(port_in(port) for port in _items(value))


def attachment_out(attachment: Attachment | None) -> dict[str, Any] | None:
    return None if attachment is None else dataclasses.asdict(attachment) | {"key": key_out(attachment.key)}


def attachment_in(value: Any) -> Attachment:
    given = _fields(value)
    return Attachment(
        key_in(given["key"]),
        number_in(given["port"]),
        _text(given["local_busid"]),
        _usb_id(given["usb_id"]),
        _text_or_none(given["serial"]),
        tuple(_node(node) for node in _items(given["nodes"])),
        _text_or_none(given["manufacturer"]),
        _text_or_none(given["model"]),
        tuple(_text(name) for name in _items(given["net"])),
    )


def _node(value: Any) -> DeviceNode:
    given = _fields(value)
    interface = given["interface"]
    return DeviceNode(
        _text(given["path"]),
        _text(given["kind"]),
        _flag(given["block"]),
        number_in(given["major"]),
        number_in(given["minor"]),
        None if interface is None else number_in(interface, most=0xFF),
        number_in(given["partition"]),
        _text(given["by_id"]),
    )


def kinds_in(value: Any) -> tuple[str, ...]:
    """Reads a list of kinds of child nodes. Raises ValueError if a kind is not in CHILD_KINDS."""
    kinds = tuple(_text(kind) for kind in _items(value))
    if not set(kinds) <= set(CHILD_KINDS):
        raise ValueError("a kind of device nodes was expected")
    return kinds


def report_out(report: DriverReport) -> dict[str, Any]:
    return dataclasses.asdict(report)


def report_in(value: Any) -> DriverReport:
    given = _fields(value)
    problems = tuple(_text(problem) for problem in _items(given.pop("problems")))
    flags = {name: _flag(given.pop(name)) for name in ("loaded", "attach_writable", "records_writable", "uevents")}
    return _made(DriverReport, **flags, **_numbers(given), problems=problems)


def error_out(error: VhciError | WrongDevice) -> dict[str, Any]:
    name = type(error).__name__
    match error:
        case PortsExhausted():
            return {"name": name, "hub": error.hub, "total": error.total}
        case WrongDevice():
            ids = [dataclasses.astuple(error.expected), dataclasses.astuple(error.found)]
            return {"name": name, "key": key_out(error.key), "ids": ids}
        case _:
            return {"name": name, "text": str(error)}


def error_in(value: Any) -> VhciError | WrongDevice:
    """Reads an error written by error_out(). An unknown error becomes AttachRefused with the error's text."""
    given = _fields(value)
    match _text(given["name"]):
        case "PortsExhausted":
            return PortsExhausted(_HUBS[_text(given["hub"])], number_in(given["total"]))
        case "WrongDevice":
            promised, found = (_pair(one) for one in _items(given["ids"]))
            return WrongDevice(key_in(given["key"]), promised, found)
        case "DriverMissing":
            return DriverMissing("/sys/devices/platform/vhci_hcd.0")
        case name:
            return _PLAIN.get(name, AttachRefused)(_text(given["text"]))


def number_in(value: Any, most: int = 0xFFFFFFFF) -> int:
    """Reads a whole number from 0 to most. Raises ValueError for anything else."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError("a number was expected")
    return value


def seconds_in(value: Any) -> float:
    """Reads a time to wait, in seconds, from 0 to MAX_TIMEOUT_S. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIMEOUT_S:  # also true for NaN
        raise ValueError("a number of seconds was expected")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false was expected")  # noqa: TRY004 - one error for all that is of the wrong form
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError("a printable text was expected")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise ValueError("a list was expected")
    return value


def _fields(value: Any) -> dict[str, Any]:
    """Returns a copy of a JSON object. Raises ValueError for any other value."""
    if not isinstance(value, dict):
        raise ValueError("an object was expected")  # noqa: TRY004
    return dict(value)


def _numbers(value: Any) -> dict[str, int]:
    return {name: number_in(number) for name, number in _fields(value).items()}


def _usb_id(value: Any) -> UsbId:
    return _made(UsbId, **_numbers(value))


def _pair(value: Any) -> UsbId:
    vendor, product = _items(value)
    return UsbId(number_in(vendor), number_in(product))


def _made(kind: type[T], **given: Any) -> T:
    try:
        return kind(**given)
    except TypeError as error:  # a field is missing or unknown
        raise ValueError(str(error)) from error
