"""The data of the status page and of the JSON under /api. Times are RFC 3339 in UTC, ages are seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from usbip_plugin.sync import Steps

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA = 1
"""Version of the JSON under /api, its key `schema`. It grows when a key is removed or changes its meaning."""


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device as one resource of this node offers it.

    resource: full name, domain included.
    device: SERVER/BUSID.
    healthy: whether it is advertised to the kubelet as healthy.
    reason, detail: why, for people.
    reason_code: why, for programs: Reason.code.
    holder, pod, since: the node and the pod that hold the lock, and since when. None while nobody holds it.
    held_for: seconds since then.
    usb_id: VENDOR:PRODUCT; None if it is not known.
    serial: the serial number; None if it is not known or the device has none.
    product: manufacturer and product as the device calls itself; None until it has been attached here.
    selector: the configured selector that matches the device; "" if it is not known.
    state: the state of this node's claim.
    here: whether this node has a claim on the device.
    lost: whether a pod of this node has lost the device. pod_here: that pod, or the one that has it here.
    epoch: how many holders the lock has had; None if there is no lock.
    port: the vhci port of this node's claim, else of the lock; None while nobody holds the lock.
    withheld: the interfaces of the device attached here that its resource does not allow: CLASS/SUBCLASS/PROTOCOL.
    """

    resource: str
    device: str
    id: str
    healthy: bool
    reason: str
    reason_code: str
    detail: str
    holder: str | None
    pod: str | None
    since: str | None
    server: str
    busid: str
    usb_id: str | None
    serial: str | None
    selector: str
    state: str
    here: bool
    epoch: int | None
    port: int | None
    product: str | None = None
    held_for: float | None = None
    lost: bool = False
    pod_here: str | None = None
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LockRow:
    """A device of the cluster: one with a lock, or one that this node offers.

    device: SERVER/BUSID, else the name of its lock.
    resources: the resources, domain included, by which this node offers it.
    holder, pod, since, held_for, epoch, port: as in DeviceRow, all of them from the lock.
    healthy, reason, reason_code: as in DeviceRow; no reason if this node does not offer the device.
    """

    device: str
    id: str
    resources: tuple[str, ...]
    usb_id: str | None
    serial: str | None
    product: str | None
    holder: str | None
    pod: str | None
    since: str | None
    held_for: float | None
    epoch: int | None
    port: int | None
    healthy: bool = False
    reason: str = ""
    reason_code: str = ""


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node that runs the plugin or holds a lock.

    url: its status page; None if the pages are not served to other hosts.
    held: how many devices it holds.
    """

    node: str
    url: str | None
    held: int


@dataclass(frozen=True, slots=True)
class EventRow:
    """A Kubernetes Event that this process has recorded. about: namespace/name of the pod; None for the node."""

    at: str
    type: str
    reason: str
    note: str
    about: str | None


@dataclass(frozen=True, slots=True)
class DriverReport:
    """vhci_hcd of this node. error: why it cannot attach devices; None while it can.

    module: for programs: "loaded", "missing", or "unusable" if another error keeps it from attaching devices.
    used_hs, free_hs, used_ss, free_ss: ports of the high-speed (hs) and SuperSpeed (ss) hubs.
    """

    error: str | None = None
    used_hs: int = 0
    free_hs: int = 0
    used_ss: int = 0
    free_ss: int = 0
    module: str = "loaded"


@dataclass(frozen=True, slots=True)
class ServerRow:
    """A USB/IP server as this node sees it.

    devices: how many devices the last good answer listed. hubs: how many of them are hubs, which are never offered.
    answered: seconds since the last good answer; None if there was none.
    failures: polls that have failed in a row.
    error: why the last poll failed; None if it did not.
    flaws: in words, how it does not keep a device to one client.
    problems: the entries of the last good answer that were skipped or cut, and why.
    """

    server: str
    state: str
    reachable: bool
    devices: int
    answered: float | None
    failures: int
    error: str | None
    flaws: tuple[str, ...] = ()
    hubs: int = 0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RegistrationRow:
    """The registration of a resource with the kubelet. registrations: how often, since this process began."""

    resource: str
    registered: bool
    registrations: int
    error: str | None


@dataclass(frozen=True, slots=True)
class LocksReport:
    """The API server and the locks as this node sees them.

    read: whether the locks have been read since the start.
    reachable_for: seconds since `reachable` last changed, in either direction.
    held: locks that this node holds.
    known: all locks that are kept in memory.
    foreign, excess: locks that are not kept: of servers that the configuration does not name; beyond a limit.
    heartbeat: seconds since the session was last written; None if this process has not written it.
    duration: seconds of silence after which a lock may be taken over.
    """

    read: bool
    reachable: bool
    reachable_for: float
    error: str | None
    held: int
    known: int
    heartbeat: float | None
    duration: float
    foreign: int = 0
    excess: int = 0


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """The configuration file.

    loaded: when the configuration in force was read.
    resources: how many it has.
    warnings: about the configuration in force.
    problems: why the present file is not used; empty if it is in use.
    failed: when the file became unusable; None if it is in use.
    """

    path: str
    loaded: str
    resources: int = 0
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What every page says about the node that serves it.

    now: the moment of the report.
    uptime: seconds since the process began.
    not_ready, not_alive: the reasons, one line each; empty if all is well.
    """

    node: str
    version: str
    now: str
    uptime: float
    not_ready: tuple[str, ...]
    not_alive: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeReport(Report):
    """The status of one node at one moment. events: the newest first."""

    devices: tuple[DeviceRow, ...]
    servers: tuple[ServerRow, ...]
    registrations: tuple[RegistrationRow, ...]
    locks: LocksReport
    config: ConfigReport
    driver: DriverReport = DriverReport()
    events: tuple[EventRow, ...] = ()

    def as_json(self) -> Steps[dict[str, Any]]:
        return {
            "schema": SCHEMA,
            **asdict(replace(self, devices=())),
            "devices": (yield from rows_as_json(self.devices)),
        }


@dataclass(frozen=True, slots=True)
class ClusterReport(Report):
    """The devices of the cluster as one node knows them.

    reachable: whether the API server is; otherwise devices are as they were reachable_for seconds ago.
    """

    devices: tuple[LockRow, ...]
    nodes: tuple[NodeRow, ...]
    reachable: bool
    reachable_for: float

    def as_json(self) -> Steps[dict[str, Any]]:
        return {
            "schema": SCHEMA,
            **asdict(replace(self, devices=())),
            "devices": (yield from rows_as_json(self.devices)),
        }


def rows_as_json(rows: Iterable[DataclassInstance]) -> Steps[list[dict[str, Any]]]:
    """Returns the rows as JSON objects."""
    found = []
    for row in rows:
        found.append(asdict(row))
        yield
    return found
