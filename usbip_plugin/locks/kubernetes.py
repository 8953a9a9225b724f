"""LeaseStore on a real API server: Leases of coordination.k8s.io/v1 in one namespace."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from usbip_plugin.errors import KubeNotFound, KubeServerError
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks import record
from usbip_plugin.locks.record import ChangeType, Lease, LeaseChange, LeaseList

RESOURCE = "leases.coordination.k8s.io"
_MAX_INT = 2**31 - 1
_NAME = re.compile("[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
# Limits on the text kept of one Lease (characters). The API accepts 1.5 MiB, and every node keeps every lock in memory.
MAX_NAME = 253  # name and uid, as in Kubernetes
MAX_VERSION = 64  # resourceVersion
MAX_HOLDER = 512  # a longer holder is cut; longer than any node's name, so that a cut holder is never a node's name
MAX_NOTES = 5 * 512  # keys and values of all annotations together, and of all labels together; our own have 2.4 KiB
MAX_OWN_NOTE = 1024  # longest value of this project's annotations that is kept in preference to those of others
MAX_MORE_SPEC = 1024  # fields of spec that this version does not know, as JSON; longer ones are dropped by a write
_SPEC = frozenset({"holderIdentity", "leaseDurationSeconds", "acquireTime", "renewTime", "leaseTransitions"})
# This project's keys, as the one copy that all decoded Leases share. Separate copies take 1 KiB for each lock.
_KEYS = {key: key for key in record.OWN}


class KubernetesLeases:
    """The LeaseStore on a real API server.

    Every request ends within the client's request timeout (5 s); list() makes one request for each page.
    An open watch lasts until the server ends it or the connection is silent for too long, see KubeClient.watch.
    """

    def __init__(self, client: KubeClient, namespace: str) -> None:
        self._client = client
        self._base = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace = namespace

    async def get(self, name: str) -> Lease | None:
        if not _NAME.fullmatch(name):
            return None  # cannot exist; the name comes from what other nodes write, and goes into the path
        try:
            return decode(await self._client.request("get", f"{self._base}/{name}", resource=RESOURCE))
        except KubeNotFound:
            return None

    async def list(self, labels: Mapping[str, str], keep: Callable[[Lease], bool] = lambda _lease: True) -> LeaseList:
        kept: list[Lease] = []
        version = ""
        listed = self._client.pages(self._base, resource=RESOURCE, params={"labelSelector": selector(labels)})
        async with contextlib.aclosing(listed) as pages:
            async for page in pages:
                version = _version(page)
                kept += filter(keep, (decode(item) for item in page["items"] if isinstance(item, dict)))
        return LeaseList(tuple(kept), version)

    async def create(self, lease: Lease) -> Lease:
        body = encode(lease, self._namespace)
        return decode(await self._client.request("create", self._base, resource=RESOURCE, body=body))

    async def replace(self, lease: Lease) -> Lease:
        body = encode(lease, self._namespace)
        path = f"{self._base}/{lease.name}"
        return decode(await self._client.request("update", path, resource=RESOURCE, body=body))

    async def delete(self, lease: Lease) -> None:
        """Deletes the Lease if it is still of this version. Raises KubeConflict or KubeNotFound if it is not.

        Only a person does so: the plugin has no right to delete.
        """
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": lease.uid, "resourceVersion": lease.resource_version},
        }
        await self._client.request("delete", f"{self._base}/{lease.name}", resource=RESOURCE, body=body)

    async def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncGenerator[LeaseChange, None]:
        params = {"labelSelector": selector(labels), "resourceVersion": resource_version}
        async with contextlib.aclosing(self._client.watch(self._base, resource=RESOURCE, params=params)) as events:
            async for event in events:
                try:
                    kind = ChangeType(event["type"])
                except ValueError:
                    continue
                version = _version(event["object"])
                lease = None if kind is ChangeType.BOOKMARK else decode(event["object"])
                yield LeaseChange(kind, version, lease)


def selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def encode(lease: Lease, namespace: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": lease.name, "namespace": namespace}
    metadata |= {"labels": dict(lease.labels), "annotations": dict(lease.annotations)}
    if lease.resource_version:
        metadata["resourceVersion"] = lease.resource_version
    if lease.uid:
        metadata["uid"] = lease.uid
    spec: dict[str, Any] = {
        **lease.more_spec,
        "holderIdentity": lease.holder,
        "leaseTransitions": lease.transitions,
    }
    if lease.duration_seconds is not None:
        spec["leaseDurationSeconds"] = lease.duration_seconds
    if lease.acquire_time is not None:
        spec["acquireTime"] = _micro_time(lease.acquire_time)
    if lease.renew_time is not None:
        spec["renewTime"] = _micro_time(lease.renew_time)
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


def decode(value: Mapping[str, Any]) -> Lease:
    """Returns the Lease for an object from the API server. A field of a wrong type or out of range counts as absent.

    Cuts the holder at MAX_HOLDER. Leaves out foreign annotations and labels that do not fit into MAX_NOTES: the next
    write by this node removes them from the object.
    Raises KubeServerError if the object has no usable name or resourceVersion.
    """
    metadata = _mapping(value.get("metadata"))
    spec = _mapping(value.get("spec"))
    name, version = _short(metadata.get("name"), MAX_NAME), _short(metadata.get("resourceVersion"), MAX_VERSION)
    if not name or not version:
        raise KubeServerError("get", RESOURCE, "the Lease has no valid name or resourceVersion")
    holder = spec.get("holderIdentity")
    return Lease(
        name=name,
        holder=holder[:MAX_HOLDER] if isinstance(holder, str) else "",
        duration_seconds=_integer(spec.get("leaseDurationSeconds")),
        acquire_time=_time(spec.get("acquireTime")),
        renew_time=_time(spec.get("renewTime")),
        transitions=_integer(spec.get("leaseTransitions")) or 0,
        annotations=_strings(metadata.get("annotations")),
        labels=_strings(metadata.get("labels")),
        resource_version=version,
        uid=_short(metadata.get("uid"), MAX_NAME) or "",
        more_spec=_more(spec),
    )


def _version(value: Mapping[str, Any]) -> str:
    version = _short(_mapping(value.get("metadata")).get("resourceVersion"), MAX_VERSION)
    if not version:
        raise KubeServerError("list", RESOURCE, "the answer has no valid resourceVersion")
    return version


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _short(value: Any, longest: int) -> str | None:
    return value if isinstance(value, str) and len(value) <= longest else None


def _more(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the fields of spec that this version does not know, nothing if they are longer than MAX_MORE_SPEC."""
    more = {name: value for name, value in spec.items() if name not in _SPEC}
    try:
        return more if more and len(json.dumps(more)) <= MAX_MORE_SPEC else record.NO_FIELDS
    except RecursionError:
        return record.NO_FIELDS


def _strings(value: Any) -> Mapping[str, str]:
    """Returns the string entries of a mapping, up to MAX_NOTES characters; those of others cannot displace our own."""
    texts = {_KEYS.get(key, key): text for key, text in _mapping(value).items() if isinstance(text, str)}
    if sum(map(len, texts)) + sum(map(len, texts.values())) <= MAX_NOTES:
        return texts
    kept: dict[str, str] = {}
    room = MAX_NOTES
    for key, text in sorted(texts.items(), key=lambda item: item[0] not in record.OWN or len(item[1]) > MAX_OWN_NOTE):
        if len(key) + len(text) <= room:
            kept[key] = text
            room -= len(key) + len(text)
    return kept


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_INT else None


def _time(value: Any) -> datetime | None:
    """Returns an RFC 3339 time in UTC, or None for anything else. A time without an offset counts as UTC."""
    if not isinstance(value, str):
        return None
    try:
        parsed = datetime.fromisoformat(value)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):  # OverflowError: the first hours of year 1, east of Greenwich
        return None


def _micro_time(value: datetime) -> str:
    return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
