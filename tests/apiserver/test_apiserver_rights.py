"""The rights of rbac/ are those that a node's life needs, no more and no fewer: each is used, and missed when gone."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import logging
import random
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.apiserver.scaled_clock import ScaledClock
from tests.rigs.agents_rig import DONGLE, RESOURCE
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_rights import collection, shipped
from usbip_plugin.attach.events import DeviceEvent, events_of
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import KubeConflict, KubeError
from usbip_plugin.kube.client import KubeClient, connect
from usbip_plugin.kube.events import EventRecorder
from usbip_plugin.locks import record
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.model import NodeIdentity, PodRef
from usbip_plugin.node.check import permissions_needed
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.world import Setup, SimNode, World

pytestmark = pytest.mark.short

LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
DEPRIVED = "usbip-deprived"
PATIENCE_S = 30.0
STUCK_S = 65.0
"""How long a life that lacks a right is watched after it got stuck, on its node's clock: for each retry there is."""
REFUSALS = 2
_POLL_S = 0.05

Right = tuple[str, str, str]
"""API group, resource with its subresource, verb."""

OFFERED = "the kubelet has the devices as healthy"
ALLOCATED = "Allocate answers"
KEPT = "the session is kept"
TOLD = "a lock that was taken away is told in an Event"
COUNTED = "the Node has a device less"
RELEASED = "the lock is free after the pod's end"
POD_SEEN = "a pod of the node is seen without listing all pods anew"
FOLLOWED = "the locks of other nodes are followed"

LEASE, CORE, EVENT = "coordination.k8s.io", "", "events.k8s.io"
# What is the first not to happen, and what the log then says is forbidden.
MISSED: dict[Right, tuple[str, str]] = {
    # without the locks, devices are offered from 5 s to 15 s after the start: each Allocate still writes its lock
    (LEASE, "leases", "list"): (TOLD, "list leases.coordination.k8s.io"),
    (CORE, "nodes/status", "patch"): (COUNTED, "patch nodes/status"),
    (LEASE, "leases", "create"): (ALLOCATED, "create leases.coordination.k8s.io"),
    (LEASE, "leases", "get"): (KEPT, "get leases.coordination.k8s.io"),
    (LEASE, "leases", "update"): (RELEASED, "update leases.coordination.k8s.io"),
    (EVENT, "events", "create"): (TOLD, "create events.events.k8s.io"),
    (CORE, "pods", "list"): (POD_SEEN, "list pods"),
    (CORE, "pods", "watch"): (POD_SEEN, "watch pods"),
    (LEASE, "leases", "watch"): (FOLLOWED, "watch leases.coordination.k8s.io"),
}


class Life:
    """One node's life in steps; step is the one that is under way, "" after the last."""

    def __init__(self, admin: KubeClient, node: SimNode, clock: ScaledClock, refusals: Sequence[KubeError]) -> None:
        self._admin, self._node, self.clock, self._refusals = admin, node, clock, refusals
        self.step = OFFERED
        self.task = asyncio.create_task(self._live(), name="life")

    async def _live(self) -> None:
        node, agent = self._node, self._node.agent
        assert agent is not None
        assert agent.own_pods is not None
        await self._until(lambda: list(node.kubelet.health(node.resource(RESOURCE)).values()) == [True, True])
        self.step = ALLOCATED
        first = PodRef("default", "first")
        await node.admit(first, {RESOURCE: 1})
        self.step = KEPT
        await self._until(lambda: agent.locks.session.written_at is not None)
        self.step = TOLD
        (stolen,) = agent.locks.mine()
        await self._take_away(stolen.device_id)
        await self._until_told()
        node.end(first)
        self.step = COUNTED
        await self._until_counted("1")
        self.step = FOLLOWED
        await self._until(lambda: agent.locks.api.reachable)
        self.step = RELEASED
        second = await self._make_pod()
        await node.admit(second, {RESOURCE: 1})
        (held,) = agent.locks.mine()
        await self._until(lambda: agent.claims.view[held.device_id].pod is not None)
        node.end(second)
        with self.clock.hurried():  # a pod that the plugin may not look up is over only after 15 s
            await self._until(lambda: agent.locks.locks[held.device_id].holder == "")
        self.step = POD_SEEN
        pods = agent.own_pods
        with mock.patch.object(pods, "apply", wraps=pods.apply) as told:
            pod = await self._make_pod()
            await self._until(
                lambda: (
                    pods.find(pod.namespace, pod.name) == pod
                    and any(call.args[0]["object"]["metadata"].get("uid") == pod.uid for call in told.call_args_list)
                )
            )
        self.step = ""

    async def refused_again(self, count: int) -> None:
        """Waits until the API server has refused the plugin something so many times more."""
        before = len(self._refusals)
        async with asyncio.timeout(PATIENCE_S):
            await self._until(lambda: len(self._refusals) - before >= count)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - what is waited for has no event in common
            await asyncio.sleep(_POLL_S)

    async def _until_counted(self, count: str) -> None:
        name = self._node.resource(RESOURCE)
        while True:
            node = await self._admin.request("get", f"/api/v1/nodes/{self._node.name}", resource="nodes")
            if node["status"].get("allocatable", {}).get(name) == count:
                return
            await asyncio.sleep(_POLL_S)

    async def _take_away(self, device_id: str) -> None:
        """Takes the lock when the plugin has noted port and pod on it: a later write would show it the loss."""
        while True:
            lease = await self._admin.request("get", f"{LEASES}/{device_id}", resource="leases")
            notes = lease["metadata"]["annotations"]
            if notes.get(record.PORT) and notes.get(record.POD):
                break
            if any(error.verb == "update" for error in self._refusals):  # nothing is noted without that right
                break
        lease["spec"]["holderIdentity"] = "somebody-else"
        await self._admin.request("update", f"{LEASES}/{device_id}", resource="leases", body=lease)

    async def _until_told(self) -> None:
        path = "/apis/events.k8s.io/v1/events"
        while True:
            events = (await self._admin.list(path, resource="events"))["items"]
            if any(event.get("reportingInstance") == self._node.name for event in events):
                return
            await asyncio.sleep(_POLL_S)

    async def _make_pod(self) -> PodRef:
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"generateName": "seen-"},
            "spec": {"nodeName": self._node.name, "containers": [{"name": "c", "image": "i"}]},
        }
        path = f"/api/v1/namespaces/{DEPRIVED}/pods"
        made = (await self._admin.request("create", path, resource="pods", body=body))["metadata"]
        return PodRef(made["namespace"], made["name"], made["uid"])


@contextlib.asynccontextmanager
async def living(cluster: Cluster, admin: KubeClient, name: str, token: str) -> AsyncIterator[Life]:
    """A node with two devices, with all that a plugin process has to do with the API server."""
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        await admin.request("create", "/api/v1/nodes", resource="nodes", body=body)
        refusals: list[KubeError] = []
        client = await connect(cluster.kubeconfig(token), on_error=refusals.append)
        stack.push_async_callback(client.close)
        server = VirtualServer([VirtualDevice(f"1-{i}", DONGLE, configured=True) for i in (1, 2)], reset_time=0)
        await server.start()
        stack.push_async_callback(server.stop)
        selector = DeviceSelector(server.key, Selector(vendor=DONGLE.vendor, product=DONGLE.product))
        clock = ScaledClock()
        setup = Setup(
            config=Config((ResourceConfig(RESOURCE, (selector,)),)),
            clock=SystemClock(),
            make_clock=lambda _node: clock,
            make_leases=lambda _node: KubernetesLeases(client, NAMESPACE),
            make_kube=lambda _node: client,
            kube_has_pods=True,
        )
        node = World(directory, [name], setup)[name]
        events = EventRecorder(client, NodeIdentity(name, "boot"), SystemClock(), random.Random(name))

        def noticed(notice: DeviceEvent) -> None:
            for text, pod in events_of(notice):
                events.record(text, pod)

        node.observer = dataclasses.replace(node.observer, on_notice=noticed)
        await stack.enter_async_context(node.kubelet)
        stack.push_async_callback(node.stop)
        writer = asyncio.create_task(events.run())
        stack.push_async_callback(ended, writer)
        node.start()
        life = Life(admin, node, clock, refusals)
        stack.push_async_callback(ended, life.task)
        yield life


async def ended(task: asyncio.Task[None]) -> None:
    """Whatever it came to."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def said(caplog: pytest.LogCaptureFixture, life: Life) -> str:
    """All that the plugin has complained of."""
    lines = [str(vars(record)) for record in caplog.records if record.levelno >= logging.WARNING]
    if life.task.done() and not life.task.cancelled():
        lines.append(str(life.task.exception()))
    return "\n".join(lines)


@pytest.fixture
async def namespace(admin: KubeClient) -> None:
    """For the ServiceAccounts that lack a right, and for pods to be seen."""
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": DEPRIVED}}
    with contextlib.suppress(KubeConflict):
        await admin.request("create", "/api/v1/namespaces", resource="namespaces", body=body)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    path = f"/api/v1/namespaces/{DEPRIVED}/serviceaccounts"
    with contextlib.suppress(KubeConflict):
        await admin.request("create", path, resource="serviceaccounts", body=account)


async def deprive(admin: KubeClient, right: Right) -> str:
    """The name of a new ServiceAccount that has all of rbac/ but this right."""
    name = f"without-{list(MISSED).index(right)}"
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
    path = f"/api/v1/namespaces/{DEPRIVED}/serviceaccounts"
    await admin.request("create", path, resource="serviceaccounts", body=account)
    for document in shipped():
        if "rbac.authorization.k8s.io" not in document["apiVersion"]:
            continue
        changed = copy.deepcopy(document)
        changed["metadata"]["name"] = name
        if "rules" in changed:
            changed["rules"] = [rule for old in changed["rules"] for rule in split(old) if granted_by(rule) != [right]]
        else:
            changed["roleRef"]["name"] = name
            changed["subjects"] = [{"kind": "ServiceAccount", "name": name, "namespace": DEPRIVED}]
        await admin.request("create", collection(changed), resource=changed["kind"], body=changed)
    return name


def granted_by(rule: dict[str, Any]) -> list[Right]:
    return [
        (group, resource, verb)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


def split(rule: dict[str, Any]) -> list[dict[str, Any]]:
    """Rules of one right each."""
    return [{"apiGroups": [g], "resources": [r], "verbs": [v]} for g, r, v in granted_by(rule)]


def shipped_rights() -> list[Right]:
    roles = [document for document in shipped() if document["kind"] in {"Role", "ClusterRole"}]
    return [right for role in roles for rule in role["rules"] for right in granted_by(rule)]


def test_each_right_is_granted_once_and_has_a_test() -> None:
    assert sorted(shipped_rights()) == sorted(MISSED)


def test_check_asks_about_the_same_rights() -> None:
    asked = [
        (p.group, f"{p.resource}/{p.subresource}" if p.subresource else p.resource, p.verb)
        for p in permissions_needed(NAMESPACE, "node", publish_node_status=True)
    ]
    assert sorted(asked) == sorted(shipped_rights())


@pytest.mark.usefixtures("namespace")
async def test_a_life_uses_every_right_and_no_other(
    cluster: Cluster, admin: KubeClient, tokens: NodeTokens, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"n{uuid.uuid4().hex[:8]}-life"
    async with living(cluster, admin, name, await tokens.of(name)) as life:
        await asyncio.wait([life.task], timeout=2 * PATIENCE_S)
        assert life.task.done(), f"stuck: {life.step}"
        await life.task
        assert "forbidden" not in said(caplog, life)
    asked = [
        event
        for event in cluster.audited()
        if event["user"].get("extra", {}).get("authentication.kubernetes.io/node-name") == [name]
    ]
    used = set()
    for event in asked:
        reference = event["objectRef"]
        resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
        used.add((reference.get("apiGroup", ""), resource, event["verb"]))
        assert event["responseStatus"]["code"] != 403, event
    assert used == set(shipped_rights())


@pytest.mark.usefixtures("namespace")
@pytest.mark.parametrize("right", MISSED, ids=" ".join)
async def test_without_a_right_something_is_missed_and_the_log_says_what_to_grant(
    cluster: Cluster, admin: KubeClient, right: Right, caplog: pytest.LogCaptureFixture
) -> None:
    step, refused = MISSED[right]
    account = await deprive(admin, right)
    name = f"n{uuid.uuid4().hex[:8]}-less"
    token = await NodeTokens(cluster, DEPRIVED, account).of(name)
    async with living(cluster, admin, name, token) as life:
        async with asyncio.timeout(PATIENCE_S):
            while life.step != step or f"{refused}: forbidden" not in said(caplog, life):
                assert life.step, f"the life went on to its end without the right to {refused}"
                await asyncio.sleep(_POLL_S)
        if step == FOLLOWED:
            # on a hurried clock the time that a refusal takes is that after which an open watch counts as established
            await life.refused_again(REFUSALS)
        else:
            with life.clock.hurried(STUCK_S):
                await life.clock.sleep(STUCK_S)
        assert life.step == step
        assert not life.task.done() or life.task.exception() is not None
