"""The cluster under test, as tests see it: what is in it, and waiting until something is so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias, TypeVar

from usbip_plugin.errors import KubeConflict, KubeGone, KubeNotFound, KubeUnreachable
from usbip_plugin.kube.client import KubeClient

NAMESPACE = "usbip-e2e"
PLUGIN_NAMESPACE = "usbip-system"
DOMAIN = "usbip.dev"
LIMIT_S = 60.0
LOCK_LABEL = "usbip.dev/lease"

T = TypeVar("T")
Object: TypeAlias = dict[str, Any]

_PATHS = {
    "pods": f"/api/v1/namespaces/{NAMESPACE}/pods",
    "nodes": "/api/v1/nodes",
    "leases": f"/apis/coordination.k8s.io/v1/namespaces/{PLUGIN_NAMESPACE}/leases",
    "deployments": f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments",
    "jobs": f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs",
    "events": f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events",
    "daemonsets": f"/apis/apps/v1/namespaces/{PLUGIN_NAMESPACE}/daemonsets",
    "plugins": f"/api/v1/namespaces/{PLUGIN_NAMESPACE}/pods",
}


class Waited(AssertionError):
    """It was not so in time; the text says what was."""


class ClusterView:
    """One connection to the API server. Collections by the names of _PATHS."""

    def __init__(self, kube: KubeClient) -> None:
        self._kube = kube

    async def until(
        self,
        collection: str,
        check: Callable[[Mapping[str, Object]], T | None],
        what: str,
        *,
        limit: float = LIMIT_S,
        seen: Callable[[Mapping[str, Object]], None] = lambda _objects: None,
    ) -> T:
        """The first result of check that is neither None nor False, over the objects by name, at each change of one.

        seen is called with each state there was. Waited after limit seconds.
        """
        objects: dict[str, Object] = {}
        try:
            async with asyncio.timeout(limit):
                while True:
                    with contextlib.suppress(KubeGone, KubeUnreachable):
                        return await self._follow(collection, check, objects, seen)
        except TimeoutError:
            raise Waited(f"{what}: not within {limit:g} s; there is {_short(collection, objects)}") from None

    async def follow(self, collection: str, seen: Callable[[Mapping[str, Object]], None]) -> None:
        """Calls seen with the objects by name, at first and at each change of one, until it is cancelled."""
        while True:
            with contextlib.suppress(KubeGone, KubeUnreachable):
                await self._follow(collection, lambda _objects: None, {}, seen)

    async def _follow(
        self,
        collection: str,
        check: Callable[[Mapping[str, Object]], T | None],
        objects: dict[str, Object],
        seen: Callable[[Mapping[str, Object]], None],
    ) -> T:
        path = _PATHS[collection]
        listed = await self._kube.list(path, resource=collection)
        objects.clear()
        objects.update({item["metadata"]["name"]: item for item in listed["items"]})
        params = {"resourceVersion": listed["metadata"]["resourceVersion"]}
        while True:
            seen(objects)
            result = check(objects)
            if result is not None and result is not False:
                return result
            async with contextlib.aclosing(self._kube.watch(path, resource=collection, params=params)) as events:
                async for event in events:
                    params = {"resourceVersion": event["object"]["metadata"]["resourceVersion"]}
                    name = event["object"]["metadata"].get("name")
                    if event["type"] == "BOOKMARK":
                        continue
                    if event["type"] == "DELETED":
                        objects.pop(name, None)
                    else:
                        objects[name] = event["object"]
                    seen(objects)
                    result = check(objects)
                    if result is not None and result is not False:
                        return result

    async def all(self, collection: str) -> dict[str, Object]:
        listed = await self._kube.list(_PATHS[collection], resource=collection)
        return {item["metadata"]["name"]: item for item in listed["items"]}

    async def get(self, collection: str, name: str) -> Object:
        """KubeNotFound."""
        return await self._kube.request("get", f"{_PATHS[collection]}/{name}", resource=collection)

    async def create(self, collection: str, body: Object) -> None:
        """Tried again while one of that name is still going."""
        name = body["metadata"]["name"]

        def gone(objects: Mapping[str, Object]) -> bool:
            return name not in objects

        async with asyncio.timeout(LIMIT_S):
            while True:
                with contextlib.suppress(KubeConflict):
                    await self._kube.request("create", _PATHS[collection], resource=collection, body=body)
                    return
                await self.until(collection, gone, f"{name} gone")

    async def delete(self, collection: str, name: str, *, grace: int | None = None) -> None:
        """Asks for it; does not wait. One that is not there is no error."""
        params = {} if grace is None else {"gracePeriodSeconds": str(grace), "propagationPolicy": "Background"}
        with contextlib.suppress(KubeNotFound):
            path = f"{_PATHS[collection]}/{name}"
            await self._kube.request("delete", path, resource=collection, params=params)

    async def patch(self, collection: str, name: str, body: Object) -> None:
        path = f"{_PATHS[collection]}/{name}"
        await self._kube.request("patch", path, resource=collection, body=body)

    # What tests wait for.

    async def pod(self, name: str, check: Callable[[Object], object], what: str, *, limit: float = LIMIT_S) -> Object:
        """The pod as soon as check holds for it."""

        def found(objects: Mapping[str, Object]) -> Object | None:
            pod = objects.get(name)
            return pod if pod is not None and check(pod) else None

        return await self.until("pods", found, f"pod {name} {what}", limit=limit)

    async def running(self, name: str, *, limit: float = LIMIT_S) -> Object:
        """A pod that runs with all its containers ready. One that fails is waited for no longer."""

        def runs(pod: Object) -> bool:
            if pod["status"].get("phase") == "Failed":
                raise Waited(f"pod {name} failed: {pod['status'].get('reason')}: {pod['status'].get('message')}")
            return is_ready(pod)

        return await self.pod(name, runs, "running", limit=limit)

    async def gone(self, name: str, *, limit: float = LIMIT_S) -> None:
        await self.until("pods", lambda pods: name not in pods, f"pod {name} gone", limit=limit)

    async def allocatable(self, node: str, resource: str, count: int, *, limit: float = LIMIT_S) -> Object:
        """The Node as soon as its status says so."""
        full = f"{DOMAIN}/{resource}"

        def says(nodes: Mapping[str, Object]) -> Object | None:
            return nodes[node] if int(nodes[node]["status"]["allocatable"].get(full, -1)) == count else None

        return await self.until("nodes", says, f"{count} of {full} allocatable on {node}", limit=limit)

    async def told(self, pod: Object, wanted: AbstractSet[str], *, limit: float = LIMIT_S) -> set[str]:
        """The reasons of all Events on this very pod, as soon as the wanted ones are among them.

        A plugin does first and tells then, in the background.
        """

        def reasons(events: Mapping[str, Object]) -> set[str] | None:
            found = {one["reason"] for one in events.values() if one["regarding"].get("uid") == pod["metadata"]["uid"]}
            return found if wanted <= found else None

        what = f"Events {', '.join(sorted(wanted))} on pod {pod['metadata']['name']}"
        return await self.until("events", reasons, what, limit=limit)

    async def lock_of(self, node: str, *, limit: float = LIMIT_S) -> Object:
        """A lock Lease that names the node."""

        def held(leases: Mapping[str, Object]) -> Object | None:
            return next(iter(locks_of(leases, node).values()), None)

        return await self.until("leases", held, f"a lock held by {node}", limit=limit)

    async def unlocked(self, *, limit: float = LIMIT_S) -> None:
        def free(leases: Mapping[str, Object]) -> bool:
            return not any(is_lock(lease) and holder(lease) for lease in leases.values())

        await self.until("leases", free, "all locks free", limit=limit)

    async def settled(self, generation: int | None = None, *, limit: float = LIMIT_S) -> None:
        """Every plugin and every simulated kernel is ready, of the newest generation."""

        def done(sets: Mapping[str, Object]) -> bool:
            return all(
                one["status"].get("observedGeneration") == one["metadata"]["generation"]
                and (generation is None or one["metadata"]["generation"] >= generation or name != "usbip-plugin")
                and one["status"].get("numberReady") == one["status"]["desiredNumberScheduled"]
                and one["status"].get("updatedNumberScheduled") == one["status"]["desiredNumberScheduled"]
                for name, one in sets.items()
            )

        await self.until("daemonsets", done, "the plugin ready on every node", limit=limit)


def is_lock(lease: Object) -> bool:
    return bool(lease["metadata"].get("labels", {}).get(LOCK_LABEL) == "lock")


def holder(lease: Object) -> str:
    return lease["spec"].get("holderIdentity") or ""


def locks_of(leases: Mapping[str, Object], node: str) -> dict[str, Object]:
    """The locks that name the node, by name."""
    return {name: lease for name, lease in leases.items() if is_lock(lease) and holder(lease) == node}


def is_ready(pod: Object) -> bool:
    statuses = pod["status"].get("containerStatuses") or []
    ready = bool(statuses) and all(status["ready"] for status in statuses)
    return pod["status"].get("phase") == "Running" and ready and "deletionTimestamp" not in pod["metadata"]


def failed(pod: Object) -> bool:
    return bool(pod["status"].get("phase") == "Failed")


def _short(collection: str, objects: Mapping[str, Object]) -> str:
    if collection == "pods":
        parts = [
            f"{name} {pod['status'].get('phase')} {pod['status'].get('reason', '')} on {pod['spec'].get('nodeName')} "
            f"{(pod['status'].get('conditions') or [{}])[0].get('message', '')}"
            for name, pod in objects.items()
        ]
    elif collection == "leases":
        parts = [f"{name} held by {holder(lease)!r}" for name, lease in objects.items()]
    elif collection == "events":
        parts = [f"{one['regarding'].get('name')} {one['reason']}: {one.get('note')}" for one in objects.values()]
    elif collection == "nodes":
        parts = [f"{name} {node['status'].get('allocatable')}" for name, node in objects.items()]
    else:
        parts = [f"{name} {one.get('status')}" for name, one in objects.items()]
    return "; ".join(parts) or "nothing"
