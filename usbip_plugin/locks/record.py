"""The Lease that records a lock or a session: the object, its store, and how its fields and annotations are read.

Other nodes and people write Leases, too. Each value is bounded and checked here; an invalid one counts as absent.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Protocol

from usbip_plugin.model import (
    DEVICE_ID_PREFIX,
    SESSION_PREFIX,
    DeviceKey,
    Endpoint,
    Identity,
    InterfaceClass,
    Lock,
    PodRef,
    ServerKey,
    UsbId,
    valid_busid,
)

NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Lease:
    """A coordination.k8s.io/v1 Lease. resource_version and uid are "" if it was not read from a store.

    more_spec: the fields of spec that this version does not know, which a write keeps.
    """

    name: str
    holder: str = ""
    duration_seconds: int | None = None
    acquire_time: datetime | None = None
    renew_time: datetime | None = None
    transitions: int = 0
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    resource_version: str = ""
    uid: str = ""
    more_spec: Mapping[str, Any] = field(default_factory=lambda: NO_FIELDS)


class ChangeType(enum.Enum):
    """The type of a watch event, as the Kubernetes API names it."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


@dataclass(frozen=True, slots=True)
class LeaseChange:
    """One watch event. lease: as it is after the change, or as it was deleted; None for a BOOKMARK."""

    type: ChangeType
    resource_version: str
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class LeaseList:
    """Leases at one moment, those that the caller wanted. resource_version: from which a watch can continue."""

    items: tuple[Lease, ...]
    resource_version: str


class LeaseStore(Protocol):
    """The Leases of one namespace. Every call is bounded in time and raises subclasses of KubeError.

    After KubeUnreachable from a write, the outcome is unknown: re-read and compare.
    """

    async def get(self, name: str) -> Lease | None: ...

    async def list(self, labels: Mapping[str, str], keep: Callable[[Lease], bool] = lambda _lease: True) -> LeaseList:
        """Returns the Leases that have all these labels, without those for which keep() returns False.

        Calls keep() once for each Lease, in the order of their names. The others are never all in memory at once.
        """

    async def create(self, lease: Lease) -> Lease:
        """Creates the Lease and returns it as stored. Raises KubeConflict if the name exists."""

    async def replace(self, lease: Lease) -> Lease:
        """Replaces the Lease by compare-and-swap on lease.resource_version and returns it as stored.

        Raises KubeConflict if that version is not current, KubeNotFound if the Lease is gone.
        """

    def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncGenerator[LeaseChange, None]:
        """Yields the changes after resource_version until the server ends the watch.

        Raises KubeGone if resource_version is too old: the caller must list again.
        """


DOMAIN = "usbip.dev/"
LABEL = DOMAIN + "lease"
LOCK_LABELS: Mapping[str, str] = MappingProxyType({LABEL: "lock"})
SESSION_LABELS: Mapping[str, str] = MappingProxyType({LABEL: "session"})

SERVER = DOMAIN + "server"
BUSID = DOMAIN + "busid"
USB_ID = DOMAIN + "usb-id"
SERIAL = DOMAIN + "serial"
INTERFACES = DOMAIN + "interfaces"
"""Class, subclass and protocol of each interface, in hex as udev writes them: "080650,ff0000"."""
READ_FROM = DOMAIN + "read-from"
"""Bus and device number of the device that serial number and interfaces were read from: "1:4"."""
BOOT_ID = DOMAIN + "boot-id"
PORT = DOMAIN + "vhci-port"
POD = DOMAIN + "pod"
TRACEPARENT = DOMAIN + "traceparent"
IN_PLACE_OF = DOMAIN + "in-place-of"
"""ID of the device that is attached from this bus ID instead of from its own."""
FAILED_EPOCH = DOMAIN + "failed-epoch"
"""Epoch of the last Allocate that failed because of the device or its server; removed after one that succeeded."""
IMPORT_FROM = DOMAIN + "import-from"
"""Local address and port of the holder's import, written before it connects: "10.0.0.5:40123", "[fd00::5]:40123".

Stays after a release: only its node can end a connection that its server does not know to be dead.
"""
FORMAT = DOMAIN + "format"
"""Version of these annotations, and the epoch in which it was written: "2/17". An epoch without it has version 1."""
FORMAT_VERSION = 2
"""Version that this plugin writes, raised when a key of the holder is added. Version 2 has IMPORT_FROM.

Readers ignore unknown keys. An older plugin does not clear newer ones, so that they count only in the epoch of FORMAT.
"""
WRITE_ID = DOMAIN + "write-id"
"""Random mark of the last write, by which a plugin recognises its own write; or BY_HAND."""
BY_HAND = "released-by-hand"
"""Value of WRITE_ID in a lock that a person has released, in place of a plugin's mark."""
RELEASED_FROM = DOMAIN + "released-from"
"""Pods that had the device when a person released its lock, as in POD, separated by commas, oldest first.

Only a person's release writes it; nodes keep it. They do not take the lock again for these pods (R6).
"""
MAX_RELEASED_FROM = 8
"""Number of pods that RELEASED_FROM keeps, the latest ones; fewer if they are longer than MAX_RELEASED_FROM_TEXT."""
MAX_RELEASED_FROM_TEXT = 720
"""Longest value of RELEASED_FROM (characters): two pods with the longest names."""
OWN = frozenset(
    {
        *(LABEL, SERVER, BUSID, USB_ID, SERIAL, INTERFACES, READ_FROM),
        *(BOOT_ID, PORT, POD, TRACEPARENT, IN_PLACE_OF, FAILED_EPOCH, IMPORT_FROM, FORMAT, WRITE_ID, RELEASED_FROM),
    }
)
"""The keys of all labels and annotations that this project writes."""

# Longest time for which a lock or session can delay a takeover (seconds). A longer one is a mistake or malice.
MAX_DURATION_S = 3600.0
_MAX_TEXT = 256  # characters of a holder, server, bus ID or serial number
_MAX_NAME = 253  # characters of the name of a Kubernetes object
_MAX_EPOCH = 2**31 - 1  # leaseTransitions is an int32
MAX_INTERFACES = 32  # interfaces kept of a device, as many as USB allows

_DEVICE_ID = re.compile(DEVICE_ID_PREFIX + "[a-z2-7]{20}")
MAX_TCP_PORT = 65535
_TCP_PORT = re.compile("[0-9]{1,5}")
_INTERFACES = re.compile(f"([0-9a-f]{{6}}(,[0-9a-f]{{6}}){{0,{MAX_INTERFACES - 1}}})?")
_READ_FROM = re.compile("([0-9]{1,5}):([0-9]{1,5})")
_PORT = re.compile("[0-9]{1,4}")
_EPOCH = re.compile("[0-9]{1,10}", re.ASCII)
_FORMAT = re.compile("[0-9]{1,4}/([0-9]{1,10})", re.ASCII)
_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_DNS = re.compile("[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_UID = re.compile("[A-Za-z0-9-]{1,64}")


def is_lock_name(name: str) -> bool:
    return _DEVICE_ID.fullmatch(name) is not None


def session_name(node: str) -> str:
    """Returns the name of the node's session Lease. Cuts a node name that is too long and appends a digest."""
    name = SESSION_PREFIX + node
    if len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(node.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{name[: _MAX_NAME - 17].rstrip('.-')}-{digest}"


def lock_of(lease: Lease) -> Lock:
    """Returns the lock that a Lease records. An invalid value counts as absent."""
    notes = lease.annotations
    server, busid = _text(notes.get(SERVER)), _text(notes.get(BUSID))
    return Lock(
        device_id=lease.name,
        holder=holder_text(lease.holder),
        epoch=epoch_of(lease),
        duration=float(min(max(lease.duration_seconds or 0, 0), MAX_DURATION_S)),
        resource_version=lease.resource_version,
        acquired_at=lease.acquire_time,
        server=server,
        busid=busid,
        key=_key_of(lease.name, server, busid),
        usb_id=UsbId.parse(notes.get(USB_ID, "")),
        serial="" if notes.get(SERIAL) == "" else _text(notes.get(SERIAL)),
        boot_id=_match(_UID, notes.get(BOOT_ID)),
        port=port_of(notes.get(PORT)),
        pod=pod_of(notes.get(POD)),
        traceparent=_match(_TRACEPARENT, notes.get(TRACEPARENT)),
        in_place_of=_match(_DEVICE_ID, notes.get(IN_PLACE_OF)),
        by_hand=not lease.holder and notes.get(WRITE_ID) == BY_HAND,
        interfaces=interfaces_of(notes.get(INTERFACES)),
        read_from=read_from_of(notes.get(READ_FROM)),
        failed_epoch=int(failed) if (failed := _match(_EPOCH, notes.get(FAILED_EPOCH))) is not None else None,
        import_from=import_from_of(lease),
        released_from=released_from_of(notes.get(RELEASED_FROM)),
        uid=lease.uid,
    )


def server_of(lease: Lease) -> ServerKey | None:
    """Returns the server of a lock's device, or None if its annotations are invalid or do not hash to its name."""
    key = _key_of(lease.name, _text(lease.annotations.get(SERVER)), _text(lease.annotations.get(BUSID)))
    return key.server if key is not None else None


def holder_text(holder: str) -> str:
    """Returns the holder, made printable and short. If that changes it, it begins with "!", which no node name does."""
    clean = _text(holder)
    if not holder or clean == holder:
        return holder
    return "!" + "".join(char if char.isprintable() else "?" for char in holder[: _MAX_NAME - 1])


def epoch_of(lease: Lease) -> int:
    return min(max(lease.transitions, 0), _MAX_EPOCH)


def _format_is_current(lease: Lease) -> bool:
    found = _FORMAT.fullmatch(lease.annotations.get(FORMAT, ""))
    return found is not None and int(found[1]) == epoch_of(lease)


def format_annotations(lease: Lease, epoch: int) -> dict[str, str | None]:
    """Returns the annotation changes that record FORMAT_VERSION in a write of this epoch.

    Removes the holder's keys since version 2 if they are of another epoch.
    """
    outdated = (IMPORT_FROM,) if epoch != epoch_of(lease) or not _format_is_current(lease) else ()
    return {FORMAT: f"{FORMAT_VERSION}/{epoch}", **dict.fromkeys(outdated)}


def import_from_of(lease: Lease) -> Endpoint | None:
    """Returns the endpoint in IMPORT_FROM; None if it is not valid or of an earlier epoch."""
    text = lease.annotations.get(IMPORT_FROM)
    return Endpoint.parse(text) if text is not None and _format_is_current(lease) else None


def port_of(text: str | None) -> int | None:
    found = _match(_PORT, text)
    return None if found is None else int(found)


def pod_of(text: str | None) -> PodRef | None:
    """Returns the pod for "namespace/name" or "namespace/name/uid", None for anything else."""
    parts = (text or "").split("/", 3)
    if len(parts) not in (2, 3) or not all(_DNS.fullmatch(part) for part in parts[:2]):
        return None
    if len(parts) == 3 and not _UID.fullmatch(parts[2]):
        return None
    return PodRef(parts[0], parts[1], parts[2] if len(parts) == 3 else None)


def pod_text(pod: PodRef) -> str:
    return str(pod) + (f"/{pod.uid}" if pod.uid else "")


def released_from_of(text: str | None) -> tuple[PodRef, ...]:
    """Returns the pods of RELEASED_FROM, without those that are not valid."""
    if not text or len(text) > MAX_RELEASED_FROM_TEXT:
        return ()
    pods = map(pod_of, text.split(",")[-MAX_RELEASED_FROM:])
    return tuple(pod for pod in pods if pod is not None)


def released_from_text(pods: Sequence[PodRef]) -> str | None:
    """Returns RELEASED_FROM for these pods, oldest first, or None for no pods. Leaves out the oldest if need be."""
    texts = list(dict.fromkeys(map(pod_text, pods)))[-MAX_RELEASED_FROM:]
    while len(text := ",".join(texts)) > MAX_RELEASED_FROM_TEXT:
        del texts[0]
    return text or None


def interfaces_of(text: str | None) -> tuple[InterfaceClass, ...] | None:
    found = _match(_INTERFACES, text)
    if found is None:
        return None
    return tuple(InterfaceClass(*bytes.fromhex(part)) for part in found.split(",") if part)


def interfaces_text(interfaces: tuple[InterfaceClass, ...] | None) -> str | None:
    """Returns the interfaces as the annotation has them, cut at MAX_INTERFACES; None for None."""
    if interfaces is None:
        return None
    return ",".join(f"{i.class_:02x}{i.subclass:02x}{i.protocol:02x}" for i in interfaces[:MAX_INTERFACES])


def read_from_of(text: str | None) -> int | None:
    """Returns the devid (busnum << 16 | devnum) for "BUS:DEVICE", None for anything else."""
    match = _READ_FROM.fullmatch(text or "")
    bus, device = (int(match[1]), int(match[2])) if match else (1 << 16, 0)
    return bus << 16 | device if bus < 1 << 16 and device < 1 << 16 else None


def identity_annotations(notes: Mapping[str, str], identity: Identity | None) -> dict[str, str | None]:
    """Returns the annotation changes that record what was read from a device, with None for an annotation to remove.

    Removes the identity of another device: one with another devid or serial number. Changes nothing without a devid.
    """
    if identity is None or identity.devid is None:
        return {}
    same = read_from_of(notes.get(READ_FROM)) == identity.devid and (
        identity.serial is None or notes.get(SERIAL, identity.serial) == identity.serial
    )
    read = {SERIAL: identity.serial, INTERFACES: interfaces_text(identity.interfaces)}
    changes = {name: value for name, value in read.items() if value is not None or not same}
    return {**changes, READ_FROM: f"{identity.devid >> 16}:{identity.devid & 0xFFFF}"}


def serial_annotations(notes: Mapping[str, str], serial: str | None) -> dict[str, str | None]:
    """Returns the annotation changes that make this the serial number on the lock; "" for one that is not known.

    Removes what was read from a device with another one. None changes nothing.
    """
    if serial is None or notes.get(SERIAL, "") == serial:
        return {}
    return {SERIAL: serial or None, INTERFACES: None, READ_FROM: None}


def usb_id_annotations(notes: Mapping[str, str], usb_id: str | None) -> dict[str, str | None]:
    """Returns the annotation changes that record a USB ID. Removes an identity that was read under another one."""
    if usb_id is None:
        return {}
    outdated = (SERIAL, INTERFACES, READ_FROM) if notes.get(USB_ID, usb_id) != usb_id else ()
    return {USB_ID: usb_id, **dict.fromkeys(outdated)}


def device_annotations(key: DeviceKey) -> dict[str, str]:
    """Returns the annotations that identify the device of a lock."""
    return {SERVER: str(key.server), BUSID: key.busid}


def merged_annotations(notes: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Returns the annotations with changes merged in. A change to None removes the annotation."""
    merged = {**notes, **{name: value for name, value in changes.items() if value is not None}}
    return {name: value for name, value in merged.items() if changes.get(name, value) is not None}


def _text(text: str | None) -> str | None:
    return text if text and len(text) <= _MAX_TEXT and text.isprintable() else None


def _match(pattern: re.Pattern[str], text: str | None) -> str | None:
    return text if text is not None and pattern.fullmatch(text) else None


def _key_of(device_id: str, server: str | None, busid: str | None) -> DeviceKey | None:
    """Returns the device of a lock, or None if its annotations are invalid or do not hash to the lock's name."""
    host, _, port = (server or "").rpartition(":")
    if not host or not _TCP_PORT.fullmatch(port) or not 0 < int(port) <= MAX_TCP_PORT:
        return None  # nobody could connect to such an address
    if busid is None or not valid_busid(busid):
        return None
    key = DeviceKey(ServerKey(host.removeprefix("[").removesuffix("]"), int(port)), busid)
    return key if key.id == device_id else None
