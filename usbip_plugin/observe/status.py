"""What one node's status page and /api/status say, as data. Times are RFC 3339 in UTC, ages are seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device as one resource offers it here. state: of the claim on this node; reason and detail: for people.

    holder, pod, since and port are of the lock, None while nobody holds it. epoch: how many holders it has had.
    """

    resource: str
    device: str
    id: str
    healthy: bool
    reason: str
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


@dataclass(frozen=True, slots=True)
class ServerRow:
    """answered: seconds since the last good answer, None if there was none. devices: how many that answer listed."""

    server: str
    state: str
    reachable: bool
    devices: int
    answered: float | None
    failures: int
    error: str | None


@dataclass(frozen=True, slots=True)
class RegistrationRow:
    """A resource with the kubelet. registrations: how often, since this process began."""

    resource: str
    registered: bool
    registrations: int
    error: str | None


@dataclass(frozen=True, slots=True)
class LocksReport:
    """The API server as the locks see it. reachable_for: seconds since that last changed, either way.

    heartbeat: seconds since the session was last written, None if this process has written none; duration: of a lock.
    """

    read: bool
    reachable: bool
    reachable_for: float
    error: str | None
    held: int
    known: int
    heartbeat: float | None
    duration: float


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """The file. loaded: when the one in force was read; problems: why the file as it stands now is not used."""

    path: str
    loaded: str
    resources: int = 0
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """One node at one moment. not_ready, not_alive: why, a line each; empty when all is well."""

    node: str
    version: str
    now: str
    uptime: float
    not_ready: tuple[str, ...]
    not_alive: tuple[str, ...]
    devices: tuple[DeviceRow, ...]
    servers: tuple[ServerRow, ...]
    registrations: tuple[RegistrationRow, ...]
    locks: LocksReport
    config: ConfigReport

    def as_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return asdict(self)


def moment(at: datetime) -> str:
    """RFC 3339 in UTC, whole seconds; at must be UTC."""
    return at.isoformat(timespec="seconds")
