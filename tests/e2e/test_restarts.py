"""Kubelets, plugins and nodes that stop, come back, or do not, while a pod holds a device."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest

from tests.e2e.cluster import DOMAIN, PLUGIN_NAMESPACE, ClusterView, Object, holder, locks_of
from tests.e2e.conftest import LOCK_DURATION, Place
from tests.e2e.containers import read_device
from tests.e2e.figures import Figures
from tests.e2e.kubectl import Kubectl
from tests.e2e.nodes import KERNEL, PLUGIN, Nodes
from tests.e2e.plugin_pods import plugin_on, replace_plugin, restarted
from tests.e2e.plugin_process import imports_at_server
from tests.e2e.test_pods import pending
from tests.e2e.workloads import pod, pod_spec

TAKEOVER_S = 3 * LOCK_DURATION


@dataclass(frozen=True)
class Identity:
    """What of a pod must not change when it runs on, and of its lock.

    imports: the connections from its node that stood at the USB/IP server. That of its device must be among them later.
    """

    uid: str
    container: str
    restarts: int
    epoch: int
    imports: frozenset[str] = field(compare=False)


async def identity(cluster: ClusterView, kubectl: Kubectl, name: str, node: str) -> Identity:
    one = await cluster.running(name)
    imports = imports_at_server(kubectl).get(one["status"]["hostIP"], frozenset())
    assert imports, f"{name} has no device"
    status = one["status"]["containerStatuses"][0]
    lock = await cluster.lock_of(node)
    return Identity(
        one["metadata"]["uid"],
        status["containerID"],
        status["restartCount"],
        lock["spec"]["leaseTransitions"],
        imports,
    )


async def attached_on(cluster: ClusterView, kubectl: Kubectl, node: str) -> float:
    """How many devices of the resource its plugin says are attached."""
    name = (await plugin_on(cluster, node))["metadata"]["name"]
    metrics = kubectl("get", "--raw", f"/api/v1/namespaces/{PLUGIN_NAMESPACE}/pods/{name}:13240/proxy/metrics")
    sample = re.compile(rf'^usbip_device_plugin_attached_devices{{resource="{DOMAIN}/solo"}} (\S+)', re.MULTILINE)
    (count,) = sample.findall(metrics)
    return float(count)


@pytest.fixture
async def held(cluster: ClusterView, kubectl: Kubectl, image: str, place: Place) -> Identity:
    """A pod `keeper` on node a that holds the device."""
    await cluster.create("pods", pod("keeper", pod_spec(image, "solo", node=place.a)))
    return await identity(cluster, kubectl, "keeper", place.a)


async def same(cluster: ClusterView, kubectl: Kubectl, name: str, node: str, before: Identity) -> None:
    """The pod runs on with its device: not started again, over the connection of before, under the lock of before."""
    now = await identity(cluster, kubectl, name, node)
    assert now == before
    assert now.imports & before.imports, f"{name} has lost its device's connection"


async def unharmed(cluster: ClusterView, kubectl: Kubectl, place: Place, before: Identity) -> None:
    """The pod runs on and reads its device, the lock is the same, and another node may not have it."""
    await cluster.allocatable(place.a, "solo", 1)
    await same(cluster, kubectl, "keeper", place.a, before)
    read_device(kubectl, "keeper")
    await cluster.allocatable(place.b, "solo", 0)


@pytest.mark.short
async def test_a_kubelet_restart(
    cluster: ClusterView, kubectl: Kubectl, nodes: Nodes, place: Place, held: Identity, figures: Figures
) -> None:
    begin = time.monotonic()
    nodes.restart_kubelet(place.a)
    await unharmed(cluster, kubectl, place, held)
    figures.add("kubelet restart until all is well, s", time.monotonic() - begin)


@pytest.mark.short
async def test_a_plugin_killed(
    cluster: ClusterView, kubectl: Kubectl, nodes: Nodes, place: Place, held: Identity, figures: Figures
) -> None:
    before = await plugin_on(cluster, place.a)
    begin = time.monotonic()
    nodes.kill(place.a, PLUGIN)
    await restarted(cluster, before)
    await unharmed(cluster, kubectl, place, held)
    figures.add("plugin killed until all is well, s", time.monotonic() - begin)


async def test_a_plugin_pod_deleted(cluster: ClusterView, kubectl: Kubectl, place: Place, held: Identity) -> None:
    await replace_plugin(cluster, kubectl, place.a)
    await unharmed(cluster, kubectl, place, held)


async def test_plugin_and_kubelet_at_once(
    cluster: ClusterView, kubectl: Kubectl, nodes: Nodes, place: Place, held: Identity
) -> None:
    before = await plugin_on(cluster, place.a)
    nodes.kill(place.a, PLUGIN)
    nodes.restart_kubelet(place.a)
    await restarted(cluster, before)
    await unharmed(cluster, kubectl, place, held)


async def test_a_kubelet_restart_while_the_plugin_is_down(
    cluster: ClusterView, kubectl: Kubectl, nodes: Nodes, place: Place, held: Identity
) -> None:
    before = await plugin_on(cluster, place.a)
    nodes.stop_kubelet(place.a)
    nodes.kill(place.a, PLUGIN)  # nobody starts it before the kubelet is back
    nodes.start_kubelet(place.a)
    await restarted(cluster, before)
    await unharmed(cluster, kubectl, place, held)


@pytest.mark.short
async def test_a_rollout_of_the_plugin_harms_no_pod(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, held: Identity
) -> None:
    await cluster.create("pods", pod("other", pod_spec(image, "pair", node=place.b)))
    other = await identity(cluster, kubectl, "other", place.b)
    kubectl("rollout", "restart", "-n", PLUGIN_NAMESPACE, "daemonset/usbip-plugin")
    kubectl("rollout", "status", "-n", PLUGIN_NAMESPACE, "daemonset/usbip-plugin", "--timeout=120s", limit=150)
    await unharmed(cluster, kubectl, place, held)
    await same(cluster, kubectl, "other", place.b, other)
    read_device(kubectl, "other", "PAIR")


async def test_a_pod_deleted_while_the_kubelet_is_down_keeps_the_device_until_it_ends(
    cluster: ClusterView, nodes: Nodes, place: Place, held: Identity
) -> None:
    await cluster.allocatable(place.b, "solo", 0)
    nodes.stop_kubelet(place.a)
    try:
        await cluster.delete("pods", "keeper")
        await cluster.pod("keeper", lambda one: "deletionTimestamp" in one["metadata"], "marked for deletion")
        # its container runs: nobody else gets the device, however long a heartbeat takes
        beat = await _next_heartbeat(cluster, place.a)
        lock = await cluster.lock_of(place.a)
        assert (beat, lock["spec"]["leaseTransitions"]) == (place.a, held.epoch)
    finally:
        nodes.start_kubelet(place.a)
    await cluster.gone("keeper")
    await cluster.unlocked()
    await cluster.allocatable(place.b, "solo", 1)


async def _next_heartbeat(cluster: ClusterView, node: str) -> str:
    """The holder of the node's session, after it has been renewed once more."""
    name = f"usbip-node-{node}"
    first = (await cluster.all("leases"))[name]["spec"]["renewTime"]

    def renewed(leases: Mapping[str, Object]) -> str | None:
        return holder(leases[name]) if leases[name]["spec"]["renewTime"] != first else None

    return await cluster.until("leases", renewed, "a heartbeat")


async def test_a_node_that_dies_is_taken_over_after_the_duration_and_harms_nothing_when_it_is_back(
    cluster: ClusterView, kubectl: Kubectl, nodes: Nodes, image: str, place: Place, figures: Figures
) -> None:
    """Kubelet, plugin and kernel of b are gone for good; a gets the device when b's lock has expired, not before.

    That takes the whole duration of production: the clock of a real plugin's process cannot be made to run faster.
    """
    await cluster.create("pods", pod("lost", pod_spec(image, "solo", node=place.b)))
    await cluster.running("lost")
    before = await cluster.lock_of(place.b)
    dead = await plugin_on(cluster, place.b)
    await cluster.allocatable(place.a, "solo", 0)
    nodes.stop_kubelet(place.b)
    try:
        nodes.kill(place.b, PLUGIN)
        nodes.kill(place.b, KERNEL)
        begin = time.monotonic()
        await cluster.create("pods", pod("heir", pod_spec(image, "solo", node=place.a)))
        await cluster.pod("heir", pending, "not placed: the device is not free yet")

        def heir(leases: Mapping[str, Object]) -> Object | None:
            return next(iter(locks_of(leases, place.a).values()), None)

        lock = await cluster.until("leases", heir, "the lock taken over", limit=TAKEOVER_S)
        figures.add("node dead to its lock taken over, s", time.monotonic() - begin)
        # As the plugins wrote it, so that it does not matter when this test looks. The nodes have one clock: a waited
        # for the whole duration after it had seen the last heartbeat.
        beat = (await cluster.all("leases"))[f"usbip-node-{place.b}"]["spec"]["renewTime"]
        waited = datetime.fromisoformat(lock["spec"]["acquireTime"]) - datetime.fromisoformat(beat)
        assert waited >= timedelta(seconds=LOCK_DURATION)
        assert lock["spec"]["leaseTransitions"] == before["spec"]["leaseTransitions"] + 1
        await cluster.running("heir")
        read_device(kubectl, "heir")
    finally:
        nodes.start_kubelet(place.b)
    await cluster.settled()
    # b's pod, which still runs, lost its device: it is not given back, and a's is not touched
    await restarted(cluster, dead)
    await cluster.allocatable(place.b, "solo", 0)
    assert await attached_on(cluster, kubectl, place.b) == 0
    assert await attached_on(cluster, kubectl, place.a) == 1
    read_device(kubectl, "heir")
    again = await cluster.lock_of(place.a)
    assert again["spec"]["leaseTransitions"] == lock["spec"]["leaseTransitions"]
