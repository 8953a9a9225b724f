"""The values that all parts of the plugin share: frozen dataclasses without I/O."""

from __future__ import annotations

import base64
import enum
import functools
import hashlib
import ipaddress
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

DEVICE_ID_PREFIX = "usbip-"
SESSION_PREFIX = "usbip-node-"
DEFAULT_USBIP_PORT = 3240
HUB_CLASS = 0x09
"""The class of a USB hub. USB/IP cannot carry one: vhci_hcd would take the hub's ports for its own."""
_ID_CHARACTERS = 20
"""Characters of the digest in a device ID: 100 bits in base32."""


def canonical_host(host: str) -> str:
    """Returns a host without the dot that ends an absolute DNS name: lab.lan and lab.lan. are one server.

    A name without another dot keeps it: only with it is the name absolute.
    """
    bare = host.removesuffix(".")
    return bare if "." in bare else host


@dataclass(frozen=True, order=True, slots=True)
class ServerKey:
    """A USB/IP server. host is the configured text, see canonical_host(), never resolved: the same on every node."""

    host: str
    port: int = DEFAULT_USBIP_PORT

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


_MAX_TCP_PORT = 65535
_MAX_ENDPOINT = 64  # characters of an endpoint; an IPv6 address has 45 at most
_USB_ID = re.compile("([0-9a-fA-F]{4}):([0-9a-fA-F]{4})")
_ENDPOINT = re.compile(r"(?:\[([0-9a-f.]*:[0-9a-f:.]*)\]|([0-9.]+)):([0-9]{1,5})", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, order=True, slots=True)
class Endpoint:
    """One end of a TCP connection, as the other end sees it.

    address: an IPv4 or IPv6 address as ipaddress writes it, without a scope; never an IPv4 address mapped into IPv6.
    """

    address: str
    port: int

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint | None:
        """Returns the endpoint for "ADDRESS:PORT", "[ADDRESS]:PORT" with IPv6; None for anything else."""
        found = _ENDPOINT.fullmatch(text) if len(text) <= _MAX_ENDPOINT else None
        if found is None or not 0 < int(found[3]) <= _MAX_TCP_PORT:
            return None
        try:
            return cls.of((found[1] or found[2], int(found[3])))
        except ValueError:
            return None

    @classmethod
    def of(cls, name: Sequence[Any]) -> Endpoint:
        """Returns the endpoint for what getsockname() or getpeername() of a TCP socket returns.

        Raises ValueError if it has no IP address.
        """
        address = ipaddress.ip_address(name[0].partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            return cls(str(address.ipv4_mapped), name[1])
        return cls(str(address), name[1])


# Cached, because each evaluation makes every key again, and hashing is slow.
@functools.lru_cache(maxsize=2048)
def _device_id(host: str, port: int, busid: str) -> str:
    digest = base64.b32encode(hashlib.sha256(f"{host}:{port}/{busid}".encode()).digest()).decode("ascii")
    return DEVICE_ID_PREFIX + digest[:_ID_CHARACTERS].lower()


@dataclass(frozen=True, order=True, slots=True)
class DeviceKey:
    """The key of a device, the same on every node: its server and its bus ID there.

    id: the device ID for the kubelet and the name of the lock's Lease: 26 characters, a valid DNS label.
    """

    server: ServerKey
    busid: str
    id: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _device_id(self.server.host, self.server.port, self.busid))

    def __str__(self) -> str:
        return f"{self.server}/{self.busid}"


@dataclass(frozen=True, order=True, slots=True)
class UsbId:
    """A USB ID: vendor and product, 16 bits each."""

    vendor: int
    product: int

    def __str__(self) -> str:
        return f"{self.vendor:04x}:{self.product:04x}"

    @classmethod
    def parse(cls, text: str) -> UsbId | None:
        """Returns the USB ID for "vendor:product", each with four hexadecimal digits; None for anything else."""
        found = _USB_ID.fullmatch(text)
        return cls(int(found[1], 16), int(found[2], 16)) if found is not None else None


@dataclass(frozen=True, order=True, slots=True)
class InterfaceClass:
    """bInterfaceClass, bInterfaceSubClass and bInterfaceProtocol of a USB interface."""

    class_: int
    subclass: int
    protocol: int

    def __str__(self) -> str:
        return f"{self.class_:02x}/{self.subclass:02x}/{self.protocol:02x}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what str() writes. Raises ValueError."""
        class_, subclass, protocol = bytes.fromhex(text.replace("/", ""))
        return cls(class_, subclass, protocol)


TRACE_ID = "{trace_id}"
"""What stands for the ID of a trace in --trace-link."""
HID_CLASS = 0x03
_NETWORK_SUBCLASSES = frozenset({0x06, 0x0A, 0x0C, 0x0D, 0x0E})  # of COMM_CLASS: ECM, MDLM, EEM, NCM, MBIM


def to_node(interface: InterfaceClass) -> str:
    """Returns as what the node itself would use an interface: "keyboard", "mouse" or "network interface"; else ""."""
    match interface.class_, interface.subclass, interface.protocol:
        case (0x03, 0x01, 0x01):
            return "keyboard"
        case (0x03, 0x01, 0x02):
            return "mouse"
        case (0x02, subclass, _) if subclass in _NETWORK_SUBCLASSES:
            return "network interface"
        case (0x02, 0x02, 0xFF) | (0xE0, 0x01, 0x03) | (0xEF, 0x04, _):  # RNDIS in its three forms
            return "network interface"
    return ""


def described(interface: InterfaceClass) -> str:
    """Returns an interface for people, such as "a keyboard (03/01/01)"."""
    what = f"a {kind}" if (kind := to_node(interface)) else "an interface"
    return f"{what} ({interface})"


@dataclass(frozen=True, slots=True)
class InterfaceRules:
    """Which interfaces of a device may be authorised on a node. An interface has one or more alternate settings.

    selected: class codes; the device or an interface that is allowed must have one of them. Empty for any.
    allowed: class codes of interfaces that are allowed; None for any except keyboards, mice and network interfaces.
    asked: class codes whose keyboards, mice and network interfaces are allowed nevertheless if `allowed` is None.
    exactly: if not None, interfaces that are allowed, whatever `allowed` and `asked` say.
    """

    selected: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None
    asked: tuple[int, ...] = ()
    exactly: tuple[InterfaceClass, ...] | None = None

    def allows(self, settings: Collection[InterfaceClass]) -> bool:
        """Returns whether an interface may be authorised. settings: all its alternate settings; none if unknown."""
        return bool(settings) and all(map(self._allows, settings))

    def problem(self, device_class: int, interfaces: Iterable[Collection[InterfaceClass]]) -> str | None:
        """Returns why a device must not be authorised, not even a part of it, and what to do about it, or None.

        interfaces: the alternate settings of each.
        """
        every = tuple(interfaces)
        allowed = [settings for settings in every if self.allows(settings)]
        if self.selected and self._lacks_selected(device_class, every):
            wanted = " or ".join(f"{class_:02x}" for class_ in self.selected)
            return f"has no interface of class {wanted}, as its selector names: its server listed something else"
        if (every and not allowed) or (self.selected and self._lacks_selected(device_class, allowed)):
            cure = "if the node may have it, list the classes of all its interfaces in allowClasses"
            return f"{self.objection(every)}; {cure}"
        return None

    def objection(self, interfaces: Iterable[Collection[InterfaceClass]]) -> str:
        """Returns what the first interface is that must not be authorised, as the predicate of a sentence."""
        refused = sorted(one for settings in interfaces for one in settings if not self._allows(one))
        return f"has {described(refused[0]) if refused else 'an unknown interface'} that its resource does not allow"

    def _lacks_selected(self, device_class: int, interfaces: Iterable[Collection[InterfaceClass]]) -> bool:
        classes = {one.class_ for settings in interfaces for one in settings}
        return (classes | {device_class}).isdisjoint(self.selected)

    def _allows(self, interface: InterfaceClass) -> bool:
        if self.exactly is not None:
            return interface in self.exactly
        if self.allowed is not None:
            return interface.class_ in self.allowed
        return interface.class_ in self.asked or not to_node(interface)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The description of one device in a DEVLIST entry or an IMPORT reply of a USB/IP server.

    speed: the kernel's enum usb_device_speed (1 low, 2 full, 3 high, 5 super, 6 super-plus).
    interfaces: empty in an IMPORT reply, which does not carry them.
    """

    busid: str
    path: str
    busnum: int
    devnum: int
    speed: int
    usb_id: UsbId
    bcd_device: int
    device_class: int
    device_subclass: int
    device_protocol: int
    configuration: int
    num_configurations: int
    num_interfaces: int
    interfaces: tuple[InterfaceClass, ...] = ()

    @property
    def devid(self) -> int:
        """Returns the number by which vhci_hcd attaches the device: busnum << 16 | devnum."""
        return self.busnum << 16 | self.devnum

    @property
    def is_hub(self) -> bool:
        return self.device_class == HUB_CLASS


@dataclass(frozen=True, slots=True)
class Identity:
    """The serial number ("" for none) and the interfaces that were read from a device itself; None until they are.

    devid: the Descriptor.devid of the device that was read, None if not known. Another device may have its bus ID now.
    """

    devid: int | None = None
    serial: str | None = None
    interfaces: tuple[InterfaceClass, ...] | None = None


UNKNOWN_IDENTITY = Identity()
"""The identity of a device that was not read."""


@dataclass(frozen=True, order=True, slots=True)
class DeviceNode:
    """A device node of an attached device.

    kind: "usb" for the node of the device itself, "printer", or the name of the node's kernel subsystem.
    interface: the bInterfaceNumber of the node's USB interface, None for the USB node of the device itself.
    partition: the number of a partition on its disk, 0 for any other node.
    by_id: the by-id path that udev's rules give the node, "" for none.
    """

    path: str
    kind: str
    block: bool
    major: int
    minor: int
    interface: int | None = None
    partition: int = 0
    by_id: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A device attached to a port of this node's vhci_hcd, enumerated and authorised.

    local_busid: the device's name under /sys/bus/usb/devices.
    serial, manufacturer, model: the device's own strings, printable and bounded; None where it has none.
    nodes: first the USB node, then its children by path.
    net: network interfaces of the device, which stay in the node's network namespace.
    interfaces: USB interfaces that are authorised, sorted, with all alternate settings.
    withheld: USB interfaces that are not, so that no driver and no process can use them.
    """

    key: DeviceKey
    port: int
    local_busid: str
    usb_id: UsbId
    serial: str | None
    nodes: tuple[DeviceNode, ...]
    manufacturer: str | None = None
    model: str | None = None
    net: tuple[str, ...] = ()
    interfaces: tuple[InterfaceClass, ...] = ()
    withheld: tuple[InterfaceClass, ...] = ()


@dataclass(frozen=True, order=True, slots=True)
class PodRef:
    """A pod. uid is None if the pod is known only from pod-resources, which does not carry it."""

    namespace: str
    name: str
    uid: str | None = None

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def same_pod(one: PodRef, other: PodRef) -> bool:
    """Returns whether both are one pod, by namespace and name, and by uid if both have one."""
    uids = {one.uid, other.uid}
    return (one.namespace, one.name) == (other.namespace, other.name) and (None in uids or len(uids) == 1)


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """This node: its Kubernetes name and the kernel's boot id (/proc/sys/kernel/random/boot_id)."""

    node: str
    boot_id: str


@dataclass(frozen=True, slots=True)
class Tenure:
    """A hold of a lock by this boot: the uid of the Lease, and the epoch."""

    uid: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Hold:
    """A lock under which a device was attached, for the next process."""

    key: DeviceKey
    tenure: Tenure


@dataclass(frozen=True, slots=True)
class Lock:
    """The lock of one device, as its Lease was read.

    holder: the node that holds the lock, "" when it is released.
    epoch: leaseTransitions of the Lease.
    duration: leaseDurationSeconds, an hour at most.
    acquired_at: wall clock, for people; no decision uses it.
    server, busid: as the Lease names them, for people.
    key: the device that server and busid name; None if the Lease does not have the name of that device.
    serial, interfaces, read_from: the fields of `identity`.
    in_place_of: the ID of another device, which is now plugged in at this bus ID and attached from it.
    by_hand: whether the last write was a release by a person.
    released_from: the pods that had the device when a person released the lock, oldest first.
    failed_epoch: the epoch of the last Allocate that failed because of the device; None since a later one succeeded.
    import_from: from where the holder imports the device, or the last holder did, as the server sees it.
    uid: of the Lease. Epochs are only compared of one Lease: one that is created again begins anew.
    """

    device_id: str
    holder: str
    epoch: int
    duration: float
    resource_version: str
    acquired_at: datetime | None = None
    server: str | None = None
    busid: str | None = None
    key: DeviceKey | None = None
    usb_id: UsbId | None = None
    serial: str | None = None
    boot_id: str | None = None
    port: int | None = None
    pod: PodRef | None = None
    traceparent: str | None = None
    in_place_of: str | None = None
    by_hand: bool = False
    interfaces: tuple[InterfaceClass, ...] | None = None
    read_from: int | None = None
    failed_epoch: int | None = None
    import_from: Endpoint | None = None
    released_from: tuple[PodRef, ...] = ()
    uid: str = ""

    @property
    def identity(self) -> Identity:
        return Identity(self.read_from, self.serial, self.interfaces)

    def names(self, me: NodeIdentity) -> bool:
        """Returns whether this boot of this node holds the lock (R3)."""
        return (self.holder, self.boot_id) == (me.node, me.boot_id)

    def stays_released(self, pod: PodRef | None) -> bool:
        """Returns whether a person's release forbids taking the lock again for this pod, which had the device (R6).

        Whoever takes and releases the lock after that does not change it. pod: None if it is not known; then only the
        last write counts.
        """
        return self.by_hand or (pod is not None and any(same_pod(pod, other) for other in self.released_from))


class Reason(enum.Enum):
    """Why a device is advertised as Healthy or Unhealthy. The value is for people, `code` for programs."""

    FREE = "free"
    ATTACHED = "attached here"
    IN_PROGRESS = "being allocated here"
    OTHER_RESOURCE = "in use here as another resource"
    IN_PLACE_OF = "attached here under a new bus ID"
    NOT_CONFIGURED = "removed from the configuration"
    HOLDER_EXPIRED = "holder expired; can be taken over"
    HELD_ELSEWHERE = "held by another node"
    HANDED_OVER = "just released; another node offers it first"
    LOST = "attachment lost, re-attaching"
    LOCK_LOST = "lock lost to another node"
    SERVER_UNREACHABLE = "server unreachable"
    NOT_LISTED = "not exported by its server"
    LISTED_WRONG = "server lists another device under this bus ID"
    NOT_READ = "replugged; identity not read yet"
    MOVED = "moved to another bus ID or server"
    AMBIGUOUS = "duplicate serial number"
    API_UNREACHABLE = "API server unreachable"
    NO_DRIVER = "no usable vhci_hcd on this node"
    NO_PORT = "no free vhci port on this node"
    ALLOCATES_FAILED = "recent Allocates failed"
    UNKNOWN = "not seen yet"

    @property
    def healthy(self) -> bool:
        return self in _HEALTHY

    @property
    def code(self) -> str:
        """Returns the stable name of the reason: the metrics' label `reason`, and `reason_code` in /api."""
        return self.name.lower()


# A tuple, because a set calls the slow __hash__ of the enum member.
_HEALTHY = (Reason.FREE, Reason.ATTACHED, Reason.IN_PROGRESS, Reason.HOLDER_EXPIRED)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a device is Healthy, and why. detail: text for people, such as server, holder and pod."""

    reason: Reason
    detail: str = ""

    @property
    def healthy(self) -> bool:
        return self.reason.healthy


@dataclass(frozen=True, slots=True)
class Advertised:
    """One device as one resource advertises it to the kubelet."""

    id: str
    key: DeviceKey
    health: Health


# Safe as a file name and in a sysfs write: no slash, no space, not "." or "..", shorter than the field on the wire.
_BUSID = re.compile(r"[0-9A-Za-z][0-9A-Za-z.-]{0,30}", re.ASCII)


def valid_busid(text: str) -> bool:
    """Returns whether a bus ID fits into its field on the wire and is safe as a file name."""
    return _BUSID.fullmatch(text) is not None


_KIND = re.compile(r"[a-z0-9_-]{1,32}", re.ASCII)


def valid_kind(text: str) -> bool:
    """Returns whether the text can be the kind of a device node."""
    return _KIND.fullmatch(text) is not None
