"""Restarts and deaths of kubelets, plugins and nodes while a pod holds a device."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
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
from tests.e2e.workloads import pod, pod_spec, run_pod

TAKEOVER_S = 3 * LOCK_DURATION


@dataclass(frozen=True)
class Identity:
    """Attributes of a pod and its lock that must not change.

    imports: connections of its node to the USB/IP server. One of them, that of its device, must last.
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
    """Returns the number of attached `solo` devices from the plugin's metrics."""
    name = (await plugin_on(cluster, node))["metadata"]["name"]
    metrics = kubectl("get", "--raw", f"/api/v1/namespaces/{PLUGIN_NAMESPACE}/pods/{name}:13240/proxy/metrics")
    sample = re.compile(rf'^usbip_device_plugin_attached_devices{{resource="{DOMAIN}/solo"}} (\S+)', re.MULTILINE)
    (count,) = sample.findall(metrics)
    return float(count)


@pytest.fixture
async def held(cluster: ClusterView, kubectl: Kubectl, image: str, place: Place) -> Identity:
    """Starts a pod `keeper` on node a that holds the device."""
    await cluster.create("pods", pod("keeper", pod_spec(image, "solo", node=place.a)))
    return await identity(cluster, kubectl, "keeper", place.a)


async def same(cluster: ClusterView, kubectl: Kubectl, name: str, node: str, before: Identity) -> None:
    """Asserts that the pod was not restarted and has its device over the earlier connection and lock."""
    now = await identity(cluster, kubectl, name, node)
    assert now == before
    assert now.imports & before.imports, f"{name} has lost its device's connection"


async def unharmed(cluster: ClusterView, kubectl: Kubectl, place: Place, before: Identity) -> None:
    """Asserts that `keeper` runs on and reads its device under its lock, and that no other node offers the device."""
    await cluster.allocatable(place.a, "solo", 1)
    await same(cluster, kubectl, "keeper", place.a, before)
    read_device(kubectl, "keeper")
    await cluster.allocatable(place.b, "solo", 0)


@dataclass(frozen=True)
class Restart:
    """A restart of kubelet or plugin on a node."""

    name: str
    do: Callable[[Nodes, str], None]
    of_plugin: bool = True


def kill_plugin_and_restart_kubelet(nodes: Nodes, node: str) -> None:
    nodes.kill(node, PLUGIN)
    nodes.kubelet(node, "restart")


def kill_plugin_while_kubelet_is_down(nodes: Nodes, node: str) -> None:
    nodes.kubelet(node, "stop")
    nodes.kill(node, PLUGIN)  # only the kubelet starts it again
    nodes.kubelet(node, "start")


RESTARTS = [
    pytest.param(
        Restart("kubelet restart", lambda n, node: n.kubelet(node, "restart"), False), marks=pytest.mark.short
    ),
    pytest.param(Restart("plugin killed", lambda n, node: n.kill(node, PLUGIN)), marks=pytest.mark.short),
    Restart("plugin killed and kubelet restart", kill_plugin_and_restart_kubelet),
    Restart("plugin killed while the kubelet is down", kill_plugin_while_kubelet_is_down),
]


@pytest.mark.parametrize("restart", RESTARTS, ids=lambda restart: restart.name.replace(" ", "-"))
async def test_a_pod_keeps_its_device_through_a_restart(
    cluster: ClusterView,
    kubectl: Kubectl,
    nodes: Nodes,
    place: Place,
    held: Identity,
    figures: Figures,
    restart: Restart,
) -> None:
    before = await plugin_on(cluster, place.a)
    begin = time.monotonic()
    restart.do(nodes, place.a)
    if restart.of_plugin:
        await restarted(cluster, before)
    await unharmed(cluster, kubectl, place, held)
    figures.add(f"{restart.name} until all is well, s", time.monotonic() - begin)


async def test_a_pod_keeps_its_device_through_a_deletion_of_the_plugins_pod(
    cluster: ClusterView, kubectl: Kubectl, place: Place, held: Identity
) -> None:
    await replace_plugin(cluster, kubectl, place.a)
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
    nodes.kubelet(place.a, "stop")
    try:
        await cluster.delete("pods", "keeper")
        await cluster.pod("keeper", lambda one: "deletionTimestamp" in one["metadata"], "marked for deletion")
        # its container runs, so the node keeps the lock beyond the next heartbeat
        beat = await _next_heartbeat(cluster, place.a)
        lock = await cluster.lock_of(place.a)
        assert (beat, lock["spec"]["leaseTransitions"]) == (place.a, held.epoch)
    finally:
        nodes.kubelet(place.a, "start")
    await cluster.gone("keeper")
    await cluster.unlocked()
    await cluster.allocatable(place.b, "solo", 1)


async def _next_heartbeat(cluster: ClusterView, node: str) -> str:
    """Waits until the node's session is renewed. Returns the session's holder."""
    name = f"usbip-node-{node}"
    first = (await cluster.all("leases"))[name]["spec"]["renewTime"]

    def renewed(leases: Mapping[str, Object]) -> str | None:
        return holder(leases[name]) if leases[name]["spec"]["renewTime"] != first else None

    return await cluster.until("leases", renewed, "a heartbeat")


async def test_a_node_that_dies_is_taken_over_after_the_duration_and_harms_nothing_when_it_is_back(
    cluster: ClusterView, kubectl: Kubectl, nodes: Nodes, image: str, place: Place, figures: Figures
) -> None:
    """Kills kubelet, plugin and kernel of b. Node a gets the device once b's lock has expired."""
    await run_pod(cluster, "lost", pod_spec(image, "solo", node=place.b))
    before = await cluster.lock_of(place.b)
    dead = await plugin_on(cluster, place.b)
    await cluster.allocatable(place.a, "solo", 0)
    nodes.kubelet(place.b, "stop")
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
        # Times from the Leases, which do not depend on when this test reads them. The nodes share one clock: a waited
        # for the whole duration after the last heartbeat.
        beat = (await cluster.all("leases"))[f"usbip-node-{place.b}"]["spec"]["renewTime"]
        waited = datetime.fromisoformat(lock["spec"]["acquireTime"]) - datetime.fromisoformat(beat)
        assert waited >= timedelta(seconds=LOCK_DURATION)
        assert lock["spec"]["leaseTransitions"] == before["spec"]["leaseTransitions"] + 1
        await cluster.running("heir")
        read_device(kubectl, "heir")
    finally:
        nodes.kubelet(place.b, "start")
    await cluster.settled()
    # b's pod still runs and has lost its device for good; a keeps it
    await restarted(cluster, dead)
    await cluster.allocatable(place.b, "solo", 0)
    assert await attached_on(cluster, kubectl, place.b) == 0
    assert await attached_on(cluster, kubectl, place.a) == 1
    read_device(kubectl, "heir")
    again = await cluster.lock_of(place.a)
    assert again["spec"]["leaseTransitions"] == lock["spec"]["leaseTransitions"]
