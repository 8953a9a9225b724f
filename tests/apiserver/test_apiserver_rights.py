"""The rights of rbac/ are exactly those that a node needs: each is used, and something fails without it."""

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
from tests.apiserver.objects import LEASES, POLL_S, allocatable, make_node, make_pod
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

DEPRIVED = "usbip-deprived"
PATIENCE_S = 30.0
STUCK_S = 65.0
"""Seconds on the node's clock for which a stuck run is watched: longer than the interval of every retry."""
REFUSALS = 2

Right = tuple[str, str, str]
"""API group, resource with its subresource, verb."""

OFFERED = "the kubelet has the devices as healthy"
ALLOCATED = "Allocate answers"
KEPT = "the session is renewed"
REPORTED = "an Event reports that a lock was taken away"
COUNTED = "the Node has one device less"
RELEASED = "the lock is free after the pod's end"
POD_SEEN = "a pod of the node is seen without another list of all pods"
FOLLOWED = "the locks of other nodes are followed"

LEASE, CORE, EVENT = "coordination.k8s.io", "", "events.k8s.io"
# The first step that does not happen without the right, and the request that the log reports as forbidden.
MISSED: dict[Right, tuple[str, str]] = {
    # without the locks, no device is offered: it may be that of a pod
    (LEASE, "leases", "list"): (OFFERED, "list leases.coordination.k8s.io"),
    (CORE, "nodes/status", "patch"): (COUNTED, "patch nodes/status"),
    (LEASE, "leases", "create"): (ALLOCATED, "create leases.coordination.k8s.io"),
    (LEASE, "leases", "get"): (KEPT, "get leases.coordination.k8s.io"),
    (LEASE, "leases", "update"): (RELEASED, "update leases.coordination.k8s.io"),
    (EVENT, "events", "create"): (REPORTED, "create events.events.k8s.io"),
    (CORE, "pods", "list"): (POD_SEEN, "list pods"),
    (CORE, "pods", "watch"): (POD_SEEN, "watch pods"),
    (LEASE, "leases", "watch"): (FOLLOWED, "watch leases.coordination.k8s.io"),
}


class NodeRun:
    """A run of one node through all steps. step: the current step, "" after the last."""

    def __init__(self, admin: KubeClient, node: SimNode, clock: ScaledClock, refusals: Sequence[KubeError]) -> None:
        self._admin, self._node, self.clock, self._refusals = admin, node, clock, refusals
        self.step = OFFERED
        self.task = asyncio.create_task(self._run(), name="run")

    async def _run(self) -> None:
        node, agent = self._node, self._node.agent
        assert agent is not None
        assert agent.own_pods is not None
        await self._until(lambda: list(node.kubelet.health(node.resource(RESOURCE)).values()) == [True, True])
        self.step = ALLOCATED
        first = PodRef("default", "first")
        await node.admit(first, {RESOURCE: 1})
        self.step = KEPT
        await self._until(lambda: agent.locks.session.written_at is not None)
        self.step = REPORTED
        (stolen,) = agent.locks.mine()
        await self._take_away(stolen.device_id)
        await self._until_reported()
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
        with self.clock.hurried():  # without the right to list pods a release takes 15 s
            await self._until(lambda: agent.locks.locks[held.device_id].holder == "")
        self.step = POD_SEEN
        pods = agent.own_pods
        with mock.patch.object(pods, "apply", wraps=pods.apply) as applied:
            pod = await self._make_pod()
            await self._until(
                lambda: (
                    pods.find(pod.namespace, pod.name) == pod
                    and any(call.args[0]["object"]["metadata"].get("uid") == pod.uid for call in applied.call_args_list)
                )
            )
        self.step = ""

    async def refused_again(self, count: int) -> None:
        """Waits until the API server has refused `count` more requests of the plugin."""
        before = len(self._refusals)
        async with asyncio.timeout(PATIENCE_S):
            await self._until(lambda: len(self._refusals) - before >= count)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - the conditions have no common event
            await asyncio.sleep(POLL_S)

    async def _until_counted(self, count: str) -> None:
        while await allocatable(self._admin, self._node.name, self._node.resource(RESOURCE)) != count:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async def _take_away(self, device_id: str) -> None:
        """Takes the lock once it names port and pod: a later write of the plugin would detect the loss."""
        while True:
            lease = await self._admin.request("get", f"{LEASES}/{device_id}", resource="leases")
            notes = lease["metadata"]["annotations"]
            if notes.get(record.PORT) and notes.get(record.POD):
                break
            if any(error.verb == "update" for error in self._refusals):  # the plugin can write neither
                break
        lease["spec"] |= {"holderIdentity": "somebody-else", "leaseTransitions": lease["spec"]["leaseTransitions"] + 1}
        await self._admin.request("update", f"{LEASES}/{device_id}", resource="leases", body=lease)

    async def _until_reported(self) -> None:
        path = "/apis/events.k8s.io/v1/events"
        while True:
            events = (await self._admin.list(path, resource="events"))["items"]
            if any(event.get("reportingInstance") == self._node.name for event in events):
                return
            await asyncio.sleep(POLL_S)

    async def _make_pod(self) -> PodRef:
        return await make_pod(self._admin, self._node.name, namespace=DEPRIVED, account="default")


@contextlib.asynccontextmanager
async def node_run(cluster: Cluster, admin: KubeClient, name: str, token: str) -> AsyncIterator[NodeRun]:
    """Runs a node with two devices and with everything in a plugin process that uses the API server."""
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u-")))
        await make_node(admin, name)
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

        def record_events(device_event: DeviceEvent) -> None:
            for text, pod in events_of(device_event):
                events.record(text, pod)

        node.observer = dataclasses.replace(node.observer, on_notice=record_events)
        await stack.enter_async_context(node.kubelet)
        stack.push_async_callback(node.stop)
        writer = asyncio.create_task(events.run())
        stack.push_async_callback(ended, writer)
        node.start()
        run = NodeRun(admin, node, clock, refusals)
        stack.push_async_callback(ended, run.task)
        yield run


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def warnings_of(run: NodeRun, caplog: pytest.LogCaptureFixture) -> str:
    """Returns the warnings and errors of the plugin, and the error that ended the run."""
    lines = [str(vars(record)) for record in caplog.records if record.levelno >= logging.WARNING]
    if run.task.done() and not run.task.cancelled():
        lines.append(str(run.task.exception()))
    return "\n".join(lines)


@pytest.fixture
async def namespace(admin: KubeClient) -> None:
    """Creates a namespace for pods and for ServiceAccounts that lack a right."""
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": DEPRIVED}}
    with contextlib.suppress(KubeConflict):
        await admin.request("create", "/api/v1/namespaces", resource="namespaces", body=body)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    path = f"/api/v1/namespaces/{DEPRIVED}/serviceaccounts"
    with contextlib.suppress(KubeConflict):
        await admin.request("create", path, resource="serviceaccounts", body=account)


async def deprive(admin: KubeClient, right: Right) -> str:
    """Returns the name of a new ServiceAccount with all rights of rbac/ except one."""
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
    """Returns a rule for each right of a rule."""
    return [{"apiGroups": [g], "resources": [r], "verbs": [v]} for g, r, v in granted_by(rule)]


def shipped_rights() -> list[Right]:
    roles = [document for document in shipped() if document["kind"] in {"Role", "ClusterRole"}]
    return [right for role in roles for rule in role["rules"] for right in granted_by(rule)]


def test_each_right_is_granted_once_and_has_a_test() -> None:
    assert sorted(shipped_rights()) == sorted(MISSED)


def test_check_verifies_exactly_the_shipped_rights() -> None:
    checked = [
        (p.group, f"{p.resource}/{p.subresource}" if p.subresource else p.resource, p.verb)
        for p in permissions_needed(NAMESPACE, "node", publish_node_status=True)
    ]
    assert sorted(checked) == sorted(shipped_rights())


@pytest.mark.usefixtures("namespace")
async def test_a_run_uses_every_right_and_no_other(
    cluster: Cluster, admin: KubeClient, tokens: NodeTokens, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"n{uuid.uuid4().hex[:8]}-run"
    async with node_run(cluster, admin, name, await tokens.of(name)) as run:
        await asyncio.wait([run.task], timeout=2 * PATIENCE_S)
        assert run.task.done(), f"stuck: {run.step}"
        await run.task
        assert "forbidden" not in warnings_of(run, caplog)
    requests = [
        event
        for event in cluster.audited()
        if event["user"].get("extra", {}).get("authentication.kubernetes.io/node-name") == [name]
    ]
    used = set()
    for event in requests:
        reference = event["objectRef"]
        resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
        used.add((reference.get("apiGroup", ""), resource, event["verb"]))
        assert event["responseStatus"]["code"] != 403, event
    assert used == set(shipped_rights())


@pytest.mark.usefixtures("namespace")
@pytest.mark.parametrize("right", MISSED, ids=" ".join)
async def test_without_a_right_a_step_fails_and_the_log_says_what_to_grant(
    cluster: Cluster, admin: KubeClient, right: Right, caplog: pytest.LogCaptureFixture
) -> None:
    step, refused = MISSED[right]
    account = await deprive(admin, right)
    name = f"n{uuid.uuid4().hex[:8]}-less"
    token = await NodeTokens(cluster, DEPRIVED, account).of(name)
    async with node_run(cluster, admin, name, token) as run:
        async with asyncio.timeout(PATIENCE_S):
            while run.step != step or f"{refused}: forbidden" not in warnings_of(run, caplog):
                assert run.step, f"the run ended without the right to {refused}"
                await asyncio.sleep(POLL_S)
        if step == FOLLOWED:
            # on a hurried clock a refused watch would last long enough to count as established
            await run.refused_again(REFUSALS)
        else:
            with run.clock.hurried(STUCK_S):
                await run.clock.sleep(STUCK_S)
        assert run.step == step
        assert not run.task.done() or run.task.exception() is not None
