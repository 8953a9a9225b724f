"""Devices by CDI name on real kubelets and containerd, with a simulated kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.e2e.cluster import DOMAIN, PLUGIN_NAMESPACE, ClusterView, Object
from tests.e2e.conftest import DEVICES, Place, Server
from tests.e2e.containers import device_path, end_container, read_device, restart_container, started_again
from tests.e2e.kubectl import Kubectl
from tests.e2e.plugin_pods import plugin_on, replace_plugin
from tests.e2e.plugin_process import imports_at_server
from tests.e2e.workloads import pod_spec, run_pod


async def specs(cluster: ClusterView, kubectl: Kubectl, node: str) -> list[str]:
    """Returns the CDI specs of the plugin's domain on a node."""
    name = (await plugin_on(cluster, node))["metadata"]["name"]
    script = f"ls /var/run/cdi | grep ^{DOMAIN}- || true"
    return kubectl("exec", "-n", PLUGIN_NAMESPACE, name, "-c", "plugin", "--", "sh", "-c", script).split()


async def reconnect(cluster: ClusterView, server: Server, node: str) -> None:
    """Removes the device of `named` from its server and brings it back. It has other nodes then."""
    server.set_devices(DEVICES[:-1])
    await cluster.allocatable(node, "named", 0)
    server.set_devices(DEVICES)
    await cluster.allocatable(node, "named", 1)


async def allocations(cluster: ClusterView, kubectl: Kubectl, node: str) -> int:
    name = (await plugin_on(cluster, node))["metadata"]["name"]
    log = kubectl("logs", "-n", PLUGIN_NAMESPACE, name, "-c", "plugin")
    return sum('"devices allocated"' in line and f"{DOMAIN}/named" in line for line in log.splitlines())


@pytest.mark.short
async def test_a_container_started_again_has_the_nodes_of_the_reattached_device(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, server: Server
) -> None:
    earlier = await allocations(cluster, kubectl, place.a)
    await run_pod(cluster, "named", pod_spec(image, "named", node=place.a))
    read_device(kubectl, "named", "NAMED")
    before = device_path(kubectl, "named", "NAMED")
    assert before.startswith("/dev/bus/usb/")
    assert len(await specs(cluster, kubectl, place.a)) == 1
    assert await specs(cluster, kubectl, place.b) == [], "each node has its own"

    await reconnect(cluster, server, place.a)
    await restart_container(cluster, kubectl, "named")
    read_device(kubectl, "named", "NAMED")
    assert device_path(kubectl, "named", "NAMED") != before
    assert await allocations(cluster, kubectl, place.a) == earlier + 1, "the kubelet allocates once"

    await cluster.delete("pods", "named")
    await cluster.unlocked()
    assert await specs(cluster, kubectl, place.a) == []


async def test_the_spec_outlives_the_plugins_pod_and_is_rewritten_by_its_successor(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, server: Server
) -> None:
    await run_pod(cluster, "named", pod_spec(image, "named", node=place.a))
    before = device_path(kubectl, "named", "NAMED")
    await replace_plugin(cluster, kubectl, place.a)
    await cluster.allocatable(place.a, "named", 1)
    await restart_container(cluster, kubectl, "named")
    assert device_path(kubectl, "named", "NAMED") == before
    await reconnect(cluster, server, place.a)
    await restart_container(cluster, kubectl, "named", 2)
    read_device(kubectl, "named", "NAMED")
    assert device_path(kubectl, "named", "NAMED") != before


async def test_a_lost_device_keeps_the_container_from_starting_and_the_message_names_it(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, server: Server
) -> None:
    await run_pod(cluster, "named", pod_spec(image, "named", node=place.a))
    server.set_devices(DEVICES[:-1])
    await cluster.allocatable(place.a, "named", 0)
    assert imports_at_server(kubectl) == {}
    end_container(kubectl, "named")

    def waiting(one: Object) -> str | None:
        state: Mapping[str, Any] = one["status"]["containerStatuses"][0]["state"].get("waiting", {})
        return state.get("message") if "not attached" in state.get("message", "") else None

    found = await cluster.pod("named", waiting, "with a message why it does not start")
    message = found["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
    assert f"1-6 is not attached to node {place.a}" in message
    server.set_devices(DEVICES)
    await started_again(cluster, "named", 1)
    read_device(kubectl, "named", "NAMED")
