"""The LeaseStore interface: all that the lock protocol needs of an API server."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Lease:
    """A coordination.k8s.io/v1 Lease. resource_version is "" for one that was not read from a store."""

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


class ChangeType(enum.Enum):
    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


@dataclass(frozen=True, slots=True)
class LeaseChange:
    """One watch event. For a BOOKMARK only resource_version counts and lease is None."""

    type: ChangeType
    resource_version: str
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class LeaseList:
    items: tuple[Lease, ...]
    resource_version: str


class LeaseStore(Protocol):
    """Leases of one namespace. Raises the KubeError family; every call is bounded in time by the store.

    KubeUnreachable from a write says nothing about whether it happened: re-read and compare.
    """

    async def get(self, name: str) -> Lease | None: ...

    async def list(self, labels: Mapping[str, str]) -> LeaseList:
        """Leases that bear all these labels."""
        ...

    async def create(self, lease: Lease) -> Lease:
        """KubeConflict if the name exists."""
        ...

    async def replace(self, lease: Lease) -> Lease:
        """Compare-and-swap on lease.resource_version: KubeConflict if it is not current, KubeNotFound if it is gone."""
        ...

    async def delete(self, name: str, resource_version: str) -> None:
        """Compare-and-delete: KubeConflict if changed since, KubeNotFound if gone."""
        ...

    def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncIterator[LeaseChange]:
        """Changes after resource_version. Ends when the server ends it; KubeGone when it must be listed anew."""
        ...
