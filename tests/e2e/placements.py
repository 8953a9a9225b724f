"""Bindings and ends of pods compared with the counts of their nodes, in the order of the API server's writes.

This compares resource versions as numbers, across pods and nodes. Clients must not: to them a version is opaque. Here
it is sound. Every object is in one etcd, and a version is the revision of the write. Of two writes the one with the
higher number came later, however late a slow machine sees them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from tests.e2e.cluster import DOMAIN, LIMIT_S, ClusterView, Object, Waited, failed

ENDED = {"Succeeded", "Failed"}
DENIED = "is held by"
"""Part of the message of a pod whose Allocate failed because another node has the device."""


@dataclass
class Placement:
    """One pod that requests the resource. bound, ended: the resource versions of the writes of binding and end."""

    name: str
    wants: int
    node: str = ""
    bound: int | None = None
    watched: bool = True
    """Whether the watch saw the binding. Otherwise the binding is older than `bound`."""
    ended: int | None = None
    failure: str | None = None
    """The message of a pod that failed."""


class Placements:
    """The writes that concern a resource: of its pods, and of the counts of nodes."""

    def __init__(self, resource: str) -> None:
        self._resource = f"{DOMAIN}/{resource}"
        self._pods: dict[str, Placement] = {}
        self._versions: dict[str, int] = {}
        """The newest version seen of each pod, by uid, and of each node, by name."""
        self._offers: dict[str, list[tuple[int, int]]] = {}
        """(resource version, count) of each node, in the order of the versions."""
        self._changed = asyncio.Event()

    def see_pods(self, pods: Mapping[str, Object]) -> None:
        now = {one["metadata"]["uid"]: one for one in pods.values()}
        for uid, one in now.items():
            version = int(one["metadata"]["resourceVersion"])
            if self._versions.get(uid) != version:
                self._versions[uid] = version
                self._see_pod(uid, one, version)
        for uid in self._pods.keys() - now.keys():
            # deleted without an end: count its last version as the end
            self._pods[uid].ended = self._pods[uid].ended or self._versions[uid]
        self._changed.set()

    def _see_pod(self, uid: str, one: Object, version: int) -> None:
        if uid not in self._pods:
            wants = sum(
                int(container.get("resources", {}).get("limits", {}).get(self._resource, 0))
                for container in one["spec"]["containers"]
            )
            self._pods[uid] = Placement(one["metadata"]["name"], wants, watched="nodeName" not in one["spec"])
        pod = self._pods[uid]
        if not pod.node and (node := one["spec"].get("nodeName")):
            pod.node, pod.bound = node, version
        if pod.ended is None and one["status"].get("phase") in ENDED:
            pod.ended = version
            if failed(one):
                pod.failure = str(one["status"].get("message", ""))

    def see_nodes(self, nodes: Mapping[str, Object]) -> None:
        for name, node in nodes.items():
            version = int(node["metadata"]["resourceVersion"])
            count = int(node["status"]["allocatable"].get(self._resource, 0))
            offers = self._offers.setdefault(name, [])
            self._versions[name] = version
            if not offers or (offers[-1][0] < version and offers[-1][1] != count):
                offers.append((version, count))
        self._changed.set()

    async def until_seen(self, versions: Mapping[str, int]) -> None:
        """Waits until these versions, or later ones, have been seen. Raises Waited after LIMIT_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIMIT_S):
                while missing := {key for key, version in versions.items() if self._versions.get(key, 0) < version}:
                    self._changed.clear()
                    await self._changed.wait()
                return
        raise Waited(f"not seen in time: {missing}")

    def offered(self, node: str, version: int) -> int:
        """Returns the count in the Node's status at a version."""
        return next((count for at, count in reversed(self._offers.get(node, ())) if at <= version), 0)

    def failures(self) -> list[Placement]:
        return [pod for pod in self._pods.values() if pod.failure is not None]

    def without_room(self) -> list[Placement]:
        """Returns failed pods that were bound although their Node's status had no device left for them.

        The scheduler may see a status a moment after it was written.
        """
        return [
            pod
            for pod in self.failures()
            if pod.bound is not None and pod.watched and self._room(pod, pod.bound) < pod.wants
        ]

    def _room(self, pod: Placement, version: int) -> int:
        taken = sum(
            other.wants
            for other in self._pods.values()
            if other is not pod
            and other.node == pod.node
            and (other.bound or 0) < version
            and (other.ended is None or other.ended > version)
        )
        return self.offered(pod.node, version) - taken

    def repeated(self) -> list[Placement]:
        """Returns failed pods that were bound after another failed on their node, without a new count in between.

        When the plugin or the kubelet refuses a pod, the plugin writes the lower count. That must be done before the
        next pod is created and bound.
        """
        failures = [pod for pod in self.failures() if pod.bound is not None and pod.watched]
        return [
            pod
            for pod in failures
            if any(
                other.node == pod.node
                and (other.ended or 0) < (pod.bound or 0)
                and not any((other.bound or 0) < at < (pod.bound or 0) for at, _count in self._offers[pod.node])
                for other in failures
                if other is not pod
            )
        ]

    def denied_unpublished(self, devices: int) -> list[Placement]:
        """Returns denied pods whose Node had the count of all devices from the binding to the failure.

        The plugin must write the lower count before it answers the Allocate, so that no other pod is bound there.
        """
        found = []
        for pod in self.failures():
            if pod.bound is None or pod.ended is None or DENIED not in (pod.failure or ""):
                continue
            between = [count for at, count in self._offers[pod.node] if pod.bound < at < pod.ended]
            if min([self.offered(pod.node, pod.bound), *between]) >= devices:
                found.append(pod)
        return found


@contextlib.asynccontextmanager
async def followed(cluster: ClusterView, resource: str) -> AsyncIterator[Placements]:
    placements = Placements(resource)
    followers = [
        asyncio.create_task(cluster.follow("pods", placements.see_pods)),
        asyncio.create_task(cluster.follow("nodes", placements.see_nodes)),
    ]
    try:
        await caught_up(cluster, placements)
        yield placements
    finally:
        for follower in followers:
            follower.cancel()
        for result in await asyncio.gather(*followers, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def caught_up(cluster: ClusterView, placements: Placements) -> None:
    """Waits until every write so far has been seen."""
    pods, nodes = await cluster.all("pods"), await cluster.all("nodes")
    versions = {one["metadata"]["uid"]: int(one["metadata"]["resourceVersion"]) for one in pods.values()}
    versions |= {name: int(node["metadata"]["resourceVersion"]) for name, node in nodes.items()}
    await placements.until_seen(versions)
