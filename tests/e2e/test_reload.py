"""A new ConfigMap while pods run, on real kubelets: pods keep their devices, and allocatable follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.e2e.cluster import DOMAIN, ClusterView, Object, locks_of
from tests.e2e.configuring import configure
from tests.e2e.conftest import CONFIG, LOCK_DURATION, Place
from tests.e2e.containers import device_path, read_device, restart_container
from tests.e2e.kubectl import Kubectl
from tests.e2e.plugin_pods import replace_plugin
from tests.e2e.workloads import pod_spec, run_pod

CHANGED = """
resources:
  fresh: [{{target: {{host: {host}}}, selector: {{bus_id: "1-[45]"}}}}]
  pair: [{{target: {{host: {host}}}, selector: {{bus_id: "1-3"}}}}]
  named:
    devices: [{{target: {{host: {host}}}, selector: {{bus_id: "1-6"}}}}]
    cdi: true
    containerPath: /dev/named-{{index}}
lock: {{duration: {duration}s}}
"""
"""Without solo and jobs, whose devices are in fresh. pair has one device less, and named has another path."""

Reload = Callable[[str, Mapping[str, int]], None]


@pytest.fixture
def reload(kubectl: Kubectl, installed: None, place: Place) -> Iterator[Reload]:
    """Returns a function that sets a configuration and waits for its counts. The first one is restored at the end."""

    def apply(text: str, counts: Mapping[str, int]) -> None:
        config = text.format(host=place.address, duration=LOCK_DURATION)
        configure(kubectl, (place.a, place.b), config, counts)

    yield apply
    apply(CONFIG, {})


def capacity(node: str, resource: str, count: int) -> Callable[[Mapping[str, Object]], bool]:
    return lambda nodes: int(nodes[node]["status"]["capacity"].get(f"{DOMAIN}/{resource}", 0)) == count


async def epochs(cluster: ClusterView, node: str) -> dict[str, int]:
    """Returns the epoch of each lock that the node holds."""
    mine = locks_of(await cluster.all("leases"), node)
    return {name: one["spec"]["leaseTransitions"] for name, one in mine.items()}


async def test_pods_keep_their_devices_through_a_reload_and_allocatable_follows(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, reload: Reload
) -> None:
    for name, resource in ("single", "solo"), ("couple", "pair"), ("by-name", "named"):
        count = 2 if resource == "pair" else 1
        await run_pod(cluster, name, pod_spec(image, resource, count, node=place.a))
        read_device(kubectl, name, resource.upper())
    locks = await epochs(cluster, place.a)
    assert len(locks) == 4

    reload(CHANGED, {"fresh": 2})
    await cluster.allocatable(place.b, "solo", 0)
    await cluster.allocatable(place.b, "pair", 0)
    for resource in ("solo", "jobs"):
        await cluster.until("nodes", capacity(place.b, resource, 0), f"no {resource} in the capacity")
    await cluster.allocatable(place.a, "solo", 1)
    await cluster.allocatable(place.a, "pair", 2)
    await cluster.allocatable(place.a, "jobs", 0)
    for name, resource in ("single", "SOLO"), ("couple", "PAIR"), ("by-name", "NAMED"):
        read_device(kubectl, name, resource)

    # without a plugin for the resource the kubelet could start no container
    await restart_container(cluster, kubectl, "single")
    read_device(kubectl, "single", "SOLO")
    await restart_container(cluster, kubectl, "by-name")
    assert device_path(kubectl, "by-name", "NAMED") == "/dev/named-0"
    read_device(kubectl, "by-name", "NAMED")

    # also with a plugin that never had the resource in its configuration
    await replace_plugin(cluster, kubectl, place.a)
    await cluster.allocatable(place.a, "solo", 1)
    await restart_container(cluster, kubectl, "single", 2)
    read_device(kubectl, "single", "SOLO")

    await run_pod(cluster, "newcomer", pod_spec(image, "fresh", node=place.b))
    assert await epochs(cluster, place.a) == locks, "no lock was released in between"

    for name in ("single", "couple", "by-name", "newcomer"):
        await cluster.delete("pods", name)
    await cluster.unlocked()
    await cluster.until("nodes", capacity(place.a, "solo", 0), "no solo in the capacity")
    await cluster.allocatable(place.a, "pair", 1)
    reload(CONFIG, {"solo": 1, "fresh": 0})
