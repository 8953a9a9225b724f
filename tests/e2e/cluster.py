"""The API objects of the cluster under test, and waits for conditions on them."""

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
    """A condition that did not hold in time. The text lists the objects there were."""


class ClusterView:
    """The objects of the cluster, read over one connection. Collections have the names in _PATHS."""

    def __init__(self, kube: KubeClient) -> None:
        self._kube = kube

    async def until(
        self,
        collection: str,
        check: Callable[[Mapping[str, Object]], T | None],
        what: str,
        *,
        limit: float = LIMIT_S,
        on_change: Callable[[Mapping[str, Object]], None] = lambda _objects: None,
    ) -> T:
        """Returns the first result of check that is neither None nor False. Checks the objects by name at each change.

        what: words for the error. on_change: called with each state. Raises Waited after limit seconds.
        """
        objects: dict[str, Object] = {}
        try:
            async with asyncio.timeout(limit):
                while True:
                    with contextlib.suppress(KubeGone, KubeUnreachable):
                        return await self._follow(collection, check, objects, on_change)
        except TimeoutError:
            raise Waited(f"{what}: not within {limit:g} s; there is {_short(collection, objects)}") from None

    async def follow(self, collection: str, on_change: Callable[[Mapping[str, Object]], None]) -> None:
        """Calls on_change with the objects by name, at first and at each change, until it is cancelled."""
        while True:
            with contextlib.suppress(KubeGone, KubeUnreachable):
                await self._follow(collection, lambda _objects: None, {}, on_change)

    async def _follow(
        self,
        collection: str,
        check: Callable[[Mapping[str, Object]], T | None],
        objects: dict[str, Object],
        on_change: Callable[[Mapping[str, Object]], None],
    ) -> T:
        path = _PATHS[collection]
        listed = await self._kube.list(path, resource=collection)
        objects.clear()
        objects.update({item["metadata"]["name"]: item for item in listed["items"]})
        params = {"resourceVersion": listed["metadata"]["resourceVersion"]}
        while True:
            on_change(objects)
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
                    on_change(objects)
                    result = check(objects)
                    if result is not None and result is not False:
                        return result

    async def all(self, collection: str) -> dict[str, Object]:
        listed = await self._kube.list(_PATHS[collection], resource=collection)
        return {item["metadata"]["name"]: item for item in listed["items"]}

    async def get(self, collection: str, name: str) -> Object:
        return await self._kube.request("get", f"{_PATHS[collection]}/{name}", resource=collection)

    async def create(self, collection: str, body: Object) -> None:
        """Creates an object once a former one of its name has gone."""
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
        """Requests the deletion of an object and does not wait. Ignores one that does not exist."""
        params = {} if grace is None else {"gracePeriodSeconds": str(grace), "propagationPolicy": "Background"}
        with contextlib.suppress(KubeNotFound):
            path = f"{_PATHS[collection]}/{name}"
            await self._kube.request("delete", path, resource=collection, params=params)

    async def patch(self, collection: str, name: str, body: Object) -> None:
        path = f"{_PATHS[collection]}/{name}"
        await self._kube.request("patch", path, resource=collection, body=body)

    async def pod(self, name: str, check: Callable[[Object], object], what: str, *, limit: float = LIMIT_S) -> Object:
        """Returns the pod once check holds for it."""

        def found(objects: Mapping[str, Object]) -> Object | None:
            pod = objects.get(name)
            return pod if pod is not None and check(pod) else None

        return await self.until("pods", found, f"pod {name} {what}", limit=limit)

    async def running(self, name: str, *, limit: float = LIMIT_S) -> Object:
        """Returns the pod once all its containers are ready. Raises Waited at once if it fails."""

        def runs(pod: Object) -> bool:
            if pod["status"].get("phase") == "Failed":
                raise Waited(f"pod {name} failed: {pod['status'].get('reason')}: {pod['status'].get('message')}")
            return is_ready(pod)

        return await self.pod(name, runs, "running", limit=limit)

    async def gone(self, name: str, *, limit: float = LIMIT_S) -> None:
        await self.until("pods", lambda pods: name not in pods, f"pod {name} gone", limit=limit)

    async def allocatable(self, node: str, resource: str, count: int, *, limit: float = LIMIT_S) -> Object:
        """Returns the Node once its status has this count."""
        full = f"{DOMAIN}/{resource}"

        def has_count(nodes: Mapping[str, Object]) -> Object | None:
            return nodes[node] if int(nodes[node]["status"]["allocatable"].get(full, -1)) == count else None

        return await self.until("nodes", has_count, f"{count} of {full} allocatable on {node}", limit=limit)

    async def event_reasons(self, pod: Object, wanted: AbstractSet[str], *, limit: float = LIMIT_S) -> set[str]:
        """Returns the reasons of all Events about a pod once they include the wanted ones: Events follow later."""

        def reasons(events: Mapping[str, Object]) -> set[str] | None:
            found = {one["reason"] for one in events.values() if one["regarding"].get("uid") == pod["metadata"]["uid"]}
            return found if wanted <= found else None

        what = f"Events {', '.join(sorted(wanted))} on pod {pod['metadata']['name']}"
        return await self.until("events", reasons, what, limit=limit)

    async def lock_of(self, node: str, *, limit: float = LIMIT_S) -> Object:
        """Returns a lock that the node holds."""

        def held(leases: Mapping[str, Object]) -> Object | None:
            return next(iter(locks_of(leases, node).values()), None)

        return await self.until("leases", held, f"a lock held by {node}", limit=limit)

    async def unlocked(self, *, limit: float = LIMIT_S) -> None:
        def free(leases: Mapping[str, Object]) -> bool:
            return not any(is_lock(lease) and holder(lease) for lease in leases.values())

        await self.until("leases", free, "all locks free", limit=limit)

    async def settled(self, *, limit: float = LIMIT_S) -> None:
        """Waits until every plugin and every simulated kernel is ready, in the newest generation."""

        def done(sets: Mapping[str, Object]) -> bool:
            return all(
                one["status"].get("observedGeneration") == one["metadata"]["generation"]
                and one["status"].get("numberReady") == one["status"]["desiredNumberScheduled"]
                and one["status"].get("updatedNumberScheduled") == one["status"]["desiredNumberScheduled"]
                for one in sets.values()
            )

        await self.until("daemonsets", done, "the plugin ready on every node", limit=limit)


def is_lock(lease: Object) -> bool:
    return bool(lease["metadata"].get("labels", {}).get(LOCK_LABEL) == "lock")


def holder(lease: Object) -> str:
    return lease["spec"].get("holderIdentity") or ""


def locks_of(leases: Mapping[str, Object], node: str) -> dict[str, Object]:
    """Returns the locks that the node holds, by name."""
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
