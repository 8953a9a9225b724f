"""An API client for KubernetesLeases over plain objects, so that a Lease may have any contents."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator
from typing import Any

from usbip_plugin.errors import KubeConflict, KubeNotFound

LEASES = "leases.coordination.k8s.io"


class RawApi:
    """Double of a KubeClient.

    objects: by name, as the API server returns them.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.version = 1
        self.reads = 0
        self._watches: set[asyncio.Queue[dict[str, Any]]] = set()

    def put(self, obj: Any) -> None:
        """Writes an object of another client. It gets a new resourceVersion unless its resourceVersion is None."""
        self.version += 1
        metadata = obj.get("metadata")
        known = isinstance(metadata, dict) and metadata.get("name") in self.objects
        if isinstance(metadata, dict) and metadata.get("resourceVersion", "") is not None:
            metadata["resourceVersion"] = str(self.version)
        name = metadata.get("name") if isinstance(metadata, dict) else None
        self.objects[str(name)] = obj
        for queue in self._watches:
            queue.put_nowait({"type": "MODIFIED" if known else "ADDED", "object": copy.deepcopy(obj)})

    def holder(self, name: str) -> object:
        return self.objects[name]["spec"]["holderIdentity"]

    async def request(self, verb: str, path: str, *, body: Any = None, **_options: Any) -> dict[str, Any]:
        name = body["metadata"]["name"] if body is not None else path.rpartition("/")[2]
        known = self.objects.get(name)
        if verb == "get":
            self.reads += 1
        if verb == "create" and known is not None:
            raise KubeConflict(verb, LEASES, "exists")
        if verb != "create" and known is None:
            raise KubeNotFound(verb, LEASES, "gone")
        if body is not None:
            asked = body["metadata"].get("resourceVersion")
            if known is not None and known["metadata"]["resourceVersion"] != asked:
                raise KubeConflict(verb, LEASES, "changed")
            self.put(body)
        found: dict[str, Any] = copy.deepcopy(self.objects[name])
        return found

    async def list(self, _path: str, **_options: Any) -> dict[str, Any]:
        items = [copy.deepcopy(obj) for obj in self.objects.values() if _is_lock(obj)]
        return {"metadata": {"resourceVersion": str(self.version)}, "items": items}

    async def watch(self, _path: str, **_options: Any) -> AsyncGenerator[dict[str, Any], None]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._watches.add(queue)
        try:
            while True:
                event = await queue.get()
                if _is_lock(event["object"]):
                    yield event
        finally:
            self._watches.discard(queue)


def _is_lock(obj: dict[str, Any]) -> bool:
    """Returns whether the label selector of locks matches an object. Invalid labels match."""
    metadata = obj.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    return not isinstance(labels, dict) or labels.get("usbip.dev/lease") != "session"
