"""Pods with several containers and devices, on real kubelets, and under a topology manager that aligns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.e2e.cluster import DOMAIN, NAMESPACE, ClusterView, Object, failed, is_ready, locks_of
from tests.e2e.conftest import Place
from tests.e2e.containers import read_device
from tests.e2e.figures import Figures
from tests.e2e.kubectl import Kubectl
from tests.e2e.nodes import LabNodes, Nodes
from tests.e2e.plugin_process import Pages, addresses
from tests.e2e.workloads import WAIT_FOR_TERM, deployment, pod, pod_spec, run_pod
from usbip_plugin.attach.usage import ABSENT_POLLS, ALLOCATION_GRACE
from usbip_plugin.kubelet.pod_resources import HINTED_INTERVAL

POLLS_PAST_GRACE = math.ceil(ALLOCATION_GRACE / HINTED_INTERVAL) + ABSENT_POLLS + 1
"""Polls after which a device without a known pod is released. The plugin polls every HINTED_INTERVAL at most."""
NOT_YET = ("no healthy devices present", "unregistered device", "has been stopped", "Available: 0")
"""Messages of a kubelet that has no list of a resource's devices yet, or has just lost its plugin."""
MOST_REFUSED = 2
READ = 'for path in $(env | sed -n "s/^USBIP_[A-Z]*_[0-9]_DEVICE=//p"); do head -c 4 "$path" >/dev/null || exit 1; done'


def container(image: str, name: str, limits: Mapping[str, int], script: str = WAIT_FOR_TERM) -> dict[str, Any]:
    full = {f"{DOMAIN}/{resource}": count for resource, count in limits.items()}
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
        "resources": {"limits": full},
    }


async def held(cluster: ClusterView, node: str, count: int) -> set[str]:
    """Returns the bus IDs of the locks that the node holds, once there are this many."""

    def found(leases: Mapping[str, Object]) -> set[str] | None:
        mine = locks_of(leases, node)
        busids = {lease["metadata"]["annotations"]["usbip.dev/busid"] for lease in mine.values()}
        return busids if len(busids) == count else None

    return await cluster.until("leases", found, f"{count} locks of {node}")


def environment(kubectl: Kubectl, name: str, container: str) -> dict[str, str]:
    """Returns the plugin's environment variables in a container."""
    text = kubectl("exec", "-n", NAMESPACE, name, "-c", container, "--", "sh", "-c", "env | grep ^USBIP_")
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.mark.short
async def test_init_containers_sidecars_and_two_resources_in_one_pod(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    """The devices of `named` come by CDI name, the others by path."""
    spec = pod_spec(image, None, node=place.a)
    spec["initContainers"] = [
        container(image, "setup", {"pair": 2}, READ),
        container(image, "beside", {"jobs": 1}) | {"restartPolicy": "Always"},
    ]
    spec["containers"] = [
        container(image, "main", {"solo": 1, "named": 1}),
        container(image, "second", {"pair": 1, "jobs": 1}),
    ]
    await run_pod(cluster, "several", spec)
    assert await held(cluster, place.a, 6) == {f"1-{port}" for port in range(1, 7)}
    for name, resource in (
        ("main", "SOLO"),
        ("main", "NAMED"),
        ("second", "PAIR"),
        ("second", "JOBS"),
        ("beside", "JOBS"),
    ):
        read_device(kubectl, "several", resource, container=name, devices=6)
    beside, second = environment(kubectl, "several", "beside"), environment(kubectl, "several", "second")
    assert beside["USBIP_JOBS_0_BUSID"] != second["USBIP_JOBS_0_BUSID"]
    assert {name for name in second if name.endswith("_BUSID")} == {"USBIP_PAIR_0_BUSID", "USBIP_JOBS_0_BUSID"}
    assert environment(kubectl, "several", "main").keys() >= {"USBIP_SOLO_0_DEVICE", "USBIP_NAMED_0_DEVICE"}
    await cluster.delete("pods", "several")
    await cluster.unlocked()


async def test_a_device_of_an_init_container_stays_until_the_pod_ends(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    """The kubelet lists only the app's device, for longer than any grace."""
    pages = Pages(addresses(kubectl)[place.a])
    spec = pod_spec(image, "jobs", node=place.a)
    script = f"until [ -e /tmp/go ]; do sleep 0.2; done; {READ}"
    spec["initContainers"] = [container(image, "setup", {"solo": 1, "pair": 2}, script)]
    await cluster.create("pods", pod("slow", spec))
    assert await held(cluster, place.a, 4) >= {"1-1", "1-2", "1-3"}
    await pages.until_polls(await pages.polls() + POLLS_PAST_GRACE)
    assert len(await held(cluster, place.a, 4)) == 4
    kubectl("exec", "-n", NAMESPACE, "slow", "-c", "setup", "--", "touch", "/tmp/go")
    await cluster.running("slow")
    await pages.until_polls(await pages.polls() + POLLS_PAST_GRACE)
    assert len(await held(cluster, place.a, 4)) == 4, "a new sandbox runs the init container again"
    read_device(kubectl, "slow", "JOBS", devices=4)
    await cluster.delete("pods", "slow")
    await cluster.unlocked()


@pytest.fixture
def aligning(nodes: Nodes, place: Place, kubectl: Kubectl) -> Iterator[str]:
    """Yields a node whose kubelet aligns the resources of a pod to one NUMA node, and assigns whole processors."""
    assert isinstance(nodes, LabNodes), "other nodes are deselected in conftest.py"
    file = nodes.state / place.a / "kubelet.yaml"
    state = nodes.state / place.a / "kubelet" / "cpu_manager_state"
    before = file.read_text(encoding="utf-8")
    more = "topologyManagerPolicy: single-numa-node\ncpuManagerPolicy: static\nkubeReserved: {cpu: 100m}\n"
    try:
        nodes.kubelet(place.a, "stop")
        state.unlink(missing_ok=True)  # with the state of another policy the kubelet does not start
        file.write_text(before + more, encoding="utf-8")
        nodes.kubelet(place.a, "start")
        yield place.a
    finally:
        nodes.kubelet(place.a, "stop")
        state.unlink(missing_ok=True)
        file.write_text(before, encoding="utf-8")
        nodes.kubelet(place.a, "start")


async def test_a_topology_manager_refuses_no_pod_for_its_devices(
    cluster: ClusterView, kubectl: Kubectl, image: str, aligning: str, figures: Figures
) -> None:
    """The devices report no NUMA node, so the kubelet accepts any."""
    spec = pod_spec(image, None, node=aligning)
    main = container(image, "main", {"pair": 2, "named": 1})
    main["resources"]["limits"] |= {"cpu": "1", "memory": "64Mi"}  # a whole processor: guaranteed
    # a kubelet refuses pods until the plugin has registered, and the deployment creates the next one
    await cluster.create("deployments", deployment("aligned", {**spec, "containers": [main]}, 1))
    refused: dict[str, str] = {}

    def note_refused(pods: Mapping[str, Object]) -> None:
        refused.update({name: str(one["status"].get("message")) for name, one in pods.items() if failed(one)})

    def running(pods: Mapping[str, Object]) -> Object | None:
        return next((one for one in pods.values() if is_ready(one)), None)

    found = await cluster.until("pods", running, "a pod that runs", on_change=note_refused)
    figures.add("pods refused by a kubelet that has just been started", len(refused))
    assert all(any(text in message for text in NOT_YET) for message in refused.values()), refused
    assert len(refused) <= MOST_REFUSED, refused
    assert found["status"]["qosClass"] == "Guaranteed"
    read_device(kubectl, found["metadata"]["name"], "NAMED")
    config = kubectl("get", "--raw", f"/api/v1/nodes/{aligning}/proxy/configz")
    assert '"topologyManagerPolicy":"single-numa-node"' in config
    assert '"cpuManagerPolicy":"static"' in config
    await cluster.delete("deployments", "aligned", grace=1)
    await cluster.unlocked()
