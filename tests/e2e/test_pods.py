"""Pods that request devices, with real kubelets and a real scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pytest

from tests.e2e.cluster import (
    DOMAIN,
    NAMESPACE,
    PLUGIN_NAMESPACE,
    ClusterView,
    Object,
    failed,
    holder,
    is_lock,
    is_ready,
)
from tests.e2e.conftest import COUNTS, DEVICES, Place, Server
from tests.e2e.containers import read_device, restart_container
from tests.e2e.figures import Figures
from tests.e2e.kubectl import Kubectl
from tests.e2e.placements import Placements, caught_up, followed
from tests.e2e.workloads import deployment, pod, pod_spec, run_pod

COMPLETIONS = 20
FAILED_IN_JOB = 1
"""Pods of the job that may fail: the first two may meet on one of two devices that all nodes offer."""


def pending(one: Object) -> bool:
    """Returns whether the scheduler has tried to place the pod and failed."""
    conditions = one["status"].get("conditions") or []
    return one["status"].get("phase") == "Pending" and any(
        condition["type"] == "PodScheduled" and condition["status"] == "False" for condition in conditions
    )


@pytest.mark.short
async def test_a_pod_gets_the_device_and_every_other_node_withdraws_it(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, figures: Figures
) -> None:
    begin = time.monotonic()
    await run_pod(cluster, "taker", pod_spec(image, "solo", node=place.a))
    figures.add("pod creation to running, s", time.monotonic() - begin)
    read_device(kubectl, "taker")
    lock = await cluster.lock_of(place.a)
    assert lock["metadata"]["annotations"]["usbip.dev/busid"] == "1-1"
    await cluster.allocatable(place.b, "solo", 0)
    # withdrawn, not dropped: the kubelet still has it as Unhealthy in the capacity

    def known(nodes: Mapping[str, Object]) -> bool:
        return bool(nodes[place.b]["status"]["capacity"].get(f"{DOMAIN}/solo") == "1")

    await cluster.until("nodes", known, "still in the capacity")
    # without the scheduler the kubelet decides, and refuses the pod without a call of the plugin
    forced = pod_spec(image, "solo") | {"nodeName": place.b}
    await cluster.create("pods", pod("forced", forced))
    refused = await cluster.pod("forced", failed, "refused by the kubelet")
    assert "unhealthy devices" in refused["status"]["message"]


@pytest.mark.short
async def test_a_second_pod_waits_and_does_not_fail(
    cluster: ClusterView, kubectl: Kubectl, holder_spec: dict[str, Any]
) -> None:
    await run_pod(cluster, "first", holder_spec)
    await cluster.create("pods", pod("second", holder_spec))
    await cluster.pod("second", pending, "not placed")
    await cluster.delete("pods", "first")
    await cluster.running("second")
    read_device(kubectl, "second")


@pytest.mark.short
async def test_a_deleted_pods_device_is_free_elsewhere(
    cluster: ClusterView, image: str, place: Place, figures: Figures
) -> None:
    for here, there in ((place.a, place.b), (place.b, place.a)) * 2:
        begin = time.monotonic()
        await run_pod(cluster, "leaver", pod_spec(image, "solo", node=here))
        figures.add("pod creation to running, s", time.monotonic() - begin)
        await cluster.allocatable(there, "solo", 0)
        begin = time.monotonic()
        await cluster.delete("pods", "leaver")
        await cluster.allocatable(there, "solo", 1)
        figures.add("deletion to free elsewhere, s", time.monotonic() - begin)
        await cluster.gone("leaver")


@pytest.mark.short
async def test_a_restarted_container_has_its_device_again(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    await run_pod(cluster, "restarter", pod_spec(image, "solo", node=place.a))
    before = await cluster.lock_of(place.a)
    await restart_container(cluster, kubectl, "restarter")
    read_device(kubectl, "restarter")
    after = await cluster.lock_of(place.a)
    assert after["spec"]["leaseTransitions"] == before["spec"]["leaseTransitions"]


async def test_the_device_of_a_force_deleted_pod_is_released(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    await run_pod(cluster, "forced", pod_spec(image, "solo", node=place.a))
    await cluster.allocatable(place.b, "solo", 0)
    kubectl("delete", "pod", "-n", NAMESPACE, "forced", "--grace-period=0", "--force")
    await cluster.unlocked()
    await cluster.allocatable(place.b, "solo", 1)


async def test_an_init_container_and_its_pod_share_a_device(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    spec = pod_spec(image, "solo", node=place.a)
    init = {**spec["containers"][0], "name": "first", "command": ["sh", "-c", 'head -c 4 "$USBIP_SOLO_0_DEVICE"']}
    await run_pod(cluster, "sharer", {**spec, "initContainers": [init]})
    read_device(kubectl, "sharer")
    assert await cluster.lock_of(place.a)


async def test_a_pod_that_requests_two_devices_waits_for_both_and_holds_neither(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, server: Server
) -> None:
    server.set_devices(tuple(device for device in DEVICES if not device.startswith("1-3=")))
    for node in (place.a, place.b):
        await cluster.allocatable(node, "pair", 1)
    await cluster.create("pods", pod("two", pod_spec(image, "pair", 2)))
    await cluster.pod("two", pending, "not placed")
    assert not [lease for lease in (await cluster.all("leases")).values() if is_lock(lease) and holder(lease)]
    server.set_devices(DEVICES)
    await cluster.running("two")
    read_device(kubectl, "two", "PAIR")
    names = kubectl("exec", "-n", NAMESPACE, "two", "--", "sh", "-c", "env | grep -c '_DEVICE='")
    assert names.strip() == "2"


async def test_a_rollout_hands_the_device_from_the_old_pod_to_the_new(
    cluster: ClusterView, image: str, figures: Figures
) -> None:
    surge = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1}}
    spec = pod_spec(image, "solo")
    await cluster.create("deployments", deployment("rolling", spec, 1, surge))
    old = await cluster.until("pods", _ready_but(""), "the old pod")
    change = {"spec": {"template": {"metadata": {"annotations": {"e2e": "new"}}}}}
    async with followed(cluster, "solo") as placements:
        await cluster.patch("deployments", "rolling", change)
        await cluster.until("pods", _ready_but(old["metadata"]["name"]), "the new pod", on_change=_one_ready)
        await caught_up(cluster, placements)
        figures.add("failed pods in a rollout", len(placements.failures()))
        _denials_are_published(placements, "solo")
        assert len(placements.without_room()) <= 1, placements.without_room()
        assert len(placements.repeated()) <= 1, placements.repeated()


async def test_a_job_of_many_pods_completes_over_two_devices(
    cluster: ClusterView, image: str, figures: Figures
) -> None:
    spec = pod_spec(image, "jobs")
    spec["containers"][0]["command"] = ["sh", "-c", 'head -c 4 "$USBIP_JOBS_0_DEVICE"']
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "many", "namespace": NAMESPACE},
        "spec": {
            "completions": COMPLETIONS,
            "parallelism": 2,
            "backoffLimit": COMPLETIONS,
            "template": {"spec": {**spec, "restartPolicy": "Never"}},
        },
    }

    def complete(jobs: Mapping[str, Object]) -> Object | None:
        done = jobs["many"]["status"].get("conditions") or []
        assert not any(one["type"] == "Failed" for one in done), done
        return jobs["many"] if any(one["type"] == "Complete" for one in done) else None

    async with followed(cluster, "jobs") as placements:
        begin = time.monotonic()
        await cluster.create("jobs", job)
        ended = await cluster.until("jobs", complete, "the job complete", limit=300)
        figures.add(f"job of {COMPLETIONS} pods, s", time.monotonic() - begin)
        await caught_up(cluster, placements)
        figures.add(f"failed pods in a job of {COMPLETIONS}", len(placements.failures()))
        figures.add(f"failed pods in a job of {COMPLETIONS}, without room", len(placements.without_room()))
        assert ended["status"]["succeeded"] == COMPLETIONS
        figures.add(f"failed pods in a job of {COMPLETIONS}, repeated", len(placements.repeated()))
        _denials_are_published(placements, "jobs")
        assert len(placements.failures()) <= FAILED_IN_JOB, placements.failures()


@pytest.mark.short
async def test_contested_handovers_fail_no_pod_but_in_one_of_twenty(
    cluster: ClusterView, image: str, figures: Figures, pytestconfig: pytest.Config
) -> None:
    """Two replicas request one device that two nodes offer. Each round deletes the pod that holds it.

    The nodes offer it one after another, so that one pod is placed and the other waits. If a pod fails all the same,
    its Node shows that before the next pod is bound.
    """
    lost = 0
    rounds = int(pytestconfig.getoption("--rounds"))
    async with followed(cluster, "solo") as placements:
        await cluster.create("deployments", deployment("rivals", pod_spec(image, "solo"), 2))
        now = await cluster.until("pods", _ready_but(""), "the first holder", on_change=_one_ready)
        await caught_up(cluster, placements)
        figures.add("failed pods at the first contest", len(placements.failures()))
        for _ in range(rounds):
            failures = len(placements.failures())
            placed, repeated = len(placements.without_room()), len(placements.repeated())
            name = now["metadata"]["name"]
            begin = time.monotonic()
            await cluster.delete("pods", name)
            now = await cluster.until("pods", _ready_but(name), "another holder", on_change=_one_ready)
            figures.add("contested handover, s", time.monotonic() - begin)
            await caught_up(cluster, placements)
            figures.add("failed pods per contested handover", len(placements.failures()) - failures)
            lost += len(placements.failures()) > failures
            without_room = placements.without_room()[placed:]
            figures.add("failed pods per contested handover, without room", len(without_room))
            assert len(without_room) <= 1, without_room
            assert len(placements.repeated()) - repeated <= 1, placements.repeated()
        assert lost <= max(1, rounds // 20), f"{lost} of {rounds} handovers: {placements.failures()}"
        _denials_are_published(placements, "solo")


def _one_ready(pods: Mapping[str, Object]) -> None:
    holding = [name for name, one in pods.items() if is_ready(one)]
    assert len(holding) <= 1, f"two pods with one device: {holding}"


def _denials_are_published(placements: Placements, resource: str) -> None:
    """Asserts that the Node's status had the lower count before each denied Allocate."""
    assert not placements.denied_unpublished(COUNTS[resource]), placements.denied_unpublished(COUNTS[resource])


def _ready_but(old: str) -> Any:
    def found(pods: Mapping[str, Object]) -> Object | None:
        return next((one for name, one in pods.items() if name != old and is_ready(one)), None)

    return found


async def test_a_drained_nodes_pod_gets_the_device_on_another(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    await cluster.create("deployments", deployment("mover", pod_spec(image, "solo"), 1))
    first = await cluster.until("pods", _ready_but(""), "the pod")
    here = first["spec"]["nodeName"]
    there = place.b if here == place.a else place.a
    try:
        drain = ["drain", here, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s"]
        if here == place.server:
            drain.append("--pod-selector=app=mover")  # not the server
        await asyncio.to_thread(kubectl, *drain)
        second = await cluster.until("pods", _ready_but(first["metadata"]["name"]), "the pod elsewhere")
        assert second["spec"]["nodeName"] == there
        read_device(kubectl, second["metadata"]["name"])
    finally:
        kubectl("uncordon", here)


async def test_check_in_a_pod_accepts_rights_and_policy(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    """Runs with the token that a real kubelet mounts, which names the node."""
    await cluster.settled()
    name = "usbip-check"
    spec = pod_spec(image, None, node=place.a) | {"serviceAccountName": "usbip-plugin", "restartPolicy": "Never"}
    spec.pop("automountServiceAccountToken")
    container = spec["containers"][0]
    del container["command"]
    container["args"] = ["check", "--config=/config/config.yaml"]
    container["env"] = [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]
    container["volumeMounts"] = [{"name": "config", "mountPath": "/config"}]
    spec["volumes"] = [{"name": "config", "configMap": {"name": "usbip-plugin"}}]
    one = pod(name, spec)
    one["metadata"]["namespace"] = PLUGIN_NAMESPACE
    kubectl.apply([one])
    try:

        def ended(pods: Mapping[str, Object]) -> bool:
            return pods[name]["status"].get("phase") in {"Succeeded", "Failed"}

        await cluster.until("plugins", ended, "check has ended")
        output = kubectl("logs", "-n", PLUGIN_NAMESPACE, name)
    finally:
        kubectl("delete", "pod", "-n", PLUGIN_NAMESPACE, name)
    for line in ("ok    admission policy", "ok    API server", f"ok    server {place.address}"):
        assert line in output
