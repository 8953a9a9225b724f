"""JSON messages between the simulated kernel and its drivers. Both ends must have the same VERSION.

Input is not trusted: a receiver passes the contents of each Message through read() before it uses them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from usbip_plugin.config.parse import MAX_KINDS
from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    DetachFailed,
    DriverMissing,
    InterfacesRefused,
    PortsExhausted,
    VhciError,
    WrongDevice,
)
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Hold, InterfaceRules, UsbId, valid_kind
from usbip_plugin.vhci.driver import PortState

VERSION = 7
"""Version of the messages. The simulated kernel refuses the calls of a driver with another version."""
MAX_TEXT = 8192
"""Limit of a received text, in characters."""
MAX_ITEMS = 8192
"""Limit of items in a received list."""
MAX_TIMEOUT_S = 3600.0
"""Limit of a received time to wait, in seconds."""
_MAX_NUMBER = 0xFFFFFFFF
_MAX_BY_FIELD = {"port": 0xFFFF, "interface": 0xFF}

Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMEOUT_S)]

_PLAIN = {error.__name__: error for error in (AttachRefused, AttachStuck, DetachFailed, InterfacesRefused)}


class Message(msgspec.Struct, omit_defaults=True):
    """Any message. A driver sends a request or a cancel; the kernel sends a result, an error or changed.

    id: number of the request, chosen by the driver; an answer has the number of its request.
    version: VERSION of the driver.
    request: a Request.
    cancel: number of the request to cancel.
    changed: a port may have changed.
    error: a Failure.
    """

    id: int | None = None
    version: int = 0
    request: Any = None
    cancel: int | None = None
    changed: bool = False
    result: Any = msgspec.UNSET
    error: Any = None


class Call(msgspec.Struct, tag_field="call", tag=str.lower):
    """Call of a method of VhciDriver. The fields are the parameters; the result is the method's unless noted."""


class Ports(Call):
    """The result is that of compact()."""


class Attach(Call):
    """The socket's fd comes with the message."""

    key: DeviceKey
    descriptor: Descriptor
    holds: tuple[Hold, ...] = ()


class Enumerate(Call):
    key: DeviceKey
    descriptor: Descriptor
    port: int
    children: tuple[str, ...]
    children_timeout: Seconds
    rules: InterfaceRules
    timeout: Seconds

    def __post_init__(self) -> None:
        if len(self.children) > MAX_KINDS or not all(map(valid_kind, self.children)):
            raise ValueError(f"children must be at most {MAX_KINDS} names of kernel subsystems")


class Inspect(Call):
    """The result is an Inspected."""

    key: DeviceKey
    port: int


class Detach(Call):
    port: int
    timeout: Seconds


class NoteHolds(Call):
    key: DeviceKey
    port: int
    holds: tuple[Hold, ...]


class Forget(Call):
    key: DeviceKey


class Check(Call):
    pass


Request = Ports | Attach | Enumerate | Inspect | Detach | NoteHolds | Forget | Check


class Inspected(msgspec.Struct):
    """Result of Inspect."""

    attachment: Attachment | None


class Failure(msgspec.Struct, omit_defaults=True):
    """Error that a call raised. The fields after text are None or 0 unless the error has them.

    name: name of the error's class.
    """

    name: str
    text: str
    hub: str | None = None
    total: int = 0
    key: DeviceKey | None = None
    expected: UsbId | None = None
    found: UsbId | None = None


def read(value: Any, kind: Any) -> Any:
    """Converts the contents of a received Message to kind, a type.

    Raises ValueError if the value does not have the form of kind, a text is too long or not printable, a list is too
    long, or a number is too large or negative.
    """
    unread: list[tuple[str, Any]] = [("", value)]
    while unread:
        name, item = unread.pop()
        match item:
            case dict():
                unread.extend(item.items())
            case list():
                if len(item) > MAX_ITEMS:
                    raise ValueError(f"expected at most {MAX_ITEMS} items, got {len(item)}")
                unread.extend(("", one) for one in item)
            case str():
                if len(item) > MAX_TEXT or not item.isprintable():
                    raise ValueError(f"expected a printable text of at most {MAX_TEXT} characters")
            case int():
                most = _MAX_BY_FIELD.get(name, _MAX_NUMBER)
                if not 0 <= item <= most:
                    raise ValueError(f"expected a number from 0 to {most}")
    return msgspec.convert(value, kind)


def compact(ports: Iterable[PortState]) -> list[dict[str, Any]]:
    """Returns the ports without their empty fields, so that thousands of free ports fit into a message."""
    every = (msgspec.to_builtins(port) for port in ports)
    return [{name: value for name, value in port.items() if value or name == "number"} for port in every]


def failure_of(error: VhciError | WrongDevice) -> Failure:
    name, text = type(error).__name__, str(error)
    match error:
        case PortsExhausted():
            return Failure(name, text, hub=error.hub, total=error.total)
        case WrongDevice():
            return Failure(name, text, key=error.key, expected=error.expected, found=error.found)
        case _:
            return Failure(name, text)


def error_of(failure: Failure) -> VhciError | WrongDevice:
    """Returns the error that failure_of() described. An unknown error becomes AttachRefused with the error's text."""
    match failure:
        case Failure(name="PortsExhausted", hub=str() as hub):
            return PortsExhausted(hub, failure.total)
        case Failure(name="WrongDevice", key=DeviceKey() as key, expected=UsbId() as expected, found=UsbId() as found):
            return WrongDevice(key, expected, found)
        case Failure(name="DriverMissing"):
            return DriverMissing("/sys/devices/platform/vhci_hcd.0")
        case _:
            return _PLAIN.get(failure.name, AttachRefused)(failure.text)
